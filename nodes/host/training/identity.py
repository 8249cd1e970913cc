"""What a MODEL, CLIP or VAE is, by content: a named run is found again after a restart, but for no other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NOT_IN_EVERY_FILE = ("text_projection", "text_projection.weight", "logit_scale")
_OF_THE_HOST = ("manual_cast_dtype",)  # how the host computes, set by itself on the models that it loads
_SAMPLED = 64  # numbers of a tensor that tell it from another


def content_digest(value: Any) -> str:
    """SHA-256 over tensors and plain values, however deep in lists and tables."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            plain = item.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(item, Mapping):
            for key in sorted(map(str, item)):
                digest.update(key.encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            digest.update(f"[{len(item)}".encode())
            for each in item:
                add(each)
        elif isinstance(item, str | int | float | bool | None):
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()[:16]


def digest_of_weights(patcher: Any) -> str:
    """Names, shapes and a few numbers of every weight of an autoencoder or text encoder: enough to tell two
    apart, whatever is patched into them at the moment."""
    parts = []
    for name, value in patcher.model.state_dict().items():
        if name.endswith(_NOT_IN_EVERY_FILE):  # the host leaves their memory as it finds it
            continue
        value = patcher.backup[name].weight if name in patcher.backup else value
        if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
            parts.append([name, list(value.shape), value.detach().reshape(-1)[:4].float().cpu()])
    return content_digest(parts)


def digest_of_patches(patcher: Any) -> str:
    """What a MODEL or CLIP carries besides its weights: patches of any node, live adapters of this pack, and
    replaced parts such as another ``model_sampling``. Empty for nothing."""
    from ..apply import (
        stack as live,  # which needs the host's modules, and what tells the data apart does not
    )

    found: list[Any] = []
    for key in sorted(patcher.patches, key=str):
        for strength, what, of_model, offset, *_ in patcher.patches[key]:
            found.append([str(key), strength, of_model, repr(offset), _content(what)])
    stack = live.stack_of(patcher)
    for entry in () if stack is None else stack.entries:
        points = None if entry.schedule is None else [list(point) for point in entry.schedule.points]
        found.append([entry.key, list(entry.strengths), points])
    for name in sorted(set(patcher.object_patches) - set(_OF_THE_HOST)):
        part = patcher.object_patches[name]
        found.append([name, type(part).__qualname__, _content(getattr(part, "sigmas", None))])
    return content_digest(found) if found else ""


def patches_of(model: Any, clip: Any) -> dict[str, str]:
    """:func:`digest_of_patches` of a MODEL and of a CLIP (or None), those that carry something."""
    patchers = {"model": model} | ({} if clip is None else {"clip": clip.patcher})
    found = {name: digest_of_patches(patcher) for name, patcher in patchers.items()}
    return {name: each for name, each in found.items() if each}


def _content(value: Any) -> Any:
    """Some numbers of every tensor in a patch, however it is packed."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        return [list(value.shape), flat[:: max(1, len(flat) // _SAMPLED)].float().cpu()]
    if isinstance(value, list | tuple):
        return [_content(each) for each in value]
    if hasattr(value, "weights"):  # the host's weight adapters
        return [type(value).__qualname__, _content(value.weights)]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__qualname__
