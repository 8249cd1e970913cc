"""Adapter Report: what an adapter is and what its gates did, as text and as pictures."""

from __future__ import annotations

from typing import Any

from . import inputs


class AdapterReport:
    """An ADAPTER examined; pictures and latents may pass through, so that it runs after the sampler."""

    CATEGORY = inputs.CATEGORY
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
                    "The base model: the report then compares it with the one trained on, and shows how large "
                    "the changes are beside the weights."
                ),
                "samples": (
                    "LATENT",
                    {
                        "tooltip": "A sampler's latent, passed through unchanged, so that this node runs after it."
                    },
                ),
                "images": (
                    "IMAGE",
                    {"tooltip": "Images, passed through unchanged, so that this node runs after them."},
                ),
            },
        }

    def report(
        self, adapter: Any, model: Any = None, samples: Any = None, images: Any = None
    ) -> dict[str, Any]:
        raise NotImplementedError
