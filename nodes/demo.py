"""Load Demo Model: the embedded model, so that every example runs without a download."""

from __future__ import annotations

from typing import Any

from . import inputs

DESCRIPTION = """The demo model: a miniature Stable Diffusion, drawn and trained by this project.

Size: 128 x 128 pixels, the size it was trained on: connect its latent, or an Empty Latent Image of 128.
Two large things side by side: an Empty Latent Image of 192 x 128.
KSampler: 20 steps, cfg 4, sampler ddim, scheduler simple.
Prompt: one thing and where, such as "a large red striped star on a blue background, on the left",
or two things, such as "a red star and a blue ring in a meadow", "a red star above a blue ring at night",
in 192 x 128 "a large red star and a large blue ring in a meadow".
Things: circle, square, triangle, star, heart, ring, cross, moon, creature. Sizes: small, large.
Colours: red, orange, yellow, green, blue, purple, pink, white.
Textures: plain, striped, dotted, checkered.
Places: in the center, on the left, on the right, at the top, at the bottom.
Grounds: in a meadow, on a beach, at night, in the snow, in a room; or "on a ... background" of black, gray,
white, red, green, blue, yellow, each plain or as a "gradient".
It knows no other word; new ones such as <bot> come with adapters. Its CLIP is for this model only."""


class LoadDemoModel:
    """MODEL, CLIP and VAE of the embedded model; no widget, no file to choose."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = "A tiny model of this pack: try every node without a download. 128 x 128 pixels."
    SEARCH_ALIASES = ["spectral demo", "example model", "test model", "tiny model"]
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING", "LATENT")
    RETURN_NAMES = ("MODEL", "CLIP", "VAE", "description", "LATENT")
    OUTPUT_TOOLTIPS = (
        "The demo model's UNet (v-prediction). KSampler: 20 steps, cfg 4, ddim, simple.",
        "The demo model's text encoder: knows the words in the description and those that adapters bring.",
        "The demo model's VAE, 8 pixels per latent cell.",
        "What the model draws, the words it knows and the sizes and settings to use.",
        "An empty latent of its size, 128 x 128 pixels, as Empty Latent Image makes it.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> dict[str, Any]:
        from .host.demo import model as demo_model

        result = (*demo_model.load(), DESCRIPTION, demo_model.empty_latent())
        return {"ui": {"text": (DESCRIPTION,)}, "result": result}
