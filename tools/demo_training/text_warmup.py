"""A first lesson for the text encoder: every position from the end token on must tell the caption's content.

Most of the 77 positions that the denoiser attends to are padding after the caption. When these already carry
attributes, even the nearly uniform attention of an untrained denoiser sees them, and the joint training that
follows starts with something to listen to.
"""

from __future__ import annotations

import json
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from demo_model import draw

from .common import CACHE, SEED, Budget, scenes
from .text import load_tokenizer, text_model

TEXTURES = "|".join(draw.TEXTURES)
NOUNS = "|".join([*draw.SHAPES, "shape"])
PATTERNS = {
    "shape": rf"\b({'|'.join(draw.SHAPES)})\b",
    "colour": rf"\b({'|'.join(draw.COLOURS)}) (?:(?:{TEXTURES}) )?(?:{NOUNS})\b",
    "size": rf"\b({'|'.join(draw.SIZES)})\b",
    "position": rf"(?:in|on|at) the ({'|'.join(draw.POSITIONS)})\b",
    "texture": rf"\b({TEXTURES})\b",
    "background": rf"\b({'|'.join(draw.BACKGROUNDS)}) (?:gradient )?(?:background|picture)\b",
    "shading": r"\b(gradient)\b",
}
VALUES: dict[str, list[str]] = {
    "shape": list(draw.SHAPES),
    "colour": list(draw.COLOURS),
    "size": list(draw.SIZES),
    "position": list(draw.POSITIONS),
    "texture": list(draw.TEXTURES),
    "background": list(draw.BACKGROUNDS),
    "shading": ["gradient"],
}


def said(caption: str, attribute: str) -> int:
    """The index of the value that the caption gives to the attribute; the number of values if none."""
    found = re.search(PATTERNS[attribute], caption)
    return VALUES[attribute].index(found[1]) if found else len(VALUES[attribute])


def train(device: str, steps: int = 400, minutes: float = 3.0, size: int = 32) -> None:
    """Train the fresh text encoder with linear readers on its last states; leave it in the cache."""
    torch.manual_seed(SEED + 9)
    rng, known, tokenizer = np.random.default_rng(SEED + 9), scenes(), load_tokenizer()
    text = text_model(tokenizer).to(device).train()
    readers = nn.ModuleDict({name: nn.Linear(128, len(v) + 1) for name, v in VALUES.items()}).to(device)
    optimiser = torch.optim.AdamW([*text.parameters(), *readers.parameters()], lr=2e-3, weight_decay=0.01)
    budget, step = Budget(steps, minutes, warmup=20), 0
    while budget.progress(step) < 1:
        chosen = rng.integers(len(known), size=size)
        captions = [draw.caption(known[i], rng) if rng.random() > 0.05 else "" for i in chosen]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
            device
        )
        states = text(ids).last_hidden_state
        after = ids == tokenizer.eos_token_id
        loss = torch.zeros((), device=device)
        for name, reader in readers.items():
            wanted = torch.tensor([said(c, name) for c in captions], device=device)
            wanted = wanted[:, None].expand_as(ids)[after]
            loss = loss + F.cross_entropy(reader(states[after]), wanted)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * budget.factor(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            print(f"text {step} loss {loss:.4f} {budget.seconds():.0f}s", flush=True)
        step += 1
    torch.save(text.state_dict(), CACHE / "text.pt")
    (CACHE / "text_time.json").write_text(json.dumps({"steps": step, "seconds": round(budget.seconds())}))
