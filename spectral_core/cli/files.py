"""The commands that work on files alone: ``export``, ``info``, and :mod:`.fuse`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..analysis.spectra import summary
from ..files.container import open_safely
from ..files.lora_export import export_lora
from ..training.runs import checkpoint
from . import fuse
from .models import DTYPES, open_adapter

EXPORT = """Write an adapter as an ordinary LoRA file.

kohya names load in ComfyUI, Automatic1111, Forge and diffusers; diffusers names in diffusers. Exact for every
method but adaptive gates, which become their frozen masks; what that loses is printed.

  python -m spectral_core export vase.safetensors --output vase_lora.safetensors"""

INFO = """Say what a file is: an adapter, a LoRA file or a checkpoint of a training."""


def add_parsers(commands: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    fuse.add_parser(commands)
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
