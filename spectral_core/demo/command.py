"""The main job: train two concepts with two methods, save, reload, apply, fuse, draw, and report every
number.

Run it with ``python dev.py demo``. Without arguments it uses the embedded model and two characters drawn by
code; ``--images DIR --token NAME`` trains on your own pictures, ``--model PATH`` on your own Stable
Diffusion.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SpectralAdapterError
from ..pipelines.loading import native_size
from .concepts import DemoConcept, fill_up, user_concepts
from .report import write_report
from .run import DemoSettings, default_settings, generate_rows, open_model, train_all


def parser(prog: str = "dev.py demo", add_help: bool = True) -> argparse.ArgumentParser:
    build = argparse.ArgumentParser(
        prog=prog,
        add_help=add_help,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python dev.py demo --images pictures/vase --token '<vase>'",
    )
    build.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with pictures (name.jpg) and captions (name.txt); give it twice to fuse two concepts "
        "of your own",
    )
    build.add_argument(
        "--token",
        action="append",
        default=[],
        metavar="NAME",
        help="the new word for the pictures, such as '<vase>'; one per --images",
    )
    build.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="WORDS",
        help="known words the new one starts from (default: object); one per --images",
    )
    build.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a diffusers folder or .safetensors checkpoint of Stable Diffusion 1.x, 2.x or XL "
        "(default: the embedded model)",
    )
    build.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="where everything is written (default: demo_output)",
    )
    build.add_argument("--steps", type=int, metavar="N", help="training steps per adapter")
    build.add_argument(
        "--quick",
        action="store_true",
        help="two training steps and few, coarse pictures: whether everything works here, in a minute",
    )
    build.add_argument(
        "--rank", type=int, metavar="R", help="rank of FouRA and number of columns of Spectral A"
    )
    build.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the pictures (default: the model's own)"
    )
    build.add_argument("--seed", type=int, default=0, metavar="N")
    build.add_argument(
        "--fresh",
        action="store_true",
        help="train again, under further names, where adapters with the same settings are there",
    )
    return build


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 with one clear line when the input cannot be used; 130 when interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns on import, before one can ask
    options = parser().parse_args(arguments)
    try:
        run(options)
    except SpectralAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def add_parser(commands: Any) -> None:
    """``demo`` among the commands."""
    build = commands.add_parser(
        "demo",
        help="train, apply, fuse and draw two concepts",
        description=__doc__,
        parents=[parser(add_help=False)],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    run(options)
    return 0


def run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    concepts = user_concepts(options)
    pipe = open_model(options.model)
    if options.model is None:
        concepts = fill_up(concepts, options.output, native_size(pipe)[0])
    settings: DemoSettings = default_settings(pipe, options)
    options.output.mkdir(parents=True, exist_ok=True)
    trained = train_all(pipe, concepts, settings, options.output, fresh=options.fresh)
    rows = generate_rows(pipe, concepts, trained, settings)
    write_report(options.output, concepts, trained, rows, settings, started)


__all__ = ["DemoConcept", "main", "parser", "run"]

if __name__ == "__main__":
    sys.exit(main())
