"""The command ``train``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.config.config import TrainConfig
from ..training.engine.named_run import Output, Trained
from ..training.runs.events import Listener
from . import options as opt
from .models import DTYPES, open_model
from .options import Option

DESCRIPTION = """Train a concept on a Stable Diffusion model and save it as an adapter.

The pictures lie in a folder as name.jpg with name.txt (its caption) beside it, or in subfolders called
<repeats>_<name>; <TOK> in a caption stands for the token. name.mask.png beside a picture: white is learned.

Nothing is lost. A run has a name; the same command goes on from its last checkpoint, or says that it is
finished. Other settings under the same name become name-2. Ctrl-C stops after the step and saves.

  python -m spectral_core train --model sd15 --images pictures/vase --token '<vase>' --method spectral_a
  python -m spectral_core train --config vase.toml --steps 800 --extend
  python -m torch.distributed.run --nproc_per_node 2 -m spectral_core train … --processes 2"""

MODEL = Option(
    "model", "a diffusers folder or a .safetensors checkpoint (Stable Diffusion 1.x, 2.x, XL)", metavar="PATH"
)
_WHAT = [
    MODEL,
    Option("images", "folder with the concept's pictures and captions", metavar="DIR"),
    Option("token", "the concept's word, such as '<vase>'", metavar="WORD"),
    Option(
        "output",
        "folder for adapters; its files also say which columns are taken",
        metavar="DIR",
        default="adapters",
    ),
    Option("run_name", "names the run and the adapter (default: the token)", metavar="NAME"),
    Option("extend", "let a finished run go on to more steps: a new schedule", default=False),
]
_MACHINE = [
    Option("dtype", "of the model's weights in memory", choices=tuple(DTYPES), default="fp32"),
    Option("device", "cpu, cuda, cuda:1 (default: a GPU where there is one)", metavar="NAME"),
]
SHARED = ("optimiser", "noise", "gate", "memory", "run")  # groups of settings of every training
NEEDED = ("model", "images", "token")


def groups() -> dict[str, list[Option]]:
    """Title -> options, with their defaults."""
    from ..pipelines.job import Job

    titles = ("adapter", "pictures", "text encoder", "regularisation", "validation", *SHARED)
    return {"what": _WHAT, **groups_of((TrainConfig, Job, Output), titles)}


def groups_of(classes: Sequence[type[Any]], titles: Sequence[str]) -> dict[str, list[Option]]:
    """The classes' settings by group, with what there is to say about the machine."""
    found = {title: opt.from_settings(classes, title) for title in titles}
    return {title: found[title] + (_MACHINE if title == "memory" else []) for title in titles}


def add_parser(commands: Any) -> None:
    usage = "--model PATH --images DIR --token WORD"
    opt.add_command(commands, "train", "train a concept", usage, DESCRIPTION, groups(), run)


def run(namespace: argparse.Namespace) -> int:
    """The command; see :mod:`.main` for its exit codes."""
    from ..pipelines.job import Job
    from ..pipelines.train import train_adapter
    from ..training.runs import distributed

    values = opt.given(namespace, groups(), NEEDED)
    if values is None:
        return 2
    job, config = only(Job, values), only(TrainConfig, values)
    name = "".join(c for c in job.token if c.isalnum() or c in "-_") or "concept"
    with distributed.joined() as device:
        world = distributed.world(config.processes)
        pipe = open_model(values["model"], values.get("dtype", "fp32"), device or values.get("device"))
        output = output_of(values, name, listener(namespace.json) if world.is_main else None)
        done = train_adapter(pipe, job, config, output)
        return ended(done, config, namespace.json) if world.is_main else 0
    return 0


def output_of(values: Mapping[str, Any], name: str, told: Listener | None) -> Output:
    """Where the options say that a run is kept; ``name`` where they say none."""
    every = {key: values[key] for key in ("checkpoint_every", "sample_every") if key in values}
    folder, name = Path(values.get("output", "adapters")), values.get("run_name") or name
    return Output(folder, name, values.get("extend", False), told, **every)


def only(cls: type[Any], values: dict[str, Any]) -> Any:
    """The dataclass from those values that are its fields."""
    return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


def listener(as_json: bool) -> Listener:
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


def ended(done: Trained, config: TrainConfig, as_json: bool) -> int:
    """What came out, in a few lines; the exit code."""
    out = sys.stderr if as_json else sys.stdout
    steps = len(done.result.losses)
    if done.reused:
        print(f"{done.place.name} is finished already ({done.place.step} steps): {done.path}", file=out)
        return 0
    if done.result.stopped:
        print(f"stopped at step {steps} of {config.steps}; the same command goes on from there", file=out)
        print(f"what it has learned so far: {done.path}", file=out)
        return 130
    print(f"{done.path}: {done.adapter.parameter_count:,} parameters, {done.result.seconds:.0f} s", file=out)
    gates = done.result.gates
    if gates is not None and gates.frozen_rank:
        frozen, rows = gates.frozen_rank.values(), max(map(len, gates.mean_open.values()))
        print(
            f"gates: {sum(frozen) / len(frozen):.1f} of {rows} rows open on average once frozen, "
            f"{len(gates.always_open)} of {len(frozen)} layers always open",
            file=out,
        )
    return 0
