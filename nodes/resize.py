"""Resize Adapter: the same adapter at a smaller rank."""

from __future__ import annotations

from typing import Any

from . import inputs, results, tensors


class ResizeAdapter:
    """An ADAPTER at a smaller rank, by rank or by error."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Lowers an adapter's rank: every layer keeps its strongest directions. Smaller files, less memory; "
        "the report says what is lost, layer by layer. For LoRA, LoKr and fused adapters that grew too large."
    )
    SEARCH_ALIASES = ["lora resize", "reduce rank", "compress lora", "svd", "spectral adapters"]
    RETURN_TYPES = (inputs.ADAPTER, "STRING")
    RETURN_NAMES = ("ADAPTER", "report")
    OUTPUT_TOOLTIPS = ("The smaller adapter.", "Rank and relative error of every layer.")
    FUNCTION = "resize"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "adapter": inputs.adapter("The adapter to make smaller; it is not changed."),
                "rank": (
                    "INT",
                    {
                        "default": 16,
                        "min": 0,
                        "max": 4096,
                        "tooltip": "The largest rank that a layer keeps. Lower makes a smaller file and a "
                        "weaker likeness; 0 lets the error alone decide.",
                    },
                ),
                "error": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": "How much of each layer's update may be lost: 0.05 is 5 %, hardly "
                        "visible. Layers that need fewer directions get fewer. 0 lets the rank alone decide.",
                    },
                ),
            }
        }

    def resize(self, adapter: Any, rank: int = 16, error: float = 0.0) -> dict[str, Any]:
        from ..spectral_core.fusion import recompress

        results.need_adapter(adapter)
        with tensors.lasting():
            small = recompress(adapter, rank or None, error or None)
        rows = (
            f"{row.name}: rank {row.rank_before} → {row.rank_after}, {row.error:.1%} lost"
            for row in sorted(small.report.layers, key=lambda row: -row.error)
        )
        report = results.lines(small.report.text, *rows)
        return results.shown(report, small.adapter, report)
