"""What follows from the connected model where the user leaves it open: the pictures' size, the learning rate,
the guidance; and what to say, before a run starts, of values that do not suit it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ....spectral_core.training.config import defaults
from .job import Job
from .start import family_of

_SIZES = {"sd1": 512, "sd2": 512, "sdxl": 1024}
_SIZE = 1024  # of the families of today
_VIDEO_SIZE = 512  # a frame more or less is not what memory allows
_RATED = ("adamw", "adafactor", "schedulefree", "adamw8bit")  # the optimisers that the usual rates are for
GUIDANCE = 4.0


STEPS, FEW_STEPS = 20, 4  # of a picture; of models distilled to few


def pixels_per_cell(vae: Any) -> int:
    """Pixels of a side for each cell of a latent."""
    ratio = getattr(vae, "downscale_ratio", 8)
    return ratio if isinstance(ratio, int) else 8


def usual_steps(model: Any) -> int:
    """Denoising steps of a picture: few for models that are made for few (Flux schnell)."""
    shape = model.model.model_config.unet_config
    is_few = shape.get("image_model") == "flux" and not shape.get("guidance_embed", False)
    return FEW_STEPS if is_few else STEPS


def usual_size(model: Any, pixels_per_cell: int) -> int:
    """Pixels of a side that the model is made for."""
    family, shape = family_of(model), model.model.model_config.unet_config
    if channels(model) and channels(model) < defaults.NARROW and "image_size" in shape:
        return int(shape["image_size"]) * pixels_per_cell
    is_video = getattr(model.get_model_object("latent_format"), "latent_dimensions", 2) == 3
    return _SIZES.get(family, _VIDEO_SIZE if is_video else _SIZE)


def channels(model: Any) -> int:
    """Of a UNet's first level; 0 for other models."""
    return int(model.model.model_config.unet_config.get("model_channels", 0) or 0)


def usual_guidance(model: Any) -> float:
    """1 for models that have their guidance inside, or need none (Flux)."""
    shape = model.model.model_config.unet_config
    inside = shape.get("guidance_embed", False) or shape.get("image_model") == "flux"
    return 1.0 if inside else GUIDANCE


def fitted(job: Job, model: Any, pixels_per_cell: int) -> tuple[Job, list[str]]:
    """The job with what was left open, and what to say of the rest."""
    notes, width = [], channels(model)
    if job.needs_vae:
        usual = usual_size(model, pixels_per_cell)
        notes.append(defaults.size_note(job.resolution or usual, usual))
        job = replace(job, resolution=job.resolution or usual)
    config = job.config
    if not config.learning_rate and config.optimiser in _RATED and 0 < width < defaults.NARROW:
        job = replace(job, config=replace(config, learning_rate=defaults.usual_rate(job.method, width)))
    notes.append(defaults.rate_note(job.config, job.method, width))
    return job, [note for note in notes if note]
