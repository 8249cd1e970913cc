"""The command ``slider``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..training.config.adapter import KeptEvery
from ..training.config.config import TrainConfig
from . import options as opt
from . import train
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
    train.MODEL,
    Option("positive", "the prompt at strength 1", metavar="PROMPT"),
    Option("negative", "the prompt at strength −1", metavar="PROMPT"),
    Option("output", "folder for adapters", metavar="DIR", default="adapters"),
    Option("run_name", "names the run and the adapter", metavar="NAME", default="slider"),
]
NEEDED = ("model", "positive", "negative")


def groups() -> dict[str, list[Option]]:
    """Title -> options, with their defaults."""
    from ..pipelines.slider import SliderJob

    titles = ("slider", "adapter", "samples", *train.SHARED)
    return {"what": _WHAT, **train.groups_of((TrainConfig, SliderJob, KeptEvery), titles)}


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
    output = train.output_of(values, "slider", train.listener(namespace.json))
    done = train_slider(pipe, job, config, output, {"model": Path(values["model"]).name})
    return train.ended(done, config, namespace.json)
