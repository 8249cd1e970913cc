"""The command ``distil``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..fusion import fuse
from ..fusion.rounds import ROUNDS, fuse_in_rounds
from ..fusion.sources import labels_of
from ..statistics import prompts as concept_prompts
from ..training.config.adapter import KeptEvery
from ..training.config.config import TrainConfig
from . import options as opt
from . import train
from .models import open_adapter, open_model
from .options import Option
from .pictures import adapter_of

DESCRIPTION = """Distil several adapters into one: fuse them, and train the result to draw what each draws.

It needs no pictures: samples are drawn with each adapter under prompts with its own words, and the fused
adapter learns to predict there what that adapter predicts; under --preserve it learns to leave the model as
it is. Keeps more of every concept than any fusion alone, for some minutes of training.

  python -m spectral_core distil --model sd15 --adapter cat.safetensors --adapter dog.safetensors:0.8 \\
    --output adapters --run-name both

Nothing is lost: the same command goes on from its last checkpoint."""

_WHAT = [
    train.MODEL,
    Option(
        "adapter", "a concept, with its strength behind a colon; several times", many=True, metavar="FILE[:S]"
    ),
    Option("fused", "begin with this fusion of them (default: a closed-form one is made)", metavar="FILE"),
    Option("rank", "of the fusion that is made (default: all ranks together)", int, metavar="R"),
    Option(
        "prompts",
        "of one adapter, in their order, several with | between them; '' or none: from its trigger words",
        many=True,
        metavar="TEXT",
    ),
    Option(
        "preserve",
        "a prompt under which nothing shall change; several times; '-' for none (default: a list of "
        "everyday ones)",
        many=True,
        metavar="PROMPT",
    ),
    Option("output", "folder for adapters", metavar="DIR", default="adapters"),
    Option("run_name", "names the run and the adapter", metavar="NAME", default="distilled"),
]
NEEDED = ("model", "adapter")


def groups() -> dict[str, list[Option]]:
    """Title -> options, with their defaults."""
    from ..pipelines.distil import DistilJob
    from ..training.objectives.distillation import DISTIL

    ours = {f.name: getattr(DISTIL, f.name) for f in fields(DISTIL)}
    rate = "0: chosen from the size of what was fused"

    def with_ours(option: Option) -> Option:
        said = rate if option.name == "learning_rate" else option.help
        return replace(option, default=ours.get(option.name, option.default), help=said)

    titles = ("samples", "regularisation", "optimiser", "noise", "memory", "run")
    found = train.groups_of((TrainConfig, DistilJob, KeptEvery), titles)
    return {
        "what": _WHAT,
        **{title: [with_ours(o) for o in of if o.name != "prior_weight"] for title, of in found.items()},
    }


def add_parser(commands: Any) -> None:
    usage = "--model PATH --adapter FILE --adapter FILE"
    opt.add_command(
        commands, "distil", "several adapters into one, trained", usage, DESCRIPTION, groups(), run
    )


def run(namespace: argparse.Namespace) -> int:
    """The command; see :mod:`.main` for its exit codes."""
    from ..pipelines.distil import DistilJob, distil
    from ..training.objectives.distillation import DISTIL

    values = opt.given(namespace, groups(), NEEDED)
    if values is None:
        return 2
    if "preserve" in values:
        values["preserve"] = () if values["preserve"] == ["-"] else tuple(values["preserve"])
    job = train.only(DistilJob, values)
    config = replace(DISTIL, **{k: v for k, v in values.items() if k in TrainConfig.__dataclass_fields__})
    pipe = open_model(values["model"], values.get("dtype", "fp32"), values.get("device"))
    adapters = [adapter_of(text, pipe) for text in values["adapter"]]
    labels = labels_of(adapters)
    prompts = concept_prompts.read("\n".join(values.get("prompts", [])), labels, adapters)
    concept_prompts.require(
        [p or not a.strength for p, a in zip(prompts, adapters, strict=True)], labels, "--prompts"
    )
    for label, texts in zip(labels, prompts, strict=True):
        print(f"{label} as: {', '.join(texts)}")
    given = None if "fused" not in values else open_adapter(Path(values["fused"]), pipe)
    if given is not None and "rank" in values:
        raise SpectralAdapterError("--fused and --rank: the rank is that of the fused file; give one of them")
    output = train.output_of(values, "distilled", train.listener(namespace.json))
    known = {"model": Path(values["model"]).name, "rank": values.get("rank")}
    start = given or partial(_closed_form, pipe, adapters, prompts, job, config, values.get("rank"))
    drawn_for = sum(bool(a.strength) for a in adapters) + bool(job.preserve)
    with samples_bar(drawn_for * job.samples, namespace.json) as drawn:
        done = distil(pipe, start, adapters, prompts, job, config, output, known, drawn)
    return train.ended(done, config, namespace.json)


@contextmanager
def samples_bar(total: int, silent: bool) -> Iterator[Callable[[int], None]]:
    """A bar of the samples that are drawn before the training; gone when all of them are."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc="samples", unit="picture", disable=silent, leave=False, dynamic_ncols=True)

    def drawn(count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    try:
        yield drawn
    finally:
        bar.close()


def _closed_form(
    pipe: Any,
    adapters: Sequence[Adapter],
    prompts: Sequence[Sequence[str]],
    job: Any,
    config: TrainConfig,
    rank: int | None,
) -> Adapter:
    """What the training begins with."""
    from ..pipelines.statistics import Looking, concept_statistics

    looking = Looking(guidance=job.guidance, size=job.size, seed=config.seed, rounds=ROUNDS)
    signs = [(a.strength > 0) - (a.strength < 0) for a in adapters]
    done = fuse_in_rounds(
        lambda under: concept_statistics(pipe, adapters, prompts, looking, signs, under=under),
        lambda seen: fuse(adapters, "closed-form", rank=rank, statistics=seen),
    )
    print(done.fused.report.text)
    return done.fused.adapter
