"""Load Demo Model: the embedded model, so that every example runs without a download."""

from __future__ import annotations

from typing import Any

from . import inputs

DESCRIPTION = """The demo model: a miniature Stable Diffusion, drawn and trained by this project.

Size: connect its latent to KSampler's latent_image: 64 x 64 pixels, the size it was trained on.
KSampler: 20 steps, cfg 4, sampler ddim, scheduler simple.
Prompt: one shape on a background, such as "a large red striped star on a blue background, on the left".
Shapes: circle, square, triangle, star, heart, ring, cross, moon. Sizes: small, large.
Colours: red, orange, yellow, green, blue, purple, pink, white.
Textures: plain, striped, dotted, checkered.
Places: in the center, on the left, on the right, at the top, at the bottom.
Backgrounds: black, gray, white, red, green, blue, yellow, each plain or as a "gradient".
It knows no other word; new ones such as <bot> come with adapters. Its CLIP is for this model only."""


class LoadDemoModel:
    """MODEL, CLIP and VAE of the embedded model; no widget, no file to choose."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = "A tiny model that comes with this pack: try every node without a download. 64 x 64 pixels."
    SEARCH_ALIASES = ["spectral demo", "example model", "test model", "tiny model"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING", "LATENT")
    RETURN_NAMES = ("MODEL", "CLIP", "VAE", "description", "LATENT")
    OUTPUT_TOOLTIPS = (
        "The demo model's UNet (v-prediction). KSampler: 20 steps, cfg 4, ddim, simple.",
        "The demo model's text encoder: knows the words in the description and those that adapters bring.",
        "The demo model's VAE, 4 pixels per latent cell.",
        "What the model draws, the words it knows and the sizes and settings to use.",
        "An empty latent of its size, 64 x 64 pixels, in place of Empty Latent Image. For more pictures: "
        "Repeat Latent Batch.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> dict[str, Any]:
        from .host.demo import model as demo_model

        result = (*demo_model.load(), DESCRIPTION, demo_model.empty_latent())
        return {"ui": {"text": (DESCRIPTION,)}, "result": result}
