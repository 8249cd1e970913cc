"""Widgets made from the table of settings, and the inputs of Train Adapter.

The order of widgets is that of saved workflows: new ones stand at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import inputs

if TYPE_CHECKING:
    from ..spectral_core.training.config.setting import Setting

OPTIONS = "SPECTRAL_TRAIN_OPTIONS"
_MOST = {int: 1_000_000, float: 100.0}
_BELOW_ONE = 0.9999


def rows() -> dict[str, Setting]:
    """Name -> setting, of everything that Train Adapter can be told."""
    from ..spectral_core.training.config.config import TrainConfig
    from ..spectral_core.training.config.setting import settings_of
    from .host.training.job import Job

    return settings_of(Job, TrainConfig, Job)  # in the order of the job's, which go before the trainer's


def widget(row: Setting, default: Any = None, tooltip: str = "", **more: Any) -> inputs.Input:
    """A setting's widget. default, tooltip: in place of the setting's."""
    tooltip, words = tooltip or row.words.help, row.words
    default = row.default if default is None else default
    options: dict[str, Any] = {"tooltip": tooltip, **more}
    if words.advanced:
        options["advanced"] = True
    if words.methods:
        options["methods"] = list(words.methods)  # the page shows it for these
    if words.label:
        options["display_name"] = words.label
    if row.choices:
        return (list(row.choices), {"default": default, **options})
    if row.kind is bool:
        return ("BOOLEAN", {"default": default, **options})
    if row.kind in (int, float):
        most = _MOST[row.kind] if words.most is None else words.most if words.ends[1] == "]" else _BELOW_ONE
        limits = {"default": default or row.kind(0), "min": words.least or row.kind(0), "max": most}
        if words.least is not None and words.least < 0:
            limits["min"] = words.least
        if words.step:
            limits["step"] = words.step
        if 0 < words.step < 1e-3:
            limits["round"] = False
        return ("INT" if row.kind is int else "FLOAT", {**limits, **options})
    text = ", ".join(map(str, default)) if isinstance(default, tuple) else default
    return ("STRING", {"default": text, **options})


def value_of(row: Setting, value: Any) -> Any:
    """A setting's value from its widget's: text is read, and 0 is nothing where nothing can be."""
    from ..spectral_core.training.config.reading import reader_of

    if row.kind is tuple and isinstance(value, str):
        return reader_of(row)(value)
    return None if row.optional and not value else value


def folder(row: Setting) -> inputs.Input:
    """A choice of a folder with pictures."""
    return inputs.combo(_folders(), row.words.help)


def _folders() -> list[str]:
    from .host.training import data as training_data

    return training_data.folders()


def input_types() -> inputs.Inputs:
    """What the host asks Train Adapter for."""
    return {"required": _required(rows()), "optional": _sockets()}


def _required(table: Mapping[str, Setting]) -> dict[str, Any]:
    from ..spectral_core.training.config.presets import NAMES

    return {
        "model": inputs.model("The base model. It is not changed; the adapter is trained beside it."),
        "images": inputs.combo(
            _folders(),
            "A folder of pictures with captions (cat.jpg with cat.txt) inside ComfyUI's input folder. Needs "
            "vae and clip. none: latents and conditioning are connected instead.",
        ),
        "trigger_word": (
            "STRING",
            {
                "default": "",
                "tooltip": "A word for the concept, put in front of captions that lack it. Only for images.",
            },
        ),
        "preset": inputs.combo(
            NAMES, "What is trained: decides rank and steps where they are 0, and a few other settings."
        ),
        "method": widget(table["method"]),
        "rank": widget(table["rank"], 0, f"{table['rank'].words.help} 0: the preset's.", min=0, max=4096),
        "steps": widget(table["steps"], 0, f"{table['steps'].words.help} 0: the preset's.", min=0),
        "sample_every": widget(table["sample_every"]),
        "run_name": run_name("my_adapter"),
    }


def run_name(default: str) -> inputs.Input:
    tooltip = (
        "The name of the run and of the adapter's file. The same name with the same settings resumes a "
        "stopped run, or returns the finished file; more steps go on from there; other settings begin name-2."
    )
    return ("STRING", {"default": default, "tooltip": tooltip})


def _sockets() -> dict[str, Any]:
    return {
        "clip": inputs.clip(
            "The model's CLIP, which encodes the captions. It is trained only where that is set."
        ),
        "vae": ("VAE", {"tooltip": "The model's VAE, which encodes the pictures of the folder."}),
        "latents": (
            "LATENT",
            {"tooltip": "Encoded pictures, one batch or a list; used when images is none."},
        ),
        "conditioning": (
            "CONDITIONING",
            {"tooltip": "Encoded captions, one for each latent or one for all; used when images is none."},
        ),
        "adapter": inputs.adapter("An adapter to go on with; it brings its own method, rank and layers."),
        "options": options(),
    }


def options() -> inputs.Input:
    return (OPTIONS, {"tooltip": "Further settings, from the Training nodes; chain as many as you like."})
