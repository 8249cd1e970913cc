"""Text conditioning of Stable Diffusion 1.x, 2.x and XL denoisers, differentiable for the sake of new words.

Shapes: hidden states (B, L, D); XL adds the pooled embedding (B, P) and six numbers of size and crop (B, 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .loading import is_xl

Conditioning = dict[str, Any]


def _ids(tokenizer: Any, captions: Sequence[str], device: torch.device) -> Tensor:
    encoded = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = encoded.input_ids.to(device)
    return ids


def encode(pipe: Any, captions: Sequence[str], size: tuple[int, int]) -> Conditioning:
    """Keyword arguments for the denoiser; size is (width, height) in pixels. Gradients flow to new words."""
    device = pipe.unet.device
    dtype = pipe.unet.dtype
    if not is_xl(pipe):
        hidden = pipe.text_encoder(_ids(pipe.tokenizer, captions, device))[0]
        return {"encoder_hidden_states": hidden.to(dtype)}
    states = []
    pooled = None
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        out = encoder(_ids(tokenizer, captions, device), output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled = out[0]
    width, height = size
    numbers = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=dtype)
    assert pooled is not None
    return {
        "encoder_hidden_states": torch.cat(states, -1).to(dtype),
        "added_cond_kwargs": {"text_embeds": pooled.to(dtype), "time_ids": numbers.expand(len(captions), -1)},
    }


class CaptionCache:
    """Conditioning per caption, kept while nothing in the text encoders trains."""

    def __init__(self, pipe: Any, size: tuple[int, int], keep: bool) -> None:
        self._pipe, self._size, self._keep = pipe, size, keep
        self._known: dict[str, Conditioning] = {}

    def encode(self, captions: Sequence[str]) -> Conditioning:
        if not self._keep:
            return encode(self._pipe, captions, self._size)
        missing = [c for c in dict.fromkeys(captions) if c not in self._known]
        if missing:
            with torch.no_grad():
                for caption in missing:
                    self._known[caption] = encode(self._pipe, [caption], self._size)
        return joined_rows([self._known[c] for c in captions])


def joined_rows(parts: Sequence[Conditioning]) -> Conditioning:
    """One batch from several conditionings of a row each."""
    first = parts[0]
    return {
        key: joined_rows([p[key] for p in parts])
        if isinstance(first[key], dict)
        else torch.cat([p[key] for p in parts])
        for key in first
    }
