"""The commands that work on files alone: ``fuse``, ``export``, ``info``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..analysis import summary
from ..errors import SpectralAdapterError
from ..fileformat import save
from ..fusion import FUSIONS, fuse
from ..lora_file import export_lora
from ..safefile import open_safely
from ..statistics_file import load
from ..training import checkpoint
from .models import DTYPES, open_adapter

FUSE = """Fuse adapters (and ordinary LoRA files) into one.

sum adds their updates, which is what stacking does; average divides that by their number; spectral adds what
was learned in singular columns, exactly, where the adapters were trained on the same model; orthogonal adds
adapters that were trained in orthogonal rows. The others keep what each concept does to its own inputs.

  python -m spectral_core fuse cat.safetensors dog.safetensors --weights 1 0.8 --output both.safetensors"""

EXPORT = """Write an adapter as an ordinary LoRA file.

kohya names load in ComfyUI, Automatic1111, Forge and diffusers; diffusers names in diffusers. Exact for every
method but adaptive gates, which become their frozen masks; what that loses is printed.

  python -m spectral_core export vase.safetensors --output vase_lora.safetensors"""

INFO = """Say what a file is: an adapter, a LoRA file or a checkpoint of a training."""


def add_parsers(commands: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    build = commands.add_parser(
        "fuse", help="several adapters into one", description=FUSE, formatter_class=raw
    )
    build.add_argument("adapters", nargs="+", type=Path, metavar="FILE")
    build.add_argument("--output", "-o", type=Path, required=True, metavar="FILE")
    build.add_argument("--method", choices=tuple(FUSIONS), default="sum", help="(default: sum)")
    build.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each file (default: 1)")
    build.add_argument(
        "--statistics",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="of the layers' inputs under each adapter, in their order; closed-form and gradient need them",
    )
    build.add_argument("--rank", type=int, metavar="R", help="re-compress every layer to this rank")
    build.add_argument(
        "--error", type=float, metavar="E", help="re-compress to this relative error, like 0.01"
    )
    build.add_argument("--freeze-gates", action="store_true", help="adaptive gates become their masks")
    build.add_argument("--name", default="", help="of the result (default: the file's)")
    build.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    build.set_defaults(run=run_fuse)

    build = commands.add_parser("export", help="to a LoRA file", description=EXPORT, formatter_class=raw)
    build.add_argument("adapter", type=Path, metavar="FILE")
    build.add_argument("--output", "-o", type=Path, required=True, metavar="FILE")
    build.add_argument("--naming", choices=("kohya", "diffusers"), default="kohya", help="(default: kohya)")
    build.add_argument("--dtype", choices=tuple(DTYPES), default="fp16", help="(default: fp16)")
    build.add_argument("--drop-schedule", action="store_true", help="export without its strength schedule")
    build.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    build.set_defaults(run=run_export)

    build = commands.add_parser("info", help="what a file is", description=INFO, formatter_class=raw)
    build.add_argument("files", nargs="+", type=Path, metavar="FILE")
    build.add_argument("--json", action="store_true", help="as JSON")
    build.set_defaults(run=run_info)


def run_fuse(options: argparse.Namespace) -> int:
    adapters = [open_adapter(path) for path in options.adapters]
    if options.weights is not None and len(options.weights) != len(adapters):
        raise SpectralAdapterError(
            f"{len(options.weights)} --weights for {len(adapters)} files: give one for each"
        )
    fused = fuse(
        adapters,
        options.method,
        options.weights,
        options.rank,
        options.error,
        options.freeze_gates,
        options.name or options.output.stem,
        statistics=None if options.statistics is None else [load(path) for path in options.statistics],
    )
    save(fused.adapter, options.output, overwrite=options.overwrite)
    print(fused.report.text)
    print(f"written to {options.output}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    report = export_lora(
        open_adapter(options.adapter),
        options.output,
        options.naming,
        DTYPES[options.dtype],
        overwrite=options.overwrite,
        drop_schedule=options.drop_schedule,
    )
    print(report)
    return 0


def run_info(options: argparse.Namespace) -> int:
    described = {str(path): describe(path) for path in options.files}
    if options.json:
        print(json.dumps(described, indent=1))
        return 0
    for path, values in described.items():
        print(path)
        for key, value in values.items():
            if value not in (None, "", [], {}):
                print(f"  {key}: {json.dumps(value) if isinstance(value, list | dict) else value}")
    return 0


def describe(path: Path) -> dict[str, Any]:
    """What a file is, JSON-able."""
    if checkpoint.VERSION_KEY in open_safely(path).metadata:
        values = checkpoint.read(path).values
        identity = values["identity"]
        shown = {"step": values["step"], "of": values["steps"], "seconds": round(values["seconds"], 1)}
        return {
            "kind": "checkpoint of a training",
            "method": identity["method"],
            **shown,
            **identity["config"],
        }
    adapter = open_adapter(path)
    found = summary(adapter)
    training = dict(adapter.provenance.training)
    return {"kind": "adapter", "bytes": path.stat().st_size, **found, "training": training}
