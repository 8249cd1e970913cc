"""A first lesson for the text encoder: every position from the end token on must tell the caption's content.

Most of the 77 positions that the denoiser attends to are padding after the caption. When these already carry
attributes, even the nearly uniform attention of an untrained denoiser sees them, and its training starts with
something to listen to.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from demo_model import draw, pictures
from demo_model.grounds import PHRASES

from .common import MODEL, SEED, Budget, forget_this_machine, known, note
from .text import load_tokenizer, text_model

TEXTURES = "|".join(draw.TEXTURES)
NOUNS = "|".join([*pictures.OBJECTS, "shape"])
OBJECT = {
    "shape": rf"\b({'|'.join(pictures.OBJECTS)})\b",
    "colour": rf"\b({'|'.join(draw.COLOURS)}) (?:(?:{TEXTURES}) )?(?:{NOUNS})\b",
    "texture": rf"\b({TEXTURES})\b",
}
WHOLE = {
    "size": rf"\b({'|'.join(draw.SIZES)})\b",
    "position": rf"(?:in|on|at) the ({'|'.join(draw.POSITIONS)})\b",
    "background": rf"\b({'|'.join(draw.BACKGROUNDS)}) (?:gradient )?(?:background|picture)\b",
    "shading": r"\b(gradient)\b",
}
GROUND_OF = {phrase: name for name, phrase in PHRASES.items()}
PAIR = re.compile(r" (and|next to|above) ")
VALUES: dict[str, list[str]] = {
    "shape": list(pictures.OBJECTS),
    "colour": list(draw.COLOURS),
    "texture": list(draw.TEXTURES),
    "size": list(draw.SIZES),
    "position": list(pictures.POSITIONS),
    "background": list(pictures.PLACES),
    "shading": ["gradient"],
    "second": list(pictures.OBJECTS),
    "second_colour": list(draw.COLOURS),
    "second_texture": list(draw.TEXTURES),
}


def said(caption: str) -> dict[str, int]:
    """For each attribute the index of the value that the caption gives it; the number of values if none."""
    found: dict[str, str] = {}
    halves = PAIR.split(caption, maxsplit=1)
    first, second = halves[0], halves[2] if len(halves) > 1 else ""

    def read(name: str, pattern: str, words: str) -> None:
        if match := re.search(pattern, words):
            found[name] = match[1]

    for name, pattern in OBJECT.items():
        read(name, pattern, first)
        read("second" if name == "shape" else f"second_{name}", pattern, second)
    for name, pattern in WHOLE.items():
        read(name, pattern, caption)
    for phrase, ground in GROUND_OF.items():
        if phrase in caption:
            found["background"] = ground
    if len(halves) > 1:
        found["position"] = "above" if halves[1] == "above" else "beside"
    return {name: v.index(found[name]) if name in found else len(v) for name, v in VALUES.items()}


def train(device: str, steps: int = 700, size: int = 32) -> None:
    """Train the fresh text encoder with linear readers on its last states; write it into the folder."""
    torch.manual_seed(SEED + 9)
    rng, shown, tokenizer = np.random.default_rng(SEED + 9), known(), load_tokenizer()
    text = text_model(tokenizer).to(device).train()
    readers = nn.ModuleDict({name: nn.Linear(128, len(v) + 1) for name, v in VALUES.items()}).to(device)
    optimiser = torch.optim.AdamW([*text.parameters(), *readers.parameters()], lr=2e-3, weight_decay=0.01)
    budget, right = Budget(steps, warmup=20), dict.fromkeys(VALUES, 0.0)
    for step in range(steps):
        chosen = rng.integers(len(shown), size=size)
        captions = [pictures.caption(shown[i], rng) if rng.random() > 0.05 else "" for i in chosen]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ids = ids.to(device)
        states, after, truth = (
            text(ids).last_hidden_state,
            ids == tokenizer.eos_token_id,
            [*map(said, captions)],
        )
        loss = torch.zeros((), device=device)
        for name, reader in readers.items():
            wanted = torch.tensor([t[name] for t in truth], device=device)[:, None].expand_as(ids)[after]
            logits = reader(states[after])
            loss = loss + F.cross_entropy(logits, wanted)
            right[name] = 0.95 * right[name] + 0.05 * (logits.argmax(1) == wanted).float().mean().item()
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * budget.factor(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            worst = min(right, key=lambda name: right[name])
            print(
                f"text {step} loss {loss:.4f} worst {worst} {right[worst]:.3f} {budget.seconds():.0f}s",
                flush=True,
            )
    text.half().save_pretrained(MODEL / "text_encoder", safe_serialization=True)
    forget_this_machine()
    note("text", steps, budget.seconds())
