"""The command ``train``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import config as training
from ..training.config.config import TrainConfig
from . import options as opt
from .models import DTYPES, open_model
from .options import Option

if TYPE_CHECKING:
    from ..pipelines.job import Job
    from ..pipelines.train import Trained

DESCRIPTION = """Train a concept on a Stable Diffusion model and save it as an adapter.

The pictures lie in a folder as name.jpg with name.txt (its caption) beside it, or in subfolders called
<repeats>_<name>; <TOK> in a caption stands for the token. name.mask.png beside a picture: white is learned.

Nothing is lost. A run has a name; the same command goes on from its last checkpoint, or says that it is
finished. Other settings under the same name become name-2. Ctrl-C stops after the step and saves.

  python -m spectral_core train --model sd15 --images pictures/vase --token '<vase>' --method spectral_a
  python -m spectral_core train --config vase.toml --steps 800 --extend
  python -m torch.distributed.run --nproc_per_node 2 -m spectral_core train … --processes 2"""

_WHAT = [
    Option(
        "model",
        "a diffusers folder or a .safetensors checkpoint (Stable Diffusion 1.x, 2.x, XL)",
        metavar="PATH",
    ),
    Option("images", "folder with the concept's pictures and captions", metavar="DIR"),
    Option("token", "the concept's word, such as '<vase>'", metavar="WORD"),
    Option(
        "init_words",
        "known words that the new one starts from; empty: it is not made a new word",
        metavar="WORDS",
    ),
    Option(
        "prior_images", "pictures of the concept's class, so that the model keeps drawing them", metavar="DIR"
    ),
    Option(
        "output",
        "folder for adapters; its files also say which columns are taken",
        metavar="DIR",
        default="adapters",
    ),
    Option("run_name", "names the run and the adapter (default: the token)", metavar="NAME"),
    Option("extend", "let a finished run go on to more steps: a new schedule", default=False),
]
_ADAPTER = [
    Option("method", "what is trained", choices=("foura", "spectral_a", "spectral_r", "lora")),
    Option("rank", "size of the update; number of columns of the spectral methods", int, metavar="R"),
    Option("alpha", "of foura and lora; 0: equal to the rank, a scale of 1", float, metavar="A"),
    Option("transform", "of foura", choices=("dct", "dft", "none")),
    Option("gate", "of foura: which rows act is learned (adaptive) or not", choices=("adaptive", "none")),
    Option(
        "columns",
        "of the spectral methods, like 0-7; default: the lowest that no file of this model uses",
        opt.columns,
        metavar="LIST",
    ),
    Option("train_scale", "of the spectral methods: the singular values are trained, too"),
    Option(
        "targets",
        "layers of the denoiser: attention, attention+mlp, all-linear, all, a glob, re:…",
        metavar="NAMES",
    ),
    Option(
        "text_targets", "layers of the text encoders, likewise; empty: they are not trained", metavar="NAMES"
    ),
]
_DATA = [
    Option("size", "of the pictures in pixels, like 512 or 768x512", opt.size, metavar="PIXELS"),
    Option("buckets", "pictures keep their proportions, at sizes of that area"),
    Option("batch_size", "pictures per batch (and process)", int, metavar="N"),
    Option("accumulation", "batches per step", int, metavar="N"),
    Option("caption_dropout", "share of pictures that train without their caption", float, metavar="SHARE"),
    Option("prior_weight", "weight of the loss on --prior-images", float, metavar="W"),
    Option("cache", "keep latents and captions on disk"),
]
_OPTIMISER = [
    Option("steps", "optimiser steps", int, metavar="N"),
    Option(
        "learning_rate",
        "0: the method's default ("
        + ", ".join(f"{m} {r:g}" for m, r in training.DEFAULT_LEARNING_RATES.items())
        + ")",
        float,
        metavar="RATE",
    ),
    Option("text_learning_rate", "of the text encoders; 0: half of the other", float, metavar="RATE"),
    Option("token_learning_rate", "of the new word; 0: ten times the adapter's", float, metavar="RATE"),
    Option("optimiser", "schedulefree and prodigy need a package of their own", choices=training.OPTIMISERS),
    Option("betas", "of the optimiser; sgd takes the first as momentum", opt.pair, metavar="B1,B2"),
    Option("weight_decay", "not applied to gates and words", float, metavar="W"),
    Option("schedule", "of the learning rate", choices=training.SCHEDULES),
    Option("warmup", "steps until the full rate", int, metavar="N"),
    Option("gradient_clip", "largest norm of the gradients; 0: none", float, metavar="NORM"),
    Option(
        "ema", "decay of averaged parameters, which the adapter then holds; 0: none", float, metavar="DECAY"
    ),
    Option(
        "explosion",
        "stop where the smoothed loss is this many times its first level; 0: never",
        float,
        metavar="X",
    ),
    Option("seed", "of everything random", int, metavar="N"),
]
_NOISE = [
    Option("timesteps", "distribution of the noise levels", choices=training.TIMESTEPS),
    Option("timestep_mean", "of logit-normal", float, metavar="X"),
    Option("timestep_std", "of logit-normal", float, metavar="X"),
    Option("weighting", "of the loss by noise level", choices=training.WEIGHTINGS),
    Option("snr_gamma", "of min-snr", float, metavar="X"),
]
_GATES = [
    Option("target_open", "wanted share of open gates; not given: no penalty", float, metavar="SHARE"),
    Option("gate_penalty", "weight of that", float, metavar="W"),
    Option("freeze_gates", "fix the gates at the end: the adapter can then be merged"),
]
_MACHINE = [
    Option(
        "precision", "of the model's computations; what is trained stays float32", choices=training.PRECISIONS
    ),
    Option("dtype", "of the model's weights in memory", choices=tuple(DTYPES), default="fp32"),
    Option(
        "checkpointing",
        "compute activations again instead of keeping them: less memory, slower",
        choices=training.CHECKPOINTING,
    ),
    Option("device", "cpu, cuda, cuda:1 (default: a GPU where there is one)", metavar="NAME"),
    Option(
        "processes", "refuse to train with any other number of processes; 0: as started", int, metavar="N"
    ),
]
_SEEN = [
    Option(
        "checkpoint_every",
        "steps between checkpoints; one also comes at the end",
        int,
        metavar="N",
        default=100,
    ),
    Option("sample_every", "steps between sample pictures; 0: none", int, metavar="N", default=0),
    Option(
        "sample_prompts", "what the samples show; may be given several times", many=True, metavar="PROMPT"
    ),
]
NEEDED = ("model", "images", "token")


def groups() -> dict[str, list[Option]]:
    """Title -> options, with their defaults."""
    from ..pipelines.job import Job

    job, config = Job, TrainConfig
    return {
        "what": opt.with_defaults(_WHAT, job),
        "adapter": opt.with_defaults(_ADAPTER, job),
        "data": opt.with_defaults(opt.with_defaults(_DATA, job), config),
        "optimiser": opt.with_defaults(_OPTIMISER, config),
        "noise": opt.with_defaults(_NOISE, config),
        "gates": opt.with_defaults(_GATES, config),
        "machine": opt.with_defaults(_MACHINE, config),
        "checkpoints and samples": opt.with_defaults(_SEEN, job),
    }


def add_parser(commands: Any) -> None:
    usage = "--model PATH --images DIR --token WORD"
    opt.add_command(commands, "train", "train a concept", usage, DESCRIPTION, groups(), run)


def run(namespace: argparse.Namespace) -> int:
    """The command; see :mod:`.main` for its exit codes."""
    from ..pipelines.job import Job
    from ..pipelines.train import Output, train_adapter
    from ..training.runs import distributed

    values = opt.given(namespace, groups(), NEEDED)
    if values is None:
        return 2
    job, config = only(Job, values), only(TrainConfig, values)
    name = values.get("run_name") or "".join(c for c in job.token if c.isalnum() or c in "-_") or "concept"
    with distributed.joined() as device:
        world = distributed.world(config.processes)
        pipe = open_model(values["model"], values.get("dtype", "fp32"), device or values.get("device"))
        told = listener(namespace.json) if world.is_main else None
        output = Output(
            Path(values.get("output", "adapters")),
            name,
            values.get("checkpoint_every", 100),
            values.get("sample_every", 0),
            values.get("extend", False),
            told,
        )
        done = train_adapter(pipe, job, config, output)
        if world.is_main:
            _say_end(done, job, config, namespace.json)
    return 130 if done.result.stopped else 0


def only(cls: type[Any], values: dict[str, Any]) -> Any:
    """The dataclass from those values that are its fields."""
    return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


def listener(as_json: bool) -> Callable[[dict[str, Any]], None]:
    """Shows a run's events: a bar, or every event as one JSON line."""
    if as_json:
        return lambda event: print(json.dumps(event), flush=True)
    from tqdm import tqdm

    bar: tqdm[Any] | None = None

    def listen(event: dict[str, Any]) -> None:
        nonlocal bar
        kind = event["event"]
        if kind in ("start", "resume"):
            bar = tqdm(total=event["steps"], initial=event["step"], unit="step", dynamic_ncols=True)
        elif kind == "step" and bar is not None:
            shown = {"loss": f"{event['smoothed_loss']:.4f}", "lr": f"{event['learning_rate']:.2g}"}
            bar.set_postfix(shown, refresh=False)
            bar.update(event["step"] - bar.n)
        elif kind in ("warning", "error"):
            tqdm.write(f"{kind}: {event['text']}", file=sys.stderr)
        if kind in ("finished", "stopped", "error") and bar is not None:
            bar.close()

    return listen


def _say_end(done: Trained, job: Job, config: TrainConfig, as_json: bool) -> None:
    """What came out, in a few lines."""
    out = sys.stderr if as_json else sys.stdout
    steps = done.place.step if done.reused else len(done.result.losses)
    if done.reused:
        print(f"{done.place.name} is finished already ({steps} steps): {done.path}", file=out)
        return
    if done.result.stopped:
        print(f"stopped at step {steps} of {config.steps}; the same command goes on from there", file=out)
        print(f"what it has learned so far: {done.path}", file=out)
        return
    print(f"{done.path}: {done.adapter.parameter_count:,} parameters, {done.result.seconds:.0f} s", file=out)
    gates = done.result.gates
    if gates is not None and gates.mean_open:
        frozen = [gates.frozen_rank(name) for name in gates.mean_open]
        print(
            f"gates: {sum(frozen) / len(frozen):.1f} of {job.rank} rows open on average once frozen, "
            f"{len(gates.dead)} layers closed, {len(gates.always_open)} always open",
            file=out,
        )
