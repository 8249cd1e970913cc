"""The GPU table, with nothing downloaded: a training step against PEFT, adapters in use against the model
alone, adaptive gates, memory and torch.compile, at the sizes of SD 1.5 and SDXL and on a small DiT.

    python dev.py bench gpu [--models sd15 sdxl dit] [--minutes 20] [--rank 8] [--dry-run]

Random weights in bfloat16, 512×512 pixels (64×64 latents), batch 4, adapters on the attention layers.
Candidates take turns in one process, in a new order each round; a ratio is the median over the rounds.
``above``: the most memory of the GPU during a step or a pass, beyond what lay there before it. When the
minutes are up no part is begun, and what is not done is said. ``--dry-run``: the same on tiny models and the
CPU, to see that it runs; its figures mean nothing.

``offload``, where there is a ComfyUI (``COMFYUI_PATH``): a training step of its own SDXL at 1024×1024 pixels,
batch 1, gradient checkpointing, with all, half and none of the weights on the GPU; ``above`` is then all of
the GPU's memory that is in use, the model's too (``benchmarks/speed/inside/offload.py``).
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS, Target, Times, finish, interleave
from benchmarks.speed.host import run_in
from spectral_core.adapter.adapter import Adapter, create
from spectral_core.attach.attaching import attach
from spectral_core.attach.merging import merge_into
from spectral_core.attach.targets import find_targets
from spectral_core.maths.layers import LayerShape
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig
from tests.host.booted import Checkout, find_checkouts
from tests.host.inside import ON_GPU

PEER = "peft lora"
PARTS = ("training", "use", "compiled")
OFFLOAD = "offload"  # once, on a host
SCRIPT = Path(__file__).resolve().parent / "inside" / "offload.py"
SIX_GB = 6 * 10**9
ROUNDS = 20
BATCH = 4

Found = tuple[list[dict[str, Any]], list[Target]]


@dataclass(frozen=True)
class Size:
    """make: the model; inputs: of a pass, (positional, by name), by a maker of random tensors."""

    make: Callable[[bool], nn.Module]
    inputs: Callable[[bool, Callable[..., Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]


def _unet(tiny: bool, **shape: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    if tiny:
        shape |= {"block_out_channels": (32, 64), "cross_attention_dim": 32, "layers_per_block": 1}
        shape |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        shape |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8}
        shape |= {"transformer_layers_per_block": 1}
        if "addition_embed_type" in shape:  # six numbers of 16 each, and the pooled text's 16
            shape |= {"addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 112}
    made: nn.Module = UNet2DConditionModel(sample_size=64, **shape)
    return made


def _dit(tiny: bool) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    depth, heads = (1, 2) if tiny else (12, 12)
    made: nn.Module = SD3Transformer2DModel(
        sample_size=64,
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=64,
        joint_attention_dim=64 if tiny else 4096,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=32 if tiny else 2048,
        pos_embed_max_size=64,
    )
    return made


def _latents(tiny: bool, rows: Callable[..., Tensor], channels: int = 4) -> Tensor:
    side = 8 if tiny else 64
    return rows(BATCH, channels, side, side)


def _sd15_inputs(tiny: bool, rows: Callable[..., Tensor]) -> Any:
    states = rows(BATCH, 77, 32 if tiny else 768)
    return (_latents(tiny, rows), torch.tensor(500, device=states.device), states), {}


def _sdxl_inputs(tiny: bool, rows: Callable[..., Tensor]) -> Any:
    states = rows(BATCH, 77, 32 if tiny else 2048)
    added = {"text_embeds": rows(BATCH, 16 if tiny else 1280), "time_ids": rows(BATCH, 6)}
    return (_latents(tiny, rows), torch.tensor(500, device=states.device), states), {
        "added_cond_kwargs": added
    }


def _dit_inputs(tiny: bool, rows: Callable[..., Tensor]) -> Any:
    states, pooled = rows(BATCH, 77, 64 if tiny else 4096), rows(BATCH, 32 if tiny else 2048)
    level = torch.full((BATCH,), 500, device=states.device)
    return (_latents(tiny, rows, 16), states, pooled, level), {}


SIZES: Mapping[str, Size] = {
    "sd15": Size(partial(_unet, cross_attention_dim=768, attention_head_dim=8), _sd15_inputs),
    "sdxl": Size(
        partial(
            _unet,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        _sdxl_inputs,
    ),
    "dit": Size(_dit, _dit_inputs),
}


def twin(model: nn.Module) -> nn.Module:
    """Another tree of modules over the same weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def methods(rank: int) -> dict[str, MethodConfig]:
    return {
        "lora": LoRAConfig(rank),
        "foura adaptive": FouRAConfig(rank),
        "foura without gate": FouRAConfig(rank, gate="none"),
        "spectral a": SpectralAConfig(tuple(range(rank))),
    }


class Bench:
    """One model with everything that is measured on it."""

    def __init__(self, name: str, rank: int, tiny: bool, device: torch.device, rounds: int) -> None:
        self.name, self.rank, self.tiny, self.device, self.rounds = name, rank, tiny, device, rounds
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        with torch.device(device):
            self.model = SIZES[name].make(tiny).to(self.dtype).requires_grad_(False).eval()
        self.positional, self.named = SIZES[name].inputs(tiny, self._rows)
        self.target = self._rows(*self.positional[0].shape)

    def _rows(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return drawn.to(self.device, self.dtype)

    def forward(self, model: nn.Module) -> Tensor:
        found: Tensor = model(*self.positional, **self.named)[0]
        return found

    def used(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.forward(model)

    def adapter(self, config: MethodConfig) -> Adapter:
        weights, _ = find_targets(self.model, "unet", "attention")
        made = create(weights, config, self._basis, torch.Generator().manual_seed(1))
        for layer in made.layers.values():
            for term in layer.terms:
                for key in ("up", "U_delta"):
                    if key in term.params:
                        term.params[key].normal_(std=1e-3)
        return made

    def _basis(self, _: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal columns of the right shapes: times do not depend on which they are."""
        shape = LayerShape.of(weight)
        u, v = (torch.linalg.qr(torch.randn(n, self.rank))[0] for n in (shape.out_features, shape.fan_in))
        return u, torch.linspace(2, 1, self.rank), v

    # --- what is measured -----------------------------------------------------------------------------

    def training(self) -> Found:
        """A step of every method against PEFT's: forward, backward and AdamW."""
        steps = {PEER: self._peft_step()}
        steps |= {name: self._our_step(config) for name, config in methods(self.rank).items()}
        return self._table("training step", steps, PEER, {"lora": 1.02, "foura adaptive": 1.08})

    def use(self) -> Found:
        """A pass with adapters, live and merged, against one without any."""
        kinds, passes = methods(self.rank), {"base": partial(self.used, self.model)}
        for name in ("lora", "foura adaptive"):
            tree = twin(self.model)
            attach(tree, self.adapter(kinds[name]), part="unet")
            passes[f"live {name}"] = partial(self.used, tree)
        whole = copy.deepcopy(self.model)
        merge_into(whole, self.adapter(kinds["lora"]), part="unet")
        passes["merged lora"] = partial(self.used, whole)
        limits = {"live lora": 1.1, "merged lora": 1.02, "live foura adaptive": 1.15}
        return self._table("pass", passes, "base", limits)

    def compiled(self) -> Found:
        """The same under torch.compile."""
        tree = twin(self.model)
        attach(tree, self.adapter(LoRAConfig(self.rank)), part="unet")
        passes = {
            "compiled base": partial(self.used, torch.compile(twin(self.model))),
            "compiled live lora": partial(self.used, torch.compile(tree)),
        }
        return self._table("compiled pass", passes, "compiled base", {"compiled live lora": 1.1})

    def _table(
        self, what: str, runs: Mapping[str, Callable[[], object]], to: str, limits: Mapping[str, float]
    ) -> Found:
        times = interleave(runs, self.rounds, warmup=1 if self.tiny else 3)
        rows = [
            {"model": self.name, "what": what} | times.row(name, to) | {"above": self._above(run)}
            for name, run in runs.items()
        ]
        targets = [
            Target.of(f"{self.name}: {what}, {name} / {to}", times.ratio(name, to), limit)
            for name, limit in limits.items()
        ]
        return rows, targets

    def _above(self, run: Callable[[], object]) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _step(
        self, tree: nn.Module, parameters: Sequence[nn.Parameter], around: Callable[[], Any] = nullcontext
    ) -> Callable[[], None]:
        optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

        def step() -> None:
            with around():
                F.mse_loss(self.forward(tree).float(), self.target.float()).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return step

    def _peft_step(self) -> Callable[[], None]:
        from peft import LoraConfig, inject_adapter_in_model

        tree = twin(self.model)
        names = [n.removeprefix("unet.") for n in find_targets(tree, "unet", "attention")[0]]
        inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=names), tree)
        return self._step(tree, [p for p in tree.parameters() if p.requires_grad])

    def _our_step(self, config: MethodConfig) -> Callable[[], None]:
        tree = twin(self.model)
        attachment = attach(tree, self.adapter(config), part="unet", trainable=True)
        return self._step(tree, list(attachment.parameters()), attachment.folded_together)


def offload(checkout: Checkout, rank: int, tiny: bool) -> Found:
    """Training steps on a host, with its weights on the GPU and streamed in."""
    settings = {
        "rank": rank,
        "tiny": tiny,
        "rounds": 2 if tiny else ROUNDS,
        "threads": torch.get_num_threads(),
    }
    found = run_in(checkout, settings, SCRIPT, more={} if tiny else {ON_GPU: "1"})
    times = Times({name: tuple(seconds) for name, seconds in found["seconds"].items()})
    rows = [
        {
            "model": "sdxl",
            "what": "training step 1024",
            **times.row(name, "none"),
            "above": found["peak"][name],
        }
        for name in times.seconds
    ]
    return rows, [
        Target.of("sdxl: training step 1024, all streamed in / none", times.ratio("all", "none"), 1.3),
        Target("sdxl: training step 1024, all streamed in: bytes", found["peak"]["all"], SIX_GB),
    ]


def main(arguments: list[str] | None = None, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, OFFLOAD), default=[*PARTS, OFFLOAD])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=20.0, help="after them no part is begun")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on the CPU too")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("error: no GPU that torch can use; --dry-run runs without one", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    started, rows, targets, left = time.monotonic(), list[dict[str, Any]](), list[Target](), list[str]()
    for name in options.models:
        bench = Bench(name, options.rank, options.dry_run, device, 1 if options.dry_run else ROUNDS)
        for part in options.parts:
            if part == OFFLOAD:
                continue
            if time.monotonic() - started > 60 * options.minutes:
                left.append(f"{name}: {part}")
                continue
            found = getattr(bench, part)()
            rows += found[0]
            targets += [] if options.dry_run else found[1]
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del bench
    if OFFLOAD in options.parts:
        hosts = find_checkouts()[:1]
        if not hosts or time.monotonic() - started > 60 * options.minutes:
            left.append(OFFLOAD if hosts else f"{OFFLOAD} (needs a ComfyUI in COMFYUI_PATH)")
        for host in hosts if OFFLOAD not in left else ():
            found = offload(host, options.rank, options.dry_run)
            rows += found[0]
            targets += [] if options.dry_run else found[1]
    settings = vars(options) | {"batch": BATCH, "left": left}
    if device.type == "cuda":
        settings["gpu"] = torch.cuda.get_device_name()
    if left:
        print(f"not done, in {options.minutes:g} minutes: {', '.join(left)}", file=sys.stderr)
    return finish("gpu", rows, targets, settings, folder)


if __name__ == "__main__":
    raise SystemExit(main())
