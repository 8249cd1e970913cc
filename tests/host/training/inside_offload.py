"""Inside a host: a model whose weights are streamed in gives the gradients of one that lies on the device.

There is one device here, on which the host would stream nothing: it is made to copy every weight that it
casts, as it does from one device to another. Forced through the host's own patcher, in every checkpointing
mode; after a forward pass no copy may be left.
"""

import json
import sys
import traceback
from contextlib import ExitStack, contextmanager

import comfy.model_management
import torch
from inside_apply_lib import FOLDER, leftovers, pack
from inside_gradients import MODES, adapter_of, flat
from inside_models import FAMILIES

attaching = pack("spectral_core.attach.attaching")
checkpointing = pack("spectral_core.training.engine.checkpointing")
layers = pack("nodes.host.training.layers")
model = pack("nodes.host.training.model")

TOLERANCE = 1e-6  # of the gradient's length, in float32: the same operations on the same numbers


@contextmanager
def two_devices():
    """The host's casts are copies, and counted."""
    own, made = comfy.model_management.cast_to, []

    def cast_to(weight, dtype=None, device=None, non_blocking=False, copy=False, **more):
        is_away = isinstance(weight, torch.nn.Parameter)
        made.extend([weight] * is_away)
        return own(weight, dtype, device, non_blocking, copy=copy or is_away, **more)

    comfy.model_management.cast_to = cast_to
    try:
        yield made
    finally:
        comfy.model_management.cast_to = own


def gradients(family, patcher, adapter, offload):
    """{mode: gradient}, and the share of the weights that is off the device."""
    found = {}
    with model.ready(patcher, "fp32", family.noise().shape, offload) as ready:
        rows = model.Conditions(ready.patcher, {0: family.words(7)[0]}, [family.noise()[0]])
        denoiser = model.Denoiser(ready, rows)
        levels = torch.tensor([len(ready.noise.sigmas) // 2])
        trees = layers.trees(ready.patcher)
        share = 1 - ready.patcher.loaded_size() / ready.patcher.model_size()
        with ExitStack() as undo:
            parts = [
                undo.enter_context(attaching.attach(trees[p], adapter, p, True, device=ready.device))
                for p in adapter.parts
            ]
            parameters = [p for part in parts for p in part.parameters()]
            target = family.noise(seed=9)
            for mode in MODES:
                with checkpointing.checkpointed([ready.root], mode, recast=ready.streams.again):
                    for _ in range(2):  # what writes in place is known after the first
                        for p in parameters:
                            p.grad = None
                        ready.streams._made.clear()
                        loss = (denoiser(family.noise(), levels, [0]) - target).square().mean()
                        alive = [ref for ref, _ in ready.streams._made.values() if not ref.expired()]
                        assert not alive, f"{mode}: {len(alive)} weights are kept on the device"
                        loss.backward()
                found[mode] = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    assert leftovers(patcher.model) == []
    return found, share


def check(name):
    family = FAMILIES[name]
    patcher = family.patcher()
    base = family.sampled(patcher)
    adapter = adapter_of(patcher)
    expected, share = gradients(family, patcher, adapter, "none")
    assert share < 0.01, share
    shares = {}
    for offload in ("half", "all"):
        with two_devices() as made:
            found, shares[offload] = gradients(family, patcher, adapter, offload)
        assert made, "nothing was streamed in"
        for mode in MODES:
            apart = ((found[mode] - expected[mode]).norm() / expected[mode].norm()).item()
            assert apart <= TOLERANCE, f"{offload}, checkpointing {mode}: gradients differ by {apart:.1e}"
    assert 0.2 < shares["half"] < shares["all"] and shares["all"] > 0.7, shares
    assert torch.equal(family.sampled(patcher), base), "another base picture"
    print(f"  {name}: off the device {shares['half']:.0%} and {shares['all']:.0%}")


def main():
    report = {}
    for name, family in FAMILIES.items():
        if not family.exists() or (sys.argv[3:] and name not in sys.argv[3:]):
            continue
        try:
            with torch.inference_mode():
                check(name)
            report[name] = ""
        except Exception as error:
            report[name] = traceback.format_exc()
            print(f"  {name}: FAILED {type(error).__name__}: {str(error)[:300]}")
        comfy.model_management.unload_all_models()
    (FOLDER / "offload.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
