"""The host's folders, and what kind of model it has loaded."""

from __future__ import annotations

from pathlib import Path

from spectral_core.names.unet_blocks import UNetLayout

from . import places
from .extension import host_of


def spectral_folder() -> Path:
    """``--spectral-dir``, else ``spectral_adapters`` below the host's models; it is made."""
    from modules import paths, shared

    chosen = getattr(shared.cmd_opts, "spectral_dir", None)
    folder = Path(chosen) if chosen else Path(paths.models_path) / "spectral_adapters"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lora_folder() -> Path:
    """Where the host's LoRAs lie."""
    from modules import paths, shared

    return Path(getattr(shared.cmd_opts, "lora_dir", None) or Path(paths.models_path) / "Lora")


def family_of_loaded() -> str:
    """``sd1``, ``sd2``, ``sdxl`` or ``mini``; empty where nothing is loaded yet, or another kind of model."""
    from modules import sd_models

    sd_model = sd_models.model_data.sd_model  # the host's own word for it would load one
    try:
        return places.family_of(host_of(sd_model).unet(sd_model)) if sd_model else ""
    except AttributeError:  # the host's stand-in while nothing is loaded
        return ""


def layout_of_loaded() -> UNetLayout | None:
    """The layout of the model that is loaded now; None where none is, or another kind."""
    from modules import shared

    sd_model = shared.sd_model
    try:
        return places.layout_of(host_of(sd_model).unet(sd_model)) if sd_model else None
    except AttributeError:  # the host's stand-in while nothing is loaded
        return None
