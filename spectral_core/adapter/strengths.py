"""An adapter's strengths as users set them: for the picture's model, for its text encoders, and in time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..names.layer_name import LayerName
from ..names.spellings import BARE_PART, KOHYA_PART
from . import schedule_words as schedule_curves
from .adapter import Adapter
from .schedule import Schedule

_MODEL_PARTS = (
    *("unet", "diffusion_model", "transformer", "lora_unet", "lora_transformer"),
    *("base_model", BARE_PART, "lycoris", "lora_prior_unet"),
)


def is_text_encoder(name: str) -> bool:
    """Whether a layer belongs to a text encoder, told by its name.

    A name that begins with a list of blocks (``double_blocks.3.…``) has no part in front: it is the model's.
    """
    layer = LayerName.parse(name)
    if layer.path[:1].isdigit():
        return False
    return not (layer.path if layer.part == KOHYA_PART else layer.part).startswith(_MODEL_PARTS)


def on_sides(adapter: Adapter, model: float, clip: float) -> Adapter:
    """The adapter ``model`` times as strong in the picture's model and ``clip`` times in text encoders."""
    sides = {is_text_encoder(name) for name in adapter.layers}
    if model == clip or sides == {False}:
        return adapter.scaled(model)
    if sides == {True}:
        return adapter.scaled(clip)
    pairs = [(glob, clip if text else model) for glob, text in _globs(adapter)]
    pairs = [(glob, strength) for glob, strength in pairs if strength != 1]
    return replace(adapter, layer_strengths=(*adapter.layer_strengths, *pairs))


def _globs(adapter: Adapter) -> list[tuple[str, bool]]:
    """(glob, whether it is text encoders') that together fit each layer once."""
    found: dict[str, bool] = {}
    for name in adapter.layers:
        part = LayerName.parse(name).part
        if part == KOHYA_PART:  # the side is in the name behind it: lora_unet_…, lora_te1_…
            part = "_".join(name.split("_")[:2])
            found[f"{part}_*"] = is_text_encoder(name)
        else:
            found[f"{part}.*"] = is_text_encoder(name)
    return list(found.items())


def over_denoising(adapter: Adapter, schedule: Schedule | None) -> Adapter:
    """The adapter with a schedule on top of the one that it has."""
    if schedule is None:
        return adapter
    had = adapter.schedule
    return adapter.with_schedule(schedule if had is None else schedule_curves.product(had, schedule))


def describe(adapter: Adapter) -> str:
    """The strengths that result, each with the number of layers that have it."""
    lines = []
    for text, side in ((False, "model"), (True, "text encoder")):
        counts = Counter(
            f"{adapter.strength_of(name):.4g}" for name in adapter.layers if is_text_encoder(name) == text
        )
        if len(counts) == 1:
            strength, count = counts.popitem()
            lines.append(f"{side}: strength {strength} in {count} layers{_off(strength)}")
        elif counts:
            shown = ", ".join(f"{s} in {n}" for s, n in counts.most_common(8))
            lines.append(f"{side}: strengths {shown} layers{' and others' if len(counts) > 8 else ''}")
    return "\n".join(lines)


def _off(strength: str) -> str:
    return ": exactly off" if strength == "0" else ""
