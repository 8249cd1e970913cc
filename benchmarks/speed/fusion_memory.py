"""Ten adapters fused from files: the most memory that takes, on layers of SDXL's sizes.

    python -m benchmarks.speed.fusion_memory [--blocks 70] [--adapters 10] [--rank 8] [--threads N]

Writes synthetic adapters for every linear layer of SDXL's transformer blocks (70 of them, 700 layers) into a
temporary folder, and fuses them in a process of its own for every method (those with statistics a few layers
of each kind), with the files read tensor by tensor, and for the sums also whole. Statistics are made up when
they are asked for, as a file's are read. ``peak`` is the most memory in use less what was in use before the
files were opened, from the system's own count.

Target: the peak of the lazy reading is at most the result (nothing of it where the terms are kept as they
are: saving reads them one after the other), ten times what the largest layer holds of an adapter and of
statistics in float32, five times the largest moment in float64, and 64 MiB. A peak of 0 is one below what
the start of Python and its libraries had needed before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Target, finish
from spectral_core.adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from spectral_core.files.adapter_file import load, save
from spectral_core.fusion import FUSIONS, fuse
from spectral_core.maths.layers import LayerShape
from spectral_core.methods import LoRAConfig
from spectral_core.statistics.moments import Statistics

BLOCKS = (("down_blocks.1", 2, 2, 640), ("down_blocks.2", 2, 10, 1280), ("mid_block", 1, 10, 1280))
BLOCKS += (("up_blocks.0", 3, 10, 1280), ("up_blocks.1", 3, 2, 640))
TEXT = 2048
CASES = {"sum": (0, 1.0), "average": (0, 1.0), "sum, to rank 16": (16, 1.0), "closed-form-rank": (0, 0.02)}
CASES |= {"closed-form": (0, 0.02)}  # method -> rank, share of the layers: this wide they take minutes
SLACK = 64 << 20


def layers(blocks: int) -> dict[str, LayerShape]:
    """Names and shapes of the linear layers of SDXL's first transformer blocks, the widest ones first."""
    found: dict[str, LayerShape] = {}
    names = [
        (f"unet.{place}.attentions.{a}.transformer_blocks.{b}", width)
        for place, attentions, deep, width in sorted(BLOCKS, key=lambda block: -block[3])
        for a in range(attentions)
        for b in range(deep)
    ]
    for name, n in names[:blocks]:
        for attention, source in (("attn1", n), ("attn2", TEXT)):
            inputs = {"to_q": n, "to_k": source, "to_v": source, "to_out.0": n}
            found |= {f"{name}.{attention}.{leaf}": LayerShape(n, width) for leaf, width in inputs.items()}
        found[f"{name}.ff.net.0.proj"] = LayerShape(8 * n, n)
        found[f"{name}.ff.net.2"] = LayerShape(n, 4 * n)
    return found


def write_adapters(folder: Path, count: int, rank: int, blocks: int) -> None:
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        made = {}
        for name, shape in layers(blocks).items():
            params = {
                "down": torch.randn(rank, shape.in_features, generator=generator),
                "up": torch.randn(shape.out_features, rank, generator=generator),
            }
            made[name] = AdapterLayer(shape, (Term(LoRAConfig(rank), params),))
        save(Adapter(made, Provenance(name=f"concept {number}")), folder / f"{number}.safetensors")


class MadeUp(Mapping[str, Statistics]):
    """Statistics of white noise, made when they are asked for."""

    def __init__(self, shapes: Mapping[str, LayerShape], seed: int) -> None:
        self._shapes, self._seed = shapes, seed

    def __getitem__(self, name: str) -> Statistics:
        generator = torch.Generator().manual_seed(self._seed)
        tokens = torch.randn(64, self._shapes[name].fan_in, generator=generator)
        moment = tokens.mT @ tokens / 64
        moment.diagonal().add_(0.1)
        return Statistics(moment, 4096)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def measure(folder: Path, case: str, lazy: bool, threads: int) -> dict[str, Any]:
    """One fusion in this process; bytes and seconds."""
    torch.set_num_threads(threads)
    torch.linalg.cholesky(torch.eye(64, dtype=torch.float64))  # libraries are loaded before
    rank, share = CASES[case]
    files = sorted(folder.glob("*.safetensors"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    adapters = [load(file, lazy=lazy) for file in files]
    if share < 1:
        kept = list(adapters[0].layers)[: max(10, int(len(adapters[0].layers) * share))]
        adapters = [Adapter({name: a.layers[name] for name in kept}, a.provenance) for a in adapters]
    shapes = {name: layer.shape for name, layer in adapters[0].layers.items()}
    method = case.split(",")[0]
    statistics = None
    if FUSIONS[method].needs_statistics:
        statistics = [MadeUp(shapes, seed) for seed in range(len(files))]
    fused = fuse(adapters, method, rank=rank or None, statistics=statistics)
    out = save(fused.adapter, folder / "out" / "fused.safetensors", overwrite=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"peak": peak, "out": out.stat().st_size, "seconds": seconds, "layers": len(shapes)}


def allowed(case: str, adapters: int, rank: int, out: int) -> int:
    """The target's bytes."""
    shapes = layers(1).values()
    largest = max(4 * rank * (s.out_features + s.fan_in) for s in shapes)
    width = max(s.fan_in for s in shapes) if case.startswith("closed-form") else 0
    held = 0 if case in ("sum", "average") else out
    return held + adapters * (largest + 4 * width**2) + 5 * 8 * width**2 + SLACK


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=70)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a case in a process of its own
    options = parser.parse_args(arguments)
    if options.one:
        folder, case, lazy = options.one
        print(json.dumps(measure(Path(folder), case, lazy == "lazy", options.threads)))
        return 0
    rows, targets = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").mkdir()
        write_adapters(folder, options.adapters, options.rank, options.blocks)
        inputs = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for case in options.cases:
            for lazy in (False, True) if case in ("sum", "sum, to rank 16") else (True,):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.speed.fusion_memory",
                    "--threads",
                    str(options.threads),
                ]
                one = ["--one", name, case, "lazy" if lazy else "whole"]
                done = subprocess.run([*command, *one], check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                mib = {k: found[k] / 2**20 for k in ("peak", "out")}
                row = {"fusion": case, "read": "tensor by tensor" if lazy else "whole", **mib}
                rows.append({**row, "seconds": found["seconds"], "layers": found["layers"]})
                if lazy:
                    limit = allowed(case, options.adapters, options.rank, found["out"]) / 2**20
                    targets.append(Target(f"{case}: peak, MiB", mib["peak"], limit))
    settings = {"blocks": options.blocks, "adapters": options.adapters, "rank": options.rank}
    settings |= {"inputs_mib": round(inputs / 2**20, 1), "threads": options.threads}
    return finish("fusion_memory", rows, targets, settings)


if __name__ == "__main__":
    sys.exit(main())
