"""The commands that work on files alone: ``export``, ``info``, and :mod:`.fuse`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..analysis.spectra import summary
from ..errors import SpectralAdapterError
from ..files.adapter_file import save
from ..files.container import open_safely
from ..files.cover import copy_cover
from ..files.lora_export import export_lora
from ..fusion import recompress
from ..names.unet_blocks import UNetLayout
from ..training.runs import checkpoint
from . import fuse
from .models import DTYPES, open_adapter, open_model

EXPORT = """Write an adapter as an ordinary LoRA file.

kohya names load in ComfyUI, Automatic1111, Forge and diffusers; diffusers names in diffusers. Exact for every
method but adaptive gates, which become their frozen masks; what that loses is printed. Models that are not
built like Stable Diffusion have their blocks named by number: give such a --model (the embedded one is
known).

  python -m spectral_core export vase.safetensors --output vase_lora.safetensors"""

RESIZE = """Write an adapter or LoRA file at a smaller rank.

Every layer gets the nearest update of that rank (its largest singular directions), or the smallest rank
within a relative error, and what that loses is printed, layer by layer with --layers. Adaptive gates become
their frozen masks first.

  python -m spectral_core resize big_lora.safetensors --rank 16 --output small.safetensors
  python -m spectral_core resize big_lora.safetensors --error 0.05 --output small.safetensors"""

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
    build.add_argument("--model", metavar="PATH", help="the adapter's own model, for its block numbers")
    build.add_argument(
        "--words", action="store_true", help="trained words too, which Automatic1111 reads (kohya names)"
    )
    build.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    build.set_defaults(run=run_export)

    build = commands.add_parser("resize", help="to a smaller rank", description=RESIZE, formatter_class=raw)
    build.add_argument("adapter", type=Path, metavar="FILE")
    build.add_argument("--output", "-o", type=Path, required=True, metavar="FILE")
    build.add_argument("--rank", type=int, metavar="R", help="of every layer at most")
    build.add_argument("--error", type=float, metavar="E", help="relative, of every layer, like 0.05")
    build.add_argument("--layers", action="store_true", help="print each layer's rank and error")
    build.add_argument("--dtype", choices=tuple(DTYPES), default="fp16", help="(default: fp16)")
    build.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    build.set_defaults(run=run_resize)

    build = commands.add_parser("info", help="what a file is", description=INFO, formatter_class=raw)
    build.add_argument("files", nargs="+", type=Path, metavar="FILE")
    build.add_argument("--json", action="store_true", help="as JSON")
    build.set_defaults(run=run_info)


def run_export(options: argparse.Namespace) -> int:
    layout = None
    if options.model is not None:
        unet = getattr(open_model(options.model, "fp32", "cpu"), "unet", None)
        layout = None if unet is None else UNetLayout.from_config(unet.config)
    if options.words and options.naming != "kohya":
        raise SpectralAdapterError("--words: only kohya's names have a place for them")
    report = export_lora(
        open_adapter(options.adapter),
        options.output,
        options.naming,
        DTYPES[options.dtype],
        overwrite=options.overwrite,
        drop_schedule=options.drop_schedule,
        layout=layout,
        words=options.words,
    )
    print(report)
    copy_cover(options.adapter, options.output)
    return 0


def run_resize(options: argparse.Namespace) -> int:
    small = recompress(open_adapter(options.adapter), options.rank, options.error)
    path = options.output
    save(small.adapter, path, dtype=DTYPES[options.dtype], overwrite=options.overwrite)
    sizes = [file.stat().st_size / 1e6 for file in (options.adapter, path)]
    print(f"{path.name}: {sizes[0]:.1f} MB -> {sizes[1]:.1f} MB; {small.report.text}")
    copy_cover(options.adapter, path)
    if options.layers:
        for row in small.report.layers:
            print(f"  {row.name}: rank {row.rank_before} -> {row.rank_after}, error {row.error:.2e}")
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
