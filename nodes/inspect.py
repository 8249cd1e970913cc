"""Adapter Report: what an adapter is and what its gates did, as text and as pictures."""

from __future__ import annotations

from typing import Any

from . import images as pictures
from . import inputs, results, tensors


class AdapterReport:
    """An ADAPTER examined; pictures and latents may pass through, so that it runs after the sampler."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Shows what is in an adapter: layers, ranks, spectrum, trigger words, base model, and which gates "
        "were open at which noise level in the last run. Route the sampler's latent or the images through it "
        "to have it look after the run."
    )
    SEARCH_ALIASES = ["inspect", "analyse lora", "adapter info", "gates", "spectral adapters"]
    RETURN_TYPES = ("STRING", "IMAGE", "LATENT", "IMAGE")
    RETURN_NAMES = ("report", "pictures", "samples", "images")
    OUTPUT_TOOLTIPS = (
        "The report as text.",
        "One sheet with the adapter's spectra, ranks and gates.",
        "The connected latent, unchanged.",
        "The connected images, unchanged.",
    )
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {"adapter": inputs.adapter("The adapter to examine.")},
            "optional": {
                "model": inputs.model(
                    "The base model: the report then compares it with the one trained on, and shows how "
                    "large the changes are beside the weights."
                ),
                "samples": (
                    "LATENT",
                    {"tooltip": "A sampler's latent, passed through, so that this node runs after it."},
                ),
                "images": (
                    "IMAGE",
                    {"tooltip": "Images, passed through, so that this node runs after they are made."},
                ),
            },
        }

    def report(
        self, adapter: Any, model: Any = None, samples: Any = None, images: Any = None
    ) -> dict[str, Any]:
        from ..spectral_core.analysis import findings
        from ..spectral_core.analysis import findings_picture as findings_sheet

        results.need_adapter(adapter)
        with tensors.lasting():
            weights, notes = _weights(adapter, model)
            found = findings.examine(adapter, weights, _record(adapter))
            sheet = findings_sheet.draw(found)
        if found.record is not None and samples is None and images is None:
            notes.append(
                "the gates may be of an earlier run: nothing makes this node wait for the sampler; route its "
                "latent, or the images, through samples or images of this node"
            )
        text = results.lines(findings.text(found), *notes)
        ui = pictures.preview(sheet, "adapter_report")
        return results.shown(text, text, pictures.to_image(sheet), samples, images, **ui)


def _weights(adapter: Any, model: Any) -> tuple[dict[str, Any], list[str]]:
    """The connected model's weights of the adapter's layers, or why there are none."""
    if model is None:
        return {}, []
    from ..spectral_core.errors import SpectralAdapterError
    from .host.model import base_weights

    try:
        return base_weights.available(adapter, model), []
    except SpectralAdapterError as error:
        return {}, [f"not compared with the connected model: {error}"]


def _record(adapter: Any) -> dict[str, Any] | None:
    """What the adapter's gates did in the last run; None outside the host, and before any run."""
    import sys

    if "comfy" not in sys.modules:
        return None
    from .host.apply import gate_records as records

    recorder = records.of(adapter)
    return None if recorder is None else recorder.summary()
