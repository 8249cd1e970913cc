"""The command ``slider``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..training.config.config import TrainConfig
from ..training.runs.outcome import TrainResult
from ..training.runs.place import Run
from . import options as opt
from . import runs, train
from .models import open_model
from .options import Option

DESCRIPTION = """Train a concept slider from two prompts, without pictures, and save it as an adapter.

Strength 1 moves pictures towards --positive, −1 towards --negative, anything between and beyond by degrees;
several sliders add up. {} in a prompt is where an attribute goes: give --preserve for each subject (or
whatever else shall stay as it is), and the slider learns what the poles have in common over all of them.

  python -m spectral_core slider --model sd15 --positive 'a very old {}' --negative 'a very young {}' \\
    --neutral 'a {}' --preserve man --preserve woman --output adapters --run-name age
  python -m spectral_core generate --model sd15 --adapter adapters/age.safetensors:-1.5 --prompt 'a man'

Nothing is lost: the same command goes on from its last checkpoint."""

_WHAT = [
    Option(
        "model",
        "a diffusers folder or a .safetensors checkpoint (Stable Diffusion 1.x, 2.x, XL)",
        metavar="PATH",
    ),
    Option("positive", "the prompt at strength 1", metavar="PROMPT"),
    Option("negative", "the prompt at strength −1", metavar="PROMPT"),
    Option("neutral", "the prompt that is moved", metavar="PROMPT"),
    Option("preserve", "an attribute that shall stay; may be given several times", many=True, metavar="TEXT"),
    Option("eta", "how far strength 1 moves, as a share of the poles' difference", float, metavar="X"),
    Option(
        "start",
        "progress from which it acts, 0 the noisiest; keeps the layout of pictures",
        float,
        metavar="P",
    ),
    Option("output", "folder for adapters", metavar="DIR", default="adapters"),
    Option("run_name", "names the run and the adapter", metavar="NAME", default="slider"),
]
_ADAPTER = [
    Option("method", "what is trained", choices=("foura", "spectral_a", "spectral_r", "lora")),
    Option("rank", "size of the update; number of columns of the spectral methods", int, metavar="R"),
    Option("transform", "of foura", choices=("dct", "dft", "none")),
    Option("gate", "of foura", choices=("adaptive", "none")),
    Option("columns", "of the spectral methods, like 0-7; default: the lowest", opt.columns, metavar="LIST"),
    Option("targets", "layers: attention, attention+mlp, all-linear, all, a glob, re:…", metavar="NAMES"),
]
_SAMPLES = [
    Option("samples", "neutral pictures of the model that it learns on", int, metavar="N"),
    Option("sample_steps", "denoising steps of each", int, metavar="N"),
    Option("guidance", "of these", float, metavar="G"),
    Option("size", "of these, like 512 or 768x512 (default: the model's own)", opt.size, metavar="PIXELS"),
    Option("batch_size", "rows per batch", int, metavar="N"),
    Option("accumulation", "batches per step", int, metavar="N"),
]
_SHARED = ("optimiser", "noise", "gates", "machine")
NEEDED = ("model", "positive", "negative")


def groups() -> dict[str, list[Option]]:
    """Title -> options, with their defaults."""
    from ..pipelines.slider import SliderJob

    shared = train.groups()
    return {
        "what": opt.with_defaults(_WHAT, SliderJob),
        "adapter": opt.with_defaults(_ADAPTER, SliderJob),
        "samples": opt.with_defaults(opt.with_defaults(_SAMPLES, SliderJob), TrainConfig),
        **{title: shared[title] for title in _SHARED},
        "checkpoints": [o for o in shared["checkpoints and samples"] if o.name == "checkpoint_every"],
    }


def add_parser(commands: Any) -> None:
    usage = "--model PATH --positive PROMPT --negative PROMPT"
    opt.add_command(commands, "slider", "train a concept slider", usage, DESCRIPTION, groups(), run)


def run(namespace: argparse.Namespace) -> int:
    """The command; see :mod:`.main` for its exit codes."""
    from ..pipelines.slider import SliderJob, train_slider

    values = opt.given(namespace, groups(), NEEDED)
    if values is None:
        return 2
    job, config = train.only(SliderJob, values), train.only(TrainConfig, values)
    pipe = open_model(values["model"], values.get("dtype", "fp32"), values.get("device"))
    settings = {"slider": job.settings(), "model": Path(values["model"]).name}

    def make(name: str, around: Run) -> tuple[Adapter, TrainResult, Sequence[str]]:
        done = train_slider(pipe, job, config, name, around)
        return done.adapter, done.result, done.notes

    folder = Path(values.get("output", "adapters"))
    named = runs.Named(
        folder, values.get("run_name", "slider"), values.get("checkpoint_every", 100), namespace.json
    )
    return runs.carry_out(named, config, settings, make)
