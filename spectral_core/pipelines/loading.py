"""Open a diffusers pipeline from a folder or a single checkpoint file, offline.

This package alone in the core may import diffusers and transformers, and only inside functions: the core
works without them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SpectralAdapterError
from ..files.container import strict_json
from ..files.reading import read_text
from ..training.objectives.diffusion import Diffusion

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""The parts of a pipeline that adapters name, in the order in which they are listed."""

TEXT_PARTS = ("text_encoder", "text_encoder_2")

LIBRARIES = (
    "diffusers",
    "transformers",
    "stable_diffusion",
    None,
)  # of a folder's parts; the third is an alias

EXTRA_HINT = "install the extra with: pip install diffusers transformers accelerate"


EMBEDDED = Path(__file__).resolve().parents[2] / "demo_model"
"""The small model that comes with the package, as a diffusers folder."""


def load_pipeline(path: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers text-to-image pipeline from a diffusers folder or one .safetensors checkpoint; no network.

    Without a path it is the embedded model. Raises SpectralAdapterError where the path is
    neither, or diffusers is not installed.

    >>> import spectral_core as sc
    >>> type(sc.load_pipeline()).__name__
    'StableDiffusionPipeline'
    """
    with warnings.catch_warnings():
        # The older name, because it is the one that every supported release of diffusers understands.
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        return _quiet(_open(EMBEDDED if path is None else Path(path), dtype))


def native_size(pipe: Any) -> tuple[int, int]:
    """(width, height) in pixels that the pipeline was trained for."""
    side = int(pipe.unet.config.sample_size) * int(pipe.vae_scale_factor)
    return side, side


def quiet_libraries() -> None:
    """The libraries' own bars and advice stay out of our output."""
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return  # opening the model will say what is missing
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _open(path: Path, dtype: torch.dtype) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise SpectralAdapterError(f"diffusers is needed to open {path}: {EXTRA_HINT}") from error
    if path.is_file():
        from .single_file import load_single_file

        return load_single_file(path, dtype)
    index = path / "model_index.json"
    if not index.is_file():
        raise SpectralAdapterError(
            f"model {path}: expected a diffusers folder (with model_index.json) or one .safetensors "
            "checkpoint file"
        )
    expected = _checked_index(index)
    extras: dict[str, Any] = {}
    if "safety_checker" in expected:
        extras = {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
            path, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **extras
        )
    except _errors() as error:
        raise SpectralAdapterError(f"model {path}: diffusers cannot open it: {error}") from error
    channels = getattr(getattr(getattr(pipe, "unet", None), "config", None), "in_channels", 4)
    if channels != 4:
        from .single_file import OTHER_INPUTS, SUPPORTED

        what = OTHER_INPUTS.get(channels, f"a UNet with {channels} input channels")
        raise SpectralAdapterError(f"model {path}: found {what}; {SUPPORTED}")
    return pipe


def _errors() -> tuple[type[Exception], ...]:
    """What the libraries raise over a folder that is damaged: they share no type."""
    from huggingface_hub import errors

    known = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)
    return (*known, getattr(errors, "StrictDataclassError", OSError))  # of newer releases


def _checked_index(index: Path) -> dict[str, Any]:
    """``model_index.json``: which class of which library each part is. Only those of the two libraries are
    made: diffusers would import whatever else stands there."""
    try:
        found = strict_json(read_text(index))
        if not isinstance(found, dict) or not isinstance(found.get("_class_name"), str):
            raise SpectralAdapterError("expected a table with the pipeline's _class_name")
        for name, entry in found.items():
            if isinstance(entry, list) and (len(entry) != 2 or entry[0] not in LIBRARIES):
                raise SpectralAdapterError(
                    f"{name}: found {entry!r:.80}, expected a class of diffusers or transformers"
                )
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{index}: {error}") from error
    return found


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for module in parts_of(pipe).values():
        module.eval().requires_grad_(False)
    return pipe


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's modules that adapters can change, by part name."""
    found = {name: getattr(pipe, name, None) for name in PARTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def diffusion_of(pipe: Any) -> Diffusion:
    """The pipeline's noise schedule and kind of prediction."""
    scheduler = pipe.scheduler
    return Diffusion(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)


def is_xl(pipe: Any) -> bool:
    """Whether the pipeline takes SDXL's pooled embedding and size conditioning."""
    return getattr(pipe, "text_encoder_2", None) is not None


def family_of(pipe: Any) -> str:
    """``sd1``, ``sd2``, ``sdxl``, ``mini`` (the embedded model) or ``unknown``, by what the denoiser attends
    to."""
    if is_xl(pipe):
        return "sdxl"
    width = getattr(pipe.unet.config, "cross_attention_dim", None) if hasattr(pipe, "unet") else None
    return (
        {768: "sd1", 1024: "sd2", 128: "mini"}.get(width, "unknown") if isinstance(width, int) else "unknown"
    )
