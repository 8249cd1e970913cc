"""Inside a host: seconds per training step and memory of Train Adapter and Train LoRA; for
``benchmarks/speed/training.py``.

Runs in the host's own Python. ``sys.argv[2]`` is a folder with ``settings.json``; ``measured.json`` is
written there: raw seconds by name, entry i of every list from the same round, and the highest resident size.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
import comfy.model_patcher
import torch
from comfy_extras.nodes_train import TrainLoraNode
from host import in_turn, sd15
from inside_train_lib import call
from torch.optim import optimizer as optimisers

FOLDER = Path(sys.argv[2])
STEPS = 3  # of a turn; the first one, with everything that is set up in it, does not count
BYPASS = {"bypass_mode": True}
OURS = {
    "lora, attention": {"method": "lora"},
    "foura, attention": {"method": "foura"},
    "spectral a, attention": {"method": "spectral_a"},
    "lora, all-linear": {"method": "lora", "targets": "all-linear"},
    "lora, all": {"method": "lora", "targets": "all"},
}
HOSTS: dict[str, dict[str, Any]] = {
    "host, bypass": BYPASS,
    "host, bypass, no checkpointing": {**BYPASS, "gradient_checkpointing": False},
    "host, default": {},
}


def data() -> tuple[dict[str, torch.Tensor], list[Any]]:
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(1, 77, 768, generator=draw)
    return {"samples": torch.randn(4, 4, 16, 16, generator=draw)}, [[states, {}]]


def ours(model: Any, rank: int, name: str, turn: int) -> None:
    latents, states = data()
    given = {"targets": "attention", **OURS[name], "rank": rank, "batch_size": 1, "learning_rate": 1e-4}
    call(
        model, run_name=f"{name} {turn}", steps=STEPS, latents=latents, conditioning=[states],
        checkpoint_every=0, **given,
    )  # fmt: skip


def reloaded(model: Any) -> Any:
    """What the host's trainer gets when it loads the model once more for itself."""
    config = model.model.model_config  # which cannot be copied
    own = copy.deepcopy(model.model, {id(config): config})
    return comfy.model_patcher.ModelPatcher(own, model.load_device, model.offload_device)


def hosts(model: Any, rank: int, name: str) -> None:
    """The host's node with its defaults, in float32."""
    latents, states = data()
    known = {i.id: i.default for i in TrainLoraNode.define_schema().inputs if hasattr(i, "default")}
    known |= {"steps": STEPS, "rank": rank, "learning_rate": 1e-4, **HOSTS[name]}
    known |= {"training_dtype": "fp32", "lora_dtype": "fp32"}
    wrapped = {key: [value] for key, value in known.items()}
    TrainLoraNode.execute(**{**wrapped, "model": [model], "latents": [latents], "positive": [states]})


def fresh() -> None:
    """Freed memory handed back, and the highest resident size counted from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def highest_resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    settings = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    ended: list[float] = []
    optimisers.register_optimizer_step_post_hook(lambda *_: ended.append(time.perf_counter()))
    names = [*OURS, *(name for name in HOSTS if settings["default"] or name != "host, default")]
    if settings["only"]:
        names = [name for name in names if name in settings["only"]]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peak: dict[str, int] = {}
    with torch.inference_mode():
        model = sd15()
        model.cached_patcher_init = (lambda disable_dynamic: reloaded(model), ())
        for turn, name in enumerate(in_turn(names, settings["rounds"])):
            ended.clear()
            fresh()
            if name in OURS:
                ours(model, settings["rank"], name, turn)
            else:
                hosts(model, settings["rank"], name)
            peak[name] = max(peak.get(name, 0), highest_resident())
            seconds[name] += [b - a for a, b in pairwise(ended)]
            print(name, seconds[name][1 - STEPS :], peak[name], flush=True)
    measured = {"torch": torch.__version__, "seconds": seconds, "peak": peak}
    (FOLDER / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
