"""The command ``fuse``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..analysis import overlap_picture as overlap_sheet
from ..analysis.interference_report import Interference
from ..errors import SpectralAdapterError
from ..files import writing as safewrite
from ..files.adapter_file import save
from ..fusion import FUSIONS, Fused, fuse
from ..fusion.rounds import ROUNDS, ByConcept, Look, check_rounds, fuse_in_rounds
from ..fusion.sources import labels_of
from ..plots import save_picture
from ..statistics import file as statistics_file
from ..statistics import prompts as concept_prompts
from ..training.config import reading
from ..whole_file import write_whole
from .models import DTYPES, open_adapter, open_model

DESCRIPTION = """Fuse adapters (and ordinary LoRA files) into one.

sum adds their updates, which is what stacking does; average divides that by their number; spectral adds what
was learned in singular columns, exactly, where the adapters were trained on the same model; orthogonal adds
adapters that were trained in orthogonal rows; subspaces lets each act in the directions that only it reads.

closed-form, closed-form-rank and gradient keep what each concept does to its own inputs. For these a few
steps are drawn with --model under each concept, and --rounds − 1 times more under what was fused so far, or
--statistics of an earlier run are read.

  python -m spectral_core fuse cat.safetensors dog.safetensors --weights 1 0.8 --output both.safetensors
  python -m spectral_core fuse cat.safetensors dog.safetensors --method closed-form --model sd15 \\
    --output both.safetensors
"""


def add_parser(commands: Any) -> None:
    build = commands.add_parser(
        "fuse",
        help="several adapters into one",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("adapters", nargs="+", type=Path, metavar="FILE")
    build.add_argument("--output", "-o", type=Path, required=True, metavar="FILE")
    build.add_argument("--method", choices=tuple(FUSIONS), default="sum", help="(default: sum)")
    build.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each file (default: 1)")
    build.add_argument("--rank", type=int, metavar="R", help="re-compress every layer to this rank")
    build.add_argument(
        "--error", type=float, metavar="E", help="re-compress to this relative error, like 0.01"
    )
    build.add_argument("--freeze-gates", action="store_true", help="adaptive gates become their masks")
    build.add_argument("--name", default="", help="of the result (default: the file's)")
    build.add_argument("--overwrite", action="store_true", help="replace files where they exist")
    build.add_argument(
        "--report", type=Path, metavar="FILE", help="write everything that was measured, as JSON"
    )
    build.add_argument("--picture", type=Path, metavar="FILE", help="draw overlap, bleed and what is kept")
    _add_statistics(build.add_argument_group("what the concepts do to their inputs"))
    build.set_defaults(run=run)


def _add_statistics(group: Any) -> None:
    group.add_argument(
        "--model", metavar="PATH", help="draw with it: a diffusers folder or a .safetensors checkpoint"
    )
    group.add_argument(
        "--prompts",
        action="append",
        metavar="TEXT",
        help="of one file, in their order, several with | between them; '' or none: from its trigger words",
    )
    group.add_argument("--sample-steps", type=int, default=4, metavar="N", help="of each prompt (default: 4)")
    group.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        metavar="N",
        help=f"looks: the first at each concept alone, later ones at what was fused (default: {ROUNDS})",
    )
    group.add_argument("--guidance", type=float, default=4.0, metavar="G", help="(default: 4)")
    group.add_argument("--size", type=reading.size, metavar="PIXELS", help="(default: the model's own)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    group.add_argument(
        "--space",
        choices=("auto", "exact", "rank"),
        default="auto",
        help="in full, or in the adapters' own rows, which takes less memory (default: what fits)",
    )
    group.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the model (default: fp32)")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU where there is one)")
    group.add_argument(
        "--statistics", nargs="+", type=Path, metavar="FILE", help="read them instead, one file for each"
    )
    group.add_argument(
        "--save-statistics", type=Path, metavar="DIR", help="keep them for later, one file for each"
    )


def run(options: argparse.Namespace) -> int:
    """The command; see :mod:`.main` for its exit codes."""
    check_rounds(options.rounds)
    safewrite.check_target(options.output, options.overwrite)
    pipe = None if options.model is None else open_model(options.model, options.dtype, options.device)
    adapters = [open_adapter(path, pipe, lazy=True) for path in options.adapters]
    weights = options.weights or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise SpectralAdapterError(f"{len(weights)} --weights for {len(adapters)} files: give one for each")
    fused, statistics = _fused(options, pipe, adapters, weights)
    save(fused.adapter, options.output, overwrite=options.overwrite)
    print(fused.report.text)
    before = overlap_sheet.examine(adapters, weights, statistics) if len(adapters) > 1 else None
    for warning in before.warnings if before is not None else ():
        print(f"before: {warning}")
    _write(options, adapters, before, fused.report)
    print(f"written to {options.output}")
    return 0


def _fused(
    options: argparse.Namespace, pipe: Any, adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Fused, ByConcept | None]:
    """The result, and the statistics where there are some: from files, or drawn with the model."""

    def once(statistics: ByConcept | None) -> Fused:
        return fuse(
            adapters,
            options.method,
            weights,
            options.rank,
            options.error,
            options.freeze_gates,
            options.name or options.output.stem,
            statistics=statistics,
        )

    if options.statistics is not None:
        if pipe is not None:
            raise SpectralAdapterError("--model and --statistics: give one of them")
        read = [statistics_file.load(path) for path in options.statistics]
        return once(read), read
    needed = FUSIONS[options.method].needs_statistics
    if pipe is None:
        if needed:
            raise SpectralAdapterError(
                f"--method {options.method} looks at what each concept does: give the --model that the "
                "adapters are for, or --statistics of an earlier run"
            )
        return once(None), None
    rounds = options.rounds if needed else 1
    done = fuse_in_rounds(_looker(options, pipe, adapters, weights, rounds), once, rounds)
    _save_statistics(options, done.statistics)
    return done.fused, done.statistics


def _looker(
    options: argparse.Namespace,
    pipe: Any,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rounds: int,
) -> Look:
    """Draws every concept with the model, as the options say."""
    from ..pipelines.statistics import Looking, concept_statistics

    labels = labels_of(adapters)
    prompts = concept_prompts.read("\n".join(options.prompts or []), labels, adapters)
    signs = [(w * a.strength > 0) - (w * a.strength < 0) for w, a in zip(weights, adapters, strict=True)]
    wanted = [found or (not sign) for found, sign in zip(prompts, signs, strict=True)]
    concept_prompts.require(wanted, labels, "--prompts")
    space = options.space
    if options.method == "closed-form-rank" and space == "auto":
        space = "rank"
    looking = Looking(
        options.sample_steps, options.guidance, options.size, options.seed, space, rounds=rounds
    )
    for label, texts in zip(labels, prompts, strict=True):
        print(f"{label} as: {', '.join(texts)}")

    def look(under: Adapter | None) -> ByConcept:
        return concept_statistics(pipe, adapters, prompts, looking, signs, under=under)

    return look


def _save_statistics(options: argparse.Namespace, found: ByConcept) -> None:
    if options.save_statistics is None:
        return
    try:
        options.save_statistics.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpectralAdapterError(
            f"{options.save_statistics}: cannot be made ({error.strerror or error})"
        ) from error
    for number, (path, statistics) in enumerate(zip(options.adapters, found, strict=True), 1):
        target = options.save_statistics / f"{number:02d}-{path.stem}.safetensors"
        if statistics:
            print(f"statistics: {statistics_file.save(statistics, target, options.overwrite)}")


def _write(
    options: argparse.Namespace, adapters: Sequence[Adapter], before: Interference | None, report: Any
) -> None:
    """What was measured as JSON, and the sheet, where they are asked for."""
    if options.report is not None:
        found = {"before": before and before.to_json(), "fusion": report.to_json()}
        try:
            write_whole(options.report, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise SpectralAdapterError(
                f"{options.report}: cannot be written ({error.strerror or error})"
            ) from error
    if options.picture is not None and before is not None:
        save_picture(overlap_sheet.draw(adapters, before, report), options.picture)
