"""Inside a host: gradients of every family in every checkpointing mode, against torch's own exact way.

``torch.autograd.graph.allow_mutation_on_saved_tensors`` is right for models that write in place, as long as
nothing is checkpointed; it copies whatever is about to change. The loss itself says whether both are right:
its change along the gradient.
"""

from contextlib import ExitStack

import torch
from inside_apply_lib import leftovers, pack
from inside_catalogue import CATALOGUE

attaching = pack("spectral_core.attach.attaching")
adapters = pack("spectral_core.adapter.adapter")
checkpointing = pack("spectral_core.training.engine.checkpointing")
layers = pack("nodes.host.training.layers")
model = pack("nodes.host.training.model")
lora = pack("spectral_core.methods").LoRAConfig

MODES = ("none", "selective", "full")
TOLERANCE = 1e-5  # of the gradient's length, in float32
STEP = 1e-2


def adapter_of(patcher):
    """LoRA on all linear layers, with numbers that are not zero."""
    shapes = layers.chosen(patcher, "all-linear")[0]
    weights = dict(layers.BaseWeights(patcher, shapes))
    made = adapters.create(weights, lora(2), None, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for layer in made.layers.values():
        up = layer.terms[0].params["up"]
        up.copy_(torch.randn(up.shape, generator=generator) * 0.05)
    return made


def check(name, patcher=None):
    """The largest difference of any mode, relative; AssertionError above the tolerance."""
    family = CATALOGUE[name]
    patcher = patcher or family.patcher()
    adapter = adapter_of(patcher)
    with model.ready(patcher, "fp32", family.noise().shape) as ready:
        rows = model.Conditions(ready.patcher, {0: family.words(7)[0]}, [family.noise()[0]])
        denoiser = model.Denoiser(ready, rows)
        levels = torch.tensor([len(ready.noise.sigmas) // 2])
        trees = layers.trees(ready.patcher)
        with ExitStack() as undo:
            parts = [
                undo.enter_context(attaching.attach(trees[p], adapter, p, trainable=True))
                for p in adapter.parts
            ]
            target = family.noise(seed=9)

            def loss():
                torch.manual_seed(7)  # for models that drop out while they train
                return (denoiser(family.noise(), levels, [0]) - target).square().mean()

            worst = compare(name, ready.root, [p for part in parts for p in part.parameters()], loss)
    assert leftovers(patcher.model) == []
    return worst


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def compare(name, root, parameters, loss):
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    unused = [i for i, g in enumerate(grads) if g is None]
    expected = flat([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)])
    direction = expected / expected.norm()
    slope = _slope(parameters, direction, loss)
    assert abs(slope - expected.norm().item()) < 0.02 * expected.norm().item(), (slope, expected.norm())
    worst = 0.0
    for mode in MODES:
        with checkpointing.checkpointed([root], mode) as count:
            assert (count > 0) == (mode != "none"), f"{mode}: {count} blocks"
            for _ in range(2):
                for p in parameters:
                    p.grad = None
                loss().backward()
                found = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
                if (found - expected).norm() > TOLERANCE * expected.norm():
                    # torch's way is itself wrong where blocks write into views of one buffer (Wan Animate 2):
                    # the loss says which of the two is right, by its change along their difference
                    apart = (expected - found) / (expected - found).norm()
                    miss = abs(_slope(parameters, apart, loss, 5 * STEP) - (found @ apart).item())
                    if miss < 0.25 * abs(((expected - found) @ apart).item()):
                        expected = found
                worst = max(worst, ((found - expected).norm() / expected.norm()).item())
        assert worst <= TOLERANCE, f"checkpointing {mode}: gradients differ by {worst:.1e}"
    print(f"  {name}: {worst:.1e} in {len(parameters)} parameters, {len(unused)} of them unused")
    return worst


def _slope(parameters, direction, loss, step=STEP):
    """How the loss changes along a direction, by two values of it; the parameters are as before."""
    with torch.no_grad():
        values, before = [], [p.clone() for p in parameters]
        for sign in (1, -1):
            _move(parameters, direction, sign * step)
            values.append(loss().item())
            for p, own in zip(parameters, before, strict=True):  # moved back they would differ by rounding
                p.copy_(own)
    return (values[0] - values[1]) / (2 * step)


def _move(parameters, direction, size):
    start = 0
    for p in parameters:
        p += size * direction[start : start + p.numel()].view_as(p)
        start += p.numel()
