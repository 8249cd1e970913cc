"""Inside a host: seconds and memory of a training step of its own SDXL, with weights on the device and
streamed in; for ``benchmarks/speed/gpu.py``.

Runs in the host's own Python. ``sys.argv[2]`` is a folder with ``settings.json``; ``measured.json`` is
written there: raw seconds and the most memory by setting.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from inside_apply_lib import FOLDER, pack
from inside_models import FAMILIES

adapters, attaching = pack("spectral_core.adapter.adapter"), pack("spectral_core.attach.attaching")
checkpointing = pack("spectral_core.training.engine.checkpointing")
layers, model = pack("nodes.host.training.layers"), pack("nodes.host.training.model")
lora = pack("spectral_core.methods").LoRAConfig

SETTINGS = ("none", "half", "all")  # of the weights that are streamed in
SMALL = FAMILIES["sdxl"]
SDXL = replace(
    SMALL,
    config=SMALL.config
    | {
        "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "context_dim": 2048,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "num_head_channels": 64,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
    latent=(1, 4, 128, 128),
    width=2048,
)  # fmt: skip


def patcher_of(family: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The host's model with small random weights; it is loaded from the CPU."""
    made = family.named(dtype=dtype)
    with torch.no_grad():
        for value in made.diffusion_model.parameters():
            value.normal_(0, value[0].numel() ** -0.5 if value.dim() > 1 else 0.1)
    return comfy.model_patcher.ModelPatcher(made, load_device=device, offload_device=torch.device("cpu"))


def measured(family: Any, patcher: Any, adapter: Any, offload: str, rounds: int) -> tuple[list[float], int]:
    """Seconds of steps, and the most memory that was in use."""
    device, on_gpu, seconds = patcher.load_device, patcher.load_device.type == "cuda", []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with model.ready(patcher, "auto", family.noise().shape, offload) as ready, ExitStack() as undo:
        rows = model.Conditions(ready.patcher, {0: family.words(7)[0]}, [family.noise()[0]])
        denoiser, levels = model.Denoiser(ready, rows), torch.tensor([len(ready.noise.sigmas) // 2])
        trees = layers.trees(ready.patcher)
        parts = [
            undo.enter_context(attaching.attach(trees[p], adapter, p, True, device=device))
            for p in adapter.parts
        ]
        undo.enter_context(checkpointing.checkpointed([ready.root], "full", recast=ready.streams.again))
        optimiser = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-4)
        noisy, wanted = family.noise().to(device), family.noise(seed=9).to(device)
        for _ in range(rounds + 2):
            started = time.perf_counter()
            (denoiser(noisy, levels, [0]) - wanted).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return seconds[2:], torch.cuda.max_memory_allocated() if on_gpu else 0


def main() -> None:
    settings = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    family = SMALL if settings["tiny"] else SDXL
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode():
        patcher = patcher_of(family, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
        shapes = layers.chosen(patcher, "attention")[0]
        weights = {name: torch.zeros(shape.weight_shape) for name, shape in shapes.items()}
        adapter = adapters.create(weights, lora(settings["rank"]), None, torch.Generator().manual_seed(0))
        found = {o: measured(family, patcher, adapter, o, settings["rounds"]) for o in SETTINGS}
    result: dict[str, Any] = {"seconds": {o: s for o, (s, _) in found.items()}, "torch": torch.__version__}
    result["peak"] = {o: peak for o, (_, peak) in found.items()}
    (FOLDER / "measured.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
