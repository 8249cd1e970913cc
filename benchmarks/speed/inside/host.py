"""Inside a host: seconds per step, time from file to first step, and bytes held; for
``benchmarks/speed/host.py``.

Runs in the host's own Python. ``sys.argv[2]`` is a folder with ``settings.json`` and the adapter files;
``measured.json`` is written there: raw seconds by name, entry i of every list from the same round.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from inside_apply_lib import FOLDER, pack, prepared

import nodes as host_nodes

BASE, MERGED, FOURA, SPECTRAL, BYPASS = (
    "base",
    "merged",
    "live foura adaptive",
    "live spectral a",
    "bypass lora",
)
AGAIN, MOVED = "base, once more", "merged, changing nothing"  # what pairing alone does; what new memory does
NOTHING = 1e-30  # a strength that no bit of the weights sees, and that the pack does not skip as it does 0
LATENTS = {128: 16, 256: 32}  # pixels: latent size

# What the host finds in a checkpoint of Stable Diffusion 1.5.
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 768,
    "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "num_heads": 8, "adm_in_channels": None,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3, "use_spatial_transformer": True, "legacy": False,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip


def sd15() -> Any:
    """The host's own model of Stable Diffusion 1.5 with random float32 weights."""
    settings = comfy.supported_models.SD15({**SD15, "dtype": torch.float32})
    settings.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = settings.get_model({}, device=cpu)
    draw = torch.Generator().manual_seed(0)
    for name, value in model.diffusion_model.named_parameters():  # the host leaves memory as it finds it
        if value.dim() > 1:
            value.data.normal_(0, value[0].numel() ** -0.5, generator=draw)
        else:
            value.data.fill_(float(name.endswith("weight")))
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def inputs(pixels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    size = LATENTS[pixels]
    return (
        torch.randn(1, 4, size, size, generator=draw),
        torch.tensor([3.0]),
        torch.randn(1, 77, 768, generator=draw),
    )


def step(patcher: Any, options: dict[str, Any], given: tuple[torch.Tensor, ...]) -> float:
    """Seconds of one call of the host's ``apply_model``: batch 1, no guidance."""
    x, sigma, context = given
    started = time.perf_counter()
    patcher.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options)
    return time.perf_counter() - started


# --- seconds per step -----------------------------------------------------------------------------


@contextmanager
def injected(patcher: Any) -> Iterator[None]:
    """The host's own injections (its bypass LoRA) only for this block: the model is everybody's."""
    if getattr(patcher, "injections", None):
        patcher.inject_model()
    try:
        yield
    finally:
        if getattr(patcher, "injections", None):
            patcher.eject_model()


def in_turn(names: list[str], rounds: int) -> Iterator[str]:
    """Every name once per round, in an order drawn anew each time."""
    draw = random.Random(5)
    for _ in range(rounds):
        yield from draw.sample(names, len(names))


def forward_path(patchers: dict[str, Any], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Everything that leaves the weights alone: all are prepared at once and take turns step by step."""
    runs = {name: prepared(patcher) for name, patcher in patchers.items()}
    for patcher in patchers.values():
        if getattr(patcher, "injections", None):
            patcher.eject_model()
    seconds: dict[str, dict[int, list[float]]] = {name: {p: [] for p in LATENTS} for name in patchers}
    for pixels in LATENTS:
        given = inputs(pixels)
        several = 3 if pixels == 128 else 1
        for turn, name in enumerate(in_turn(list(patchers), several * rounds + 1)):
            with injected(patchers[name]):
                took = step(patchers[name], runs[name][0], given)
            if turn >= len(patchers):  # the first round warms up
                seconds[name][pixels].append(took)
    for _, done in runs.values():
        done()
    return seconds


def weights(patchers: dict[str, Any], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Merged against base: the host changes its weights between the turns, which is not in the time.

    Two controls take turns with them: the base once more, and an adapter too weak to change a bit, whose
    weights are the base's in the memory that the host makes for patched ones.

    A turn's time is the shorter of two steps after one that is not counted, the first after the change.
    """
    seconds: dict[str, dict[int, list[float]]] = {name: {p: [] for p in LATENTS} for name in patchers}
    for name in in_turn(list(patchers), rounds):
        options, done = prepared(patchers[name])
        for pixels in LATENTS:
            given = inputs(pixels)
            step(patchers[name], options, given)
            seconds[name][pixels].append(min(step(patchers[name], options, given) for _ in range(2)))
        done()
    return seconds


def seconds_per_step(base: Any, rounds: int, parts: list[str]) -> dict[str, Any]:
    """Group -> candidate -> pixels -> seconds; every group has a base of its own."""
    applying, fileformat = pack("nodes.host.apply.adapters"), pack("spectral_core.files.adapter_file")

    def apply(name: str, mode: str, strength: float = 1.0) -> Any:
        adapter = fileformat.load(FOLDER / "spectral_adapters" / f"{name}.safetensors")
        applied = applying.apply(adapter, base, None, strength, 1.0, mode)
        assert applied.mode == mode and "in 128 layers" in applied.report, applied.report
        return applied.model

    still = {BASE: base, FOURA: apply("foura", "live"), SPECTRAL: apply("spectral_a", "live")}
    bypass = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if bypass is not None:
        lora = comfy.utils.load_torch_file(str(FOLDER / "loras" / "foura_lora.safetensors"), safe_load=True)
        still[BYPASS] = bypass(base, None, lora, 1.0, 0.0)[0]
    merged = {
        BASE: base,
        AGAIN: base,
        MOVED: apply("spectral_a", "merged", NOTHING),
        MERGED: apply("spectral_a", "merged"),
    }
    found: dict[str, Any] = {}
    if "live" in parts:
        found["live"] = forward_path(still, rounds)
    if "merged" in parts:
        found["merged"] = weights(merged, rounds)
    return found


# --- from the file to the first step, and what is held ----------------------------------------------


def tensor_bytes() -> dict[int, int]:
    """Storages of all tensors alive: address -> bytes."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def loaders(base: Any) -> dict[str, tuple[str, str, Callable[[str], Any]]]:
    """Name -> (folder, file, the node's own work: file name -> patched MODEL, and all that the host keeps).

    The host keeps the node, which keeps its file, and all of the node's outputs.
    """
    ours = pack("nodes.load").LoadFouRA

    def load_lora(name: str) -> Any:
        node = host_nodes.LoraLoaderModelOnly()
        answer = node.load_lora_model_only(base, name, 1.0)
        return answer[0], (node, answer)

    def load_ours(name: str) -> Any:
        node = ours()
        answer = node.load(name, 1.0, 1.0, model=base)
        return answer["result"][0], (node, answer)

    return {
        "spectral a": ("spectral_adapters", "spectral_a", load_ours),
        "spectral a, Load LoRA": ("loras", "spectral_a_lora", load_lora),
        "foura adaptive": ("spectral_adapters", "foura", load_ours),
        "foura adaptive, Load LoRA": ("loras", "foura_lora", load_lora),
    }


def forget() -> None:
    """A process that has not seen the files: the pack keeps parsed ones."""
    store = pack("nodes.host.files.parsed_cache")
    store.HEADERS, store.ADAPTERS = store.Store(), store.Store(keeps_alive=False)
    gc.collect()


def file_to_step(base: Any, rounds: int) -> dict[str, list[float]]:
    """From a file in the system's cache to the first patched step at 128×128; each time a new file."""
    known, given = loaders(base), inputs(128)
    seconds: dict[str, list[float]] = {name: [] for name in known}
    for turn, name in enumerate(in_turn(list(known), rounds + 1)):
        folder, file, load = known[name]
        fresh = FOLDER / folder / f"{file}_{turn}.safetensors"
        shutil.copyfile(FOLDER / folder / f"{file}.safetensors", fresh)
        forget()
        folder_paths.get_filename_list(folder)  # the page has asked for it long before
        started = time.perf_counter()
        patcher, kept = load(fresh.name)
        options, done = prepared(patcher)
        step(patcher, options, given)
        took = time.perf_counter() - started
        done()
        del patcher, kept, options, done
        fresh.unlink()
        prepared(base)[1]()  # the host takes the patches out again
        if turn >= len(known):
            seconds[name].append(took)
    return seconds


def held(base: Any) -> dict[str, dict[str, int]]:
    """Bytes of the tensors that a loader leaves behind; of a live adapter in the middle of a run.

    A merged one is counted before the host changes its weights: the copies that it keeps of those are its
    own, the same for every patch. ``folded``: all of the adapter's folded factors in float32.
    """
    factors, fileformat = pack("nodes.host.apply.folded_cache"), pack("spectral_core.files.adapter_file")
    found = {}
    for name, (folder, file, load) in loaders(base).items():
        forget()
        before = tensor_bytes()
        patcher, kept = load(f"{file}.safetensors")
        stack = pack("nodes.host.apply.stack").stack_of(patcher)
        is_live = folder == "spectral_adapters" and stack is not None
        if is_live:
            options, done = prepared(patcher)
            step(patcher, options, inputs(128))
        total = sum(n for at, n in tensor_bytes().items() if at not in before)
        if is_live:
            done()
            del options, done
        found[name] = {"held": total}
        del patcher, kept
        if folder == "spectral_adapters":
            adapter = fileformat.load(FOLDER / folder / f"{file}.safetensors")
            pairs = [factors.folded(n, each, range(len(each.terms))) for n, each in adapter.layers.items()]
            found[name]["folded"] = sum(4 * f.numel() for pair in pairs for f in pair)
            params = (v for layer in adapter.layers.values() for t in layer.terms for v in t.params.values())
            found[name]["file"] = sum(v.nbytes for v in params)
            del adapter, pairs, params
        prepared(base)[1]()
    return found


def main() -> None:
    settings = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    pack()
    for folder in ("spectral_adapters", "loras"):
        folder_paths.folder_names_and_paths[folder] = ([str(FOLDER / folder)], {".safetensors"})
    with torch.inference_mode():
        base = sd15()
        measured: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
        measured |= seconds_per_step(base, settings["rounds"], settings["parts"])
        prepared(base)[1]()
        if "loading" in settings["parts"]:
            measured["first"] = file_to_step(base, settings["rounds"])
            measured["held"] = held(base)
    (FOLDER / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
