"""Apply Adapter: ADAPTER onto MODEL and CLIP, merged into the weights or live in the forward pass."""

from __future__ import annotations

from typing import Any

from . import inputs, results


class ApplyAdapter:
    """An adapter and an optional list of more, put on MODEL and CLIP."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Puts an adapter on the model and the text encoder. merged changes the weights exactly and costs "
        "nothing per step; live computes it beside them, which adaptive gates and schedules need and which "
        "makes changing a strength instant; auto chooses and says which."
    )
    SEARCH_ALIASES = ["apply lora", "use adapter", "lora", "concept", "style", "spectral adapters"]
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("MODEL", "CLIP", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the adapter. Needs a connected model input.",
        "The text encoder with the adapter. Needs a connected clip input.",
        "The mode that was used, the layers that matched and those that did not.",
    )
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "strength_model": inputs.strength_model(),
                "strength_clip": inputs.strength_clip(),
                "mode": inputs.combo(
                    inputs.MODES,
                    "merged: into the weights, no cost per step. live: beside the weights, for adaptive "
                    "gates, schedules, quantised models and quick changes of strength. auto: merged where "
                    "that is exact, else live. The picture is the same.",
                ),
                "base_mismatch": inputs.base_mismatch(),
            },
            "optional": {
                "adapter": inputs.adapter("The adapter to put on the model."),
                "model": inputs.model("The model that the adapter changes; the original stays as it is."),
                "clip": inputs.clip(
                    "The text encoder that the adapter changes; the original stays as it is."
                ),
                "adapters": inputs.adapter_list(
                    "Adapters from Adapter Stack or Adapter Strength, put on as well, at the strengths set "
                    "there."
                ),
            },
        }

    def apply(
        self,
        adapter: Any = None,
        strength_model: float = 1.0,
        strength_clip: float = 1.0,
        mode: str = "auto",
        base_mismatch: str = "delta",
        model: Any = None,
        clip: Any = None,
        adapters: Any = None,
    ) -> dict[str, Any]:
        from ..spectral_core.errors import SpectralAdapterError
        from .host.apply import adapters as applying

        if model is None and clip is None:
            raise SpectralAdapterError("Apply Adapter has nothing to apply to: connect model, clip, or both")
        given = [] if adapter is None else [(results.need_adapter(adapter), (strength_model, strength_clip))]
        given += [(each, (1.0, 1.0)) for each in results.need_adapters(adapters)]  # which carry their own
        if not given:
            raise SpectralAdapterError("Apply Adapter has no adapter: connect adapter, adapters, or both")
        reports = []
        for each, strengths in given:
            applied = applying.apply(each, model, clip, *strengths, mode=mode, base_mismatch=base_mismatch)
            model, clip = applied.model, applied.clip
            reports.append(applied.report)
        report = results.lines(*reports)
        return results.shown(
            report,
            results.or_absent(model, "Apply Adapter", "MODEL", "model"),
            results.or_absent(clip, "Apply Adapter", "CLIP", "clip"),
            report,
        )
