"""Training: seconds per step and peak memory of this trainer, of PEFT's LoRA, and of ComfyUI's own trainer.

    python -m benchmarks.speed.training [PART ...] [--rounds 5] [--threads 2] [--hosts 0.28.0]
    [--host-default]

The UNet of Stable Diffusion 1.5 with random float32 weights, 16×16 latents (128×128 pixels), batch 1, rank 8,
AdamW, on the CPU. Ours is the trainer as a run has it: a folder with its events, the undo of a step,
clipping, the watch over the loss. PEFT's is the usual loop of diffusers' examples: noise, loss, backward,
clipping, AdamW, the loss read for the log. Parts, each of which replaces its own figures in the result file:

    attention, all-linear, all   every method against PEFT on the same layers, in turns in one process
    memory         the highest resident size of a process that trains one of them, its set-up included
    checkpointing  bytes kept for backward and seconds, without and with gradient checkpointing
    setup          everything before the first step, singular columns uncached
    host           the node Train Adapter against the host's Train LoRA, in turns in the host's own process

The host trains every layer with a weight or bias, in bfloat16 unless told otherwise; here it is told float32.
Its default mode wants about 15 GB and is only run with ``--host-default``.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS, Target, Times, finish, interleave, kept_for_backward
from benchmarks.speed.unet import PEER, STATUS, Planted, configurations, sd15_unet, twin
from spectral_core.adapter.adapter import create
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.svd import Columns
from spectral_core.maths.svd_cache import SVDCache
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, method_of
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.order import Order
from spectral_core.training.engine.checks import fitting
from spectral_core.training.engine.loop import Setup
from spectral_core.training.engine.trainer import Trainer
from spectral_core.training.objectives.diffusion import Diffusion
from spectral_core.training.runs.outcome import TrainResult
from spectral_core.training.runs.place import Run

RANK = 8
ALPHAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)
ADAPTIVE = "foura dct adaptive"
FEW = ("lora", ADAPTIVE, "spectral a", "spectral r")  # where every layer trains, rounds are long
LAYERS = {"attention": None, "all-linear": FEW, "all": FEW}
HOST_SECONDS = 1500

# --- the candidates ---------------------------------------------------------------------------------


def methods() -> dict[str, MethodConfig]:
    found = {"lora": LoRAConfig(RANK), **configurations(RANK)}
    return found | {"foura dft adaptive": FouRAConfig(RANK, transform="dft")}


def pictures() -> tuple[Tensor, Tensor]:
    """Latents (4, 4, 16, 16) and their captions' states (4, 77, 768)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(4, 4, 16, 16, generator=draw), torch.randn(4, 77, 768, generator=draw)


def peft_loop(unet: nn.Module, targets: str) -> Callable[[], None]:
    """A step of the plain loop, with LoRA on the layers that ``targets`` names."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [name.removeprefix("unet.") for name in find_targets(unet, "unet", targets)[0]]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), unet)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(names)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    latents, states = pictures()

    def step() -> None:
        row = torch.randint(0, len(latents), (1,))
        level, noise = torch.randint(0, 1000, (1,)), torch.randn(1, 4, 16, 16)
        kept = ALPHAS[level].sqrt()[:, None, None, None]
        noisy = kept * latents[row] + (1 - kept.square()).sqrt() * noise
        loss = F.mse_loss(unet(noisy, level, states[row]).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        loss.item()

    return step


class One:
    """An example that an epoch shows once."""

    repeats = 1


@contextmanager
def our_trainer(
    unet: nn.Module, targets: str, config: MethodConfig, checkpointing: str = "none", basis: Any = None
) -> Iterator[Trainer]:
    """The trainer after its set-up; :meth:`Trainer.advance` is a step."""
    with ExitStack() as around:
        folder = Path(around.enter_context(tempfile.TemporaryDirectory()))
        weights, _ = fitting(find_targets(unet, "unet", targets)[0], config)  # the last has 4 channels
        adapter = create(weights, config, basis or any_basis)
        attachment = around.enter_context(attach(unet, adapter, trainable=True))
        latents, states = pictures()

        def denoise(noisy: Tensor, timesteps: Tensor, rows: Sequence[int | None]) -> Tensor:
            context = states[[row or 0 for row in rows]]
            prediction: Tensor = unet(noisy, timesteps, context).sample
            return prediction

        order = Order([One()] * len(latents), 1, 0)
        setup = Setup(denoise, latents, order, Diffusion(ALPHAS), [attachment], roots=[unet])
        settings = TrainConfig(steps=1000, learning_rate=1e-4, checkpointing=checkpointing)
        trainer = Trainer(setup, settings, config.method, Run(folder), None, TrainResult())
        with trainer.under_way():
            yield trainer


def any_basis(name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns of the right shapes: the time of a step does not depend on which they are."""
    shape = LayerShape.of(weight)
    u, v = (torch.linalg.qr(torch.randn(n, RANK))[0] for n in (shape.out_features, shape.fan_in))
    return u, torch.linspace(2, 1, RANK), v


# --- the parts --------------------------------------------------------------------------------------

Found = tuple[list[dict[str, Any]], list[Target]]


def layers_part(targets: str, options: argparse.Namespace) -> Found:
    """Every method against PEFT, step by step in turns, over one set of base weights."""
    names = LAYERS[targets] or tuple(methods())
    unet, steps, counts = sd15_unet(), dict[str, Callable[[], object]](), dict[str, int]()
    with ExitStack() as around:
        steps[PEER] = peft_loop(twin(unet), targets)
        for name in names:
            trainer = around.enter_context(our_trainer(twin(unet), targets, methods()[name]))
            steps[name] = trainer.advance
            counts[name] = sum(p.numel() for p in trainer.stepper.parameters)
        times = interleave(steps, options.rounds, warmup=1)
    rows = [times.row(name, to=PEER) | {"parameters": counts.get(name)} for name in steps]
    limited = names if targets == "attention" else ()
    return rows, [Target.of(f"{n}: step / {PEER}", times.ratio(n, PEER), 1.05) for n in limited]


def memory_part(options: argparse.Namespace) -> Found:
    """One process for each."""
    rows: list[dict[str, Any]] = []
    for name in (PEER, *methods()):
        command = [sys.executable, "-m", "benchmarks.speed.training", "--alone", name]
        command += ["--threads", str(options.threads)]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
        rows.append({"name": name, "peak": json.loads(said.splitlines()[-1])})
        rows[-1]["ratio"] = rows[-1]["peak"] / rows[0]["peak"]
    return rows, [Target(f"{r['name']}: peak memory / {PEER}", r["ratio"], 1.02) for r in rows[1:]]


def alone(name: str) -> None:
    """Train for three steps and print the process's highest resident size in bytes."""
    unet = sd15_unet()
    with ExitStack() as around:
        if name == PEER:
            step: Callable[[], object] = peft_loop(unet, "attention")
        else:
            step = around.enter_context(our_trainer(unet, "attention", methods()[name])).advance
        for _ in range(3):
            step()
    print(highest_resident())


def highest_resident() -> int:
    (line,) = (x for x in STATUS.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def checkpointing_part(options: argparse.Namespace) -> Found:
    unet, steps, kept = sd15_unet(), dict[str, Callable[[], object]](), dict[str, int]()
    with ExitStack() as around:
        for mode in ("none", "selective", "full"):
            tree = twin(unet)
            trainer = around.enter_context(our_trainer(tree, "attention", methods()[ADAPTIVE], mode))
            steps[mode] = trainer.advance
            trainer.advance()  # the first step looks for what the model changes in place, and keeps otherwise
            kept[mode] = kept_for_backward(tree, trainer.advance)
        times = interleave(steps, options.rounds, warmup=1)
    rows = [times.row(mode, to="none") | {"saved": kept[mode]} for mode in steps]
    return rows, [
        Target("selective: bytes / none", kept["selective"] / kept["none"], 0.60),
        Target.of("selective: step / none", times.ratio("selective", "none"), 1.35),
    ]


def setup_part(options: argparse.Namespace) -> Found:
    """Singular columns of all attention layers, the adapter, its attachment, the optimiser.

    On planted spectra σᵢ = 1/i as trained weights have them, roughly; random weights have no separated top 8.
    """
    unet, rows = sd15_unet(), []
    matrices = find_targets(unet, "unet", "attention")[0]
    for name in ("spectral a, random weights", "spectral a", ADAPTIVE):
        if name == "spectral a":
            planted = Planted({n for w in matrices.values() for n in w.shape})
            for weight in matrices.values():
                weight.data.copy_(planted.weight((weight.shape[0], weight.shape[1]))[0])
        config = methods()[name.split(",")[0]]
        with tempfile.TemporaryDirectory() as folder:
            basis = partial(columns_of, SVDCache(folder)) if method_of(config).needs_basis else None
            started = time.perf_counter()
            with our_trainer(unet, "attention", config, basis=basis):
                rows.append({"name": name, "seconds": time.perf_counter() - started})
        gc.collect()
    return rows, [Target(f"{r['name']}: seconds", r["seconds"], 10.0) for r in rows[1:]]


def columns_of(cache: SVDCache, name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = cache.get_or_compute(weight, Columns.block(0, RANK))
    return found.u, found.s, found.v


def host_part(options: argparse.Namespace) -> Found:
    from benchmarks.speed.host import run_in
    from tests.host.booted import find_checkouts

    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    script = Path(__file__).resolve().parent / "inside" / "training.py"
    for checkout in find_checkouts():
        if options.hosts and checkout.version not in options.hosts:
            continue
        settings = {"threads": options.threads, "rounds": options.rounds, "default": options.host_default}
        settings["only"] = options.only
        measured = run_in(checkout, settings | {"rank": RANK}, script, HOST_SECONDS)
        seconds = {name: tuple(values) for name, values in measured["seconds"].items()}
        times, peer = Times(seconds), "host, bypass"
        if peer not in seconds:
            continue  # a host without the mode
        for name in seconds:
            row = times.row(name, to=peer) | {"peak": measured["peak"][name]}
            rows.append(row | {"name": f"{checkout.version} {name}", "torch": measured["torch"]})
        targets += [
            Target.of(f"{checkout.version} {peer} / {name}", times.ratio(peer, name), 1.7, ">=")
            for name in seconds
            if name.endswith("attention")
        ]
    return rows, targets


PARTS: Mapping[str, Callable[[argparse.Namespace], Found]] = {
    **{name: partial(layers_part, name) for name in LAYERS},
    "memory": memory_part,
    "checkpointing": checkpointing_part,
    "setup": setup_part,
    "host": host_part,
}

# --- the report -------------------------------------------------------------------------------------


def merged(part: str, found: Found, known: Mapping[str, Any]) -> Found:
    """The rows and targets of the result file, those of this part replaced."""
    rows = [{"part": part, **row} for row in found[0]]
    targets = [replace(t, name=f"{part}: {t.name}") for t in found[1]]
    others = [row for row in known.get("rows", ()) if row["part"] != part]
    kept = [t for t in known.get("targets", ()) if t["name"].split(": ")[0] != part]
    targets += [Target.read(t) for t in kept]
    places = list(PARTS)
    return (
        sorted(others + rows, key=lambda row: places.index(row["part"])),
        sorted(targets, key=lambda target: places.index(target.name.split(": ")[0])),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hosts", nargs="+", metavar="VERSION", help="only these (default: all found)")
    parser.add_argument("--host-default", action="store_true", help="the host's default mode too: 15 GB")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the part host: only these")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.alone:
        alone(options.alone)
        return 0
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}: expected some of {', '.join(PARTS)}")
    result, code = RESULTS / "training.json", 0
    for part in options.parts or PARTS:
        known = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        rows, targets = merged(part, PARTS[part](options), known)
        settings = known.get("settings", {}) | {
            part: {"rounds": options.rounds, "rank": RANK, "date": date.today().isoformat()}
        }
        code = finish("training", rows, targets, settings)
    return code


if __name__ == "__main__":
    sys.exit(main())
