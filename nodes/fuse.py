"""Fuse Adapters: several adapters become one, with a report and a picture of how much they overlap."""

from __future__ import annotations

from typing import Any

from . import images, inputs, results, tensors


def _methods() -> list[str]:
    from ..spectral_core.fusion import FUSIONS  # slow to import: not while the host starts

    return [name for name, fusion in FUSIONS.items() if not fusion.needs_statistics]


class FuseAdapters:
    """Two adapters and an optional list of more, fused into one."""

    CATEGORY = inputs.CATEGORY
    DESCRIPTION = (
        "Fuses two or more adapters into one that holds all their concepts, and shows beforehand how much "
        "they get into each other's way. Third and further ones come as a list from Adapter Strength."
    )
    SEARCH_ALIASES = ["merge lora", "combine adapters", "fusion", "spectral adapters"]
    RETURN_TYPES = (inputs.ADAPTER, "STRING", "IMAGE")
    RETURN_NAMES = ("ADAPTER", "report", "overlap")
    OUTPUT_TOOLTIPS = (
        "The fused adapter.",
        "What was fused by which rule, ranks, errors and warnings.",
        "How much the adapters overlap: concept by concept, and layer by layer.",
    )
    FUNCTION = "fuse"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "adapter_1": inputs.adapter("The first concept."),
                "adapter_2": inputs.adapter("The second concept."),
                "method": inputs.combo(
                    _methods(),
                    "sum: both at full strength, as if loaded one after the other. average: their mean, "
                    "subtler. spectral: adds the changes of singular columns, for Spectral Adapters with "
                    "columns of their own. Others: see the help page.",
                ),
                "weight_1": inputs.strength(
                    "How strong the first concept is in the result; 0 leaves it out."
                ),
                "weight_2": inputs.strength(
                    "How strong the second concept is in the result; 0 leaves it out."
                ),
                "target_rank": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 4096,
                        "tooltip": "Compresses every layer to this rank: smaller files, a little of the "
                        "look lost (the report says how much). 0 keeps everything exactly.",
                    },
                ),
                "freeze_gates": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Replaces FouRA's adaptive gates by their average from training. The "
                        "result can then be compressed, merged and exported, but no longer adapts to the "
                        "step.",
                    },
                ),
            },
            "optional": {
                "adapters": inputs.adapter_list(
                    "Third and further concepts, from Adapter Strength, with the strengths set there."
                ),
                "model": inputs.model("The model that the concepts are for, for methods that look at it."),
                "clip": inputs.clip(
                    "The text encoder that the concepts are for, for methods that look at it."
                ),
            },
        }

    def fuse(
        self,
        adapter_1: Any,
        adapter_2: Any,
        method: str = "sum",
        weight_1: float = 1.0,
        weight_2: float = 1.0,
        target_rank: int = 0,
        freeze_gates: bool = False,
        adapters: Any = None,
        model: Any = None,
        clip: Any = None,
    ) -> dict[str, Any]:
        from ..spectral_core import fusion, overlap_sheet

        given = [results.need_adapter(adapter_1, "adapter_1"), results.need_adapter(adapter_2, "adapter_2")]
        given += results.need_adapters(adapters)
        weights = [weight_1, weight_2] + [1.0] * (len(given) - 2)
        with tensors.lasting():
            fused = fusion.fuse(given, method, weights, rank=target_rank or None, freeze_gates=freeze_gates)
            picture = overlap_sheet.draw(given)
        report = fused.report.text
        ui = images.preview(picture, "fuse_adapters")
        return results.shown(report, fused.adapter, report, images.to_image(picture), **ui)
