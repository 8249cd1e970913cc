"""Inputs and sockets that several nodes share: their types, limits and tooltips.

Widgets are positional in saved workflows: a new one is appended, none is moved or removed.
"""

from __future__ import annotations

from typing import Any

CATEGORY = "spectral adapters"
REPORTS = True
"""``HAS_INTERMEDIATE_OUTPUT``: the host sends a node's report again where its result comes from the cache."""
ADAPTER = "SPECTRAL_ADAPTER"
ADAPTER_LIST = "SPECTRAL_ADAPTER_LIST"

Input = tuple[Any, dict[str, Any]]
Inputs = dict[str, dict[str, Any]]

BASE_MISMATCH = ("delta", "rebase", "strict")
MODES = ("auto", "merged", "live")


def strength(of: str) -> Input:
    """A strength widget; ``of`` is what it changes, in a user's words."""
    options = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01, "tooltip": of}
    return ("FLOAT", options)


def strength_model() -> Input:
    return strength(
        "How strongly the adapter changes the picture's model. 1 is as trained, 0 is exactly off, lower is "
        "subtler, above 1 exaggerates, negative pushes away from the concept."
    )


def strength_clip() -> Input:
    return strength(
        "How strongly the adapter changes how the prompt is understood (the text encoder). 1 is as trained, "
        "0 is exactly off. Without effect where the adapter has no text encoder layers."
    )


def adapter(tooltip: str) -> Input:
    return (ADAPTER, {"tooltip": tooltip})


def adapter_list(tooltip: str) -> Input:
    return (ADAPTER_LIST, {"tooltip": tooltip})


def model(tooltip: str) -> Input:
    return ("MODEL", {"tooltip": tooltip})


def clip(tooltip: str) -> Input:
    return ("CLIP", {"tooltip": tooltip})


def combo(choices: tuple[str, ...] | list[str], tooltip: str, default: str = "") -> Input:
    return (list(choices), {"default": default or choices[0], "tooltip": tooltip})


def base_mismatch() -> Input:
    return combo(
        BASE_MISMATCH,
        "What to do when the model is not the one that the adapter was trained on. delta: add the change as "
        "it was trained. rebase: take the singular vectors of this model instead, so that the adapter turns "
        "and scales what is there. strict: stop with an error.",
    )
