"""Adapter Strength: how strong an adapter is, when in the denoising, and in which blocks."""

from __future__ import annotations

from typing import Any

from . import inputs, results

CURVES = ("constant", "linear in", "linear out", "cosine in", "cosine out", "bell", "custom")


def _percent(default: float, tooltip: str) -> inputs.Input:
    return ("FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": tooltip})


class AdapterStrength:
    """Scales an ADAPTER for model and clip, over the denoising and per block; collects adapters in a list."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Sets how strong an adapter is: for model and text encoder, over the denoising (early steps decide "
        "the composition, late ones the detail), and in single blocks. Chain several to collect adapters "
        "for Fuse Adapters or Apply Adapter."
    )
    SEARCH_ALIASES = ["schedule", "weight", "block weight", "lora strength", "slider", "spectral adapters"]
    RETURN_TYPES = (inputs.ADAPTER, inputs.ADAPTER_LIST, "STRING")
    RETURN_NAMES = ("ADAPTER", "adapters", "report")
    OUTPUT_TOOLTIPS = (
        "The adapter at this strength.",
        "The connected list with this adapter at its end.",
        "The strengths that result, per part and block, and the schedule.",
    )
    FUNCTION = "scale"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "adapter": inputs.adapter("The adapter to scale; it is not changed, a scaled one comes out."),
                "strength_model": inputs.strength_model(),
                "strength_clip": inputs.strength_clip(),
                "start_percent": _percent(
                    0.0,
                    "Where in the denoising the adapter sets in: 0 is the first, noisiest step. A later "
                    "start keeps the base model's composition.",
                ),
                "end_percent": _percent(
                    1.0,
                    "Where in the denoising the adapter leaves off: 1 is the last, cleanest step. An earlier "
                    "end keeps the base model's fine detail.",
                ),
                "curve": inputs.combo(
                    CURVES,
                    "How the strength runs between start and end. in: rises from 0 to full; out: falls from "
                    "full to 0; bell: strongest halfway; custom: the points below. The text encoder takes no "
                    "schedule.",
                ),
                "custom_curve": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Only for curve = custom: points place:strength, such as 0:1, 0.5:0.3, "
                        "1:0; place 0 is the noisiest step, 1 the cleanest; straight lines between.",
                    },
                ),
                "block_weights": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Further strengths for single blocks, one per line or between commas: "
                        "down_blocks.1: 0.5, attn2: 0, or short: IN, MID, OUT, IN4, OUT2, TE. They "
                        "multiply; 0 leaves a block as in the base model.",
                    },
                ),
            },
            "optional": {
                "adapters": inputs.adapter_list("Adapters collected so far; this one is appended."),
            },
        }

    def scale(
        self,
        adapter: Any,
        strength_model: float,
        strength_clip: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        curve: str = "constant",
        custom_curve: str = "",
        block_weights: str = "",
        adapters: Any = None,
    ) -> dict[str, Any]:
        from ..spectral_core.adapter import block_strengths as blocks
        from ..spectral_core.adapter import schedule_words as schedule_curves
        from ..spectral_core.adapter import strengths

        results.need_adapter(adapter)
        window = schedule_curves.named(curve, start_percent, end_percent, custom_curve)
        scaled = strengths.on_sides(adapter, strength_model, strength_clip)
        scaled, entries = blocks.apply(strengths.over_denoising(scaled, window), block_weights)
        report = results.lines(
            strengths.describe(scaled),
            *map(str, entries),
            schedule_curves.describe(scaled.schedule),
        )
        chain = (*results.need_adapters(adapters), scaled)
        return results.shown(report, scaled, chain, report)
