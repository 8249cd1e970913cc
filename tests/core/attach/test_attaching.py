"""Attach: the forward path against merged weights, stacking, removal, devices of use, and training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from spectral_core.adapter.adapter import Adapter, create
from spectral_core.adapter.schedule import Schedule
from spectral_core.attach import update as live
from spectral_core.attach.attaching import attach, remove_all
from spectral_core.attach.dispatcher import Dispatcher
from spectral_core.attach.merging import merge_into
from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.lowrank import delta
from spectral_core.methods import FouRAConfig, LoRAConfig, SpectralRConfig
from spectral_core.names.layer_name import LayerName
from tests.core.adapter_cases import (
    ALL,
    GATED,
    MERGEABLE,
    Mixed,
    fresh,
    instance_keys,
    mixed_input,
    mixed_weights,
    trained,
)


@pytest.fixture
def model() -> Iterator[Mixed]:
    net = Mixed()
    before, keys = copy.deepcopy(net.state_dict()), instance_keys(net)
    yield net
    assert instance_keys(net) == keys
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def make(model: Mixed, case: str, seed: int = 1) -> Adapter:
    return trained(ALL[case], mixed_weights(model), seed)


# max |attached − merged| / max |output|: rounding of each layer's weight, through five layers.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", MERGEABLE)
def test_attached_is_merged(case: str, dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    adapter, x = make(model, case).scaled(0.6), mixed_input(dtype)
    with torch.no_grad():
        base = model(x)
        with attach(model, adapter):
            live_output = model(x)
        with merge_into(model, adapter):
            merged = model(x)
        assert torch.equal(model(x), base)
    assert live_output.dtype == dtype
    scale = merged.abs().max()
    assert (live_output - merged).abs().max() <= TOLERANCE[dtype] * scale
    assert (merged - base).abs().max() > 0.1 * scale  # it does something, so the comparison means something


@pytest.mark.parametrize("case", ALL)
def test_zero_update_is_bit_identical(model: Mixed, case: str) -> None:
    x = mixed_input()
    base = model(x)
    with attach(model, fresh(ALL[case], mixed_weights(model))):
        assert torch.equal(model(x), base)
    adapter = make(model, case)
    with attach(model, adapter.scaled(0.0)):
        assert torch.equal(model(x), base)
    with attach(model, adapter.with_schedule(Schedule.window(0.0, 0.5))) as attachment:
        attachment.set_progress(0.7)
        assert torch.equal(model(x), base)
        attachment.set_progress(0.2)
        assert not torch.equal(model(x), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("one", "other"), [("lora", "spectral-a"), ("foura-adaptive", "foura-dft"), ("lora", "lora")]
)
def test_stacking_commutes_to_the_bit(one: str, other: str, dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    a, b, c = make(model, one, 1), make(model, other, 2), make(model, "lora", 3)
    x = mixed_input(dtype)
    outputs = []
    for order in ([a, b, c], [c, b, a], [b, c, a]):
        attachments = [attach(model, adapter) for adapter in order]
        outputs.append(model(x))
        for attachment in attachments:
            attachment.remove()
    with attach(model, [c, a, b]):
        outputs.append(model(x))
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_equal_adapters_of_different_strength_commute(model: Mixed) -> None:
    a, x = make(model, "lora"), mixed_input()
    with attach(model, a.scaled(0.3)), attach(model, a.scaled(1.7)):
        first = model(x)
    with attach(model, a) as one, attach(model, a) as other:
        one.set_strength(1.7)
        other.set_strength(0.3)
        assert torch.equal(model(x), first)


def test_removal_in_any_order_and_twice(model: Mixed) -> None:
    x = mixed_input()
    base = model(x)
    a, b = make(model, "lora"), make(model, "spectral-r")
    with attach(model, b):
        only_b = model(x)
    one, two = attach(model, a), attach(model, b)
    one.remove()
    one.remove()
    assert torch.equal(model(x), only_b)
    two.remove()
    two.remove()
    assert torch.equal(model(x), base)


class Fails(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error("from inside the model")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_inside_the_model_leaves_no_trace(error: type[BaseException]) -> None:
    net = nn.Sequential(nn.Linear(4, 6), Fails(error), nn.Linear(6, 2))
    x, keys, before = torch.randn(3, 4), instance_keys(net), copy.deepcopy(net.state_dict())
    base = net[0](x)
    adapter = trained(LoRAConfig(2), {"unet.0": net[0].weight, "unet.2": net[2].weight})  # type: ignore[dict-item]
    with pytest.raises(error), attach(net, adapter):
        net(x)
    assert instance_keys(net) == keys and torch.equal(net[0](x), base)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_half_attached_is_undone(
    model: Mixed, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    adapter, calls = make(model, "lora"), []
    original = Dispatcher.insert

    def insert(self: Dispatcher, update: live.LayerUpdate) -> None:
        calls.append(update)
        original(self, update)
        if len(calls) == 3:
            raise error("in the middle")

    monkeypatch.setattr(Dispatcher, "insert", insert)
    with pytest.raises(error):
        attach(model, adapter)
    assert len(calls) == 3  # the fixture checks that nothing is left


def test_nothing_is_registered(model: Mixed) -> None:
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    children = [name for name, _ in model.named_modules()]
    with attach(model, make(model, "foura-adaptive"), trainable=True):
        assert list(model.state_dict()) == keys
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [name for name, _ in model.named_modules()] == children


def test_a_foreign_forward_is_called_and_restored() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    plain = net[0].forward

    def foreign(z: Tensor) -> Tensor:
        return plain(z).relu()  # relu keeps its result for backward: not ours to write to

    net[0].forward = foreign
    x = torch.randn(3, 4, requires_grad=True)
    base = net(x)
    adapter = trained(LoRAConfig(2), {"unet.0": net[0].weight})  # type: ignore[dict-item]
    with attach(net, adapter):
        difference = net(x) - base
        net(x).sum().backward()
    assert net[0].__dict__["forward"] is foreign and torch.equal(net(x), base)
    expected = adapter.layers["unet.0"].factors()
    assert torch.allclose(difference, x @ (expected.scaled_up() @ expected.down).mT, atol=1e-6)


def test_a_patch_over_ours_survives_our_removal() -> None:
    net = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    base = net(x)
    adapter = trained(LoRAConfig(2), {"unet.root": net.weight})
    attachment = attach(net, adapter)
    ours = net.forward
    net.forward = lambda x: ours(x) + 1  # type: ignore[method-assign, assignment]
    attachment.remove()
    assert torch.equal(net(x), base + 1)
    with attach(net, adapter):
        assert not torch.equal(net(x), base + 1)
    assert torch.equal(net(x), base + 1)


def test_the_root_itself() -> None:
    net, x = nn.Linear(5, 3), torch.randn(2, 5)
    base = net(x)
    with attach(net, trained(LoRAConfig(2), {"unet.root": net.weight})):
        assert not torch.equal(net(x), base)
    assert torch.equal(net(x), base) and "forward" not in net.__dict__


def test_a_shared_module_takes_one_update() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": shared})
    weights = {"unet.a": shared.weight, "unet.b": shared.weight}
    both = trained(LoRAConfig(2), weights)
    x = torch.randn(2, 4)
    with pytest.raises(SpectralAdapterError, match=r"unet\.b.*same module as unet\.a"):
        attach(net, both)
    with attach(net, both.only("unet.b")):
        by_second_name = net["a"](x)
    alone = both.only("unet.b").layers["unet.b"].factors()
    assert torch.allclose(by_second_name - shared(x), x @ (alone.scaled_up() @ alone.down).mT, atol=1e-6)
    with attach(net, both, strict=False) as attachment:
        assert attachment.report.matched == ("unet.a",) and "unet.b" in attachment.report.unmatched


def test_a_wrong_shape_is_named(model: Mixed) -> None:
    weights = mixed_weights(model)
    weights["unet.linear"] = torch.randn(17, 12)
    adapter = trained(LoRAConfig(2), weights)
    with pytest.raises(
        SpectralAdapterError, match=r"unet\.linear: found a layer of shape 17×13, expected 17×12"
    ):
        attach(model, adapter)
    with attach(model, adapter, strict=False) as attachment:
        assert list(attachment.report.mismatched) == ["unet.linear"]
        assert len(attachment.report.matched) == len(weights) - 1


def test_missing_layers_and_parts(model: Mixed) -> None:
    lora = LoRAConfig(2)
    with pytest.raises(SpectralAdapterError, match=r"unet\.liner: no such module here \(near: linear\)"):
        attach(model, trained(lora, {"unet.liner": torch.randn(17, 13), "unet.out": torch.randn(4, 7)}))
    with pytest.raises(SpectralAdapterError, match="1 of 1 layers"):
        attach(model, trained(lora, {"unet.other": torch.randn(17, 13)}), strict=False)
    with pytest.raises(SpectralAdapterError, match=r"rows 14:22 of a layer with 21 output rows"):
        attach(model, trained(lora, {"unet.qkv[14:22]": torch.randn(8, 17)}))
    two = trained(lora, {"unet.out": torch.randn(4, 7), "text_encoder.out": torch.randn(4, 7)})
    with pytest.raises(SpectralAdapterError, match="part="):
        attach(model, two)
    with pytest.raises(SpectralAdapterError, match="it has unet, text_encoder"):
        attach(model, two, part="vae")
    with attach(model, two, part="text_encoder") as attachment:
        assert attachment.report.matched == ("text_encoder.out",)
    with pytest.raises(SpectralAdapterError, match="is a dict: expected an adapter"):
        attach(model, [{}])  # type: ignore[list-item]


def test_layers_that_bypass_their_forward_are_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    adapter = trained(LoRAConfig(2), {"unet.out_proj": attention.out_proj.weight})
    with pytest.raises(SpectralAdapterError, match="never calls the layer"):
        attach(attention, adapter)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    adapter = trained(LoRAConfig(2), {"unet.linear1": block.linear1.weight})
    with pytest.raises(SpectralAdapterError, match="fast path"):
        attach(block, adapter)
    x = torch.randn(2, 3, 8)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), attach(block, adapter):
            assert not torch.allclose(block(x), copy_without(block)(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Bundle:
    """Rows of several samples in one, as hosts for shapes have them."""

    def __init__(self, feats: Tensor) -> None:
        self.feats = feats


class OfBundles(nn.Linear):
    def forward(self, bundle: Bundle) -> Bundle:  # type: ignore[override]
        return Bundle(super().forward(bundle.feats))


def test_a_layer_that_is_not_given_a_tensor_is_named() -> None:
    net = nn.ModuleDict({"mlp": OfBundles(6, 6)})
    weights = {"unet.mlp": net["mlp"].weight.detach()}
    adapter = create(weights, LoRAConfig(2), None, torch.Generator().manual_seed(0))
    with (
        attach(net, adapter),
        pytest.raises(SpectralAdapterError, match=r"unet\.mlp: is given a Bundle.*merge"),
    ):
        net["mlp"](Bundle(torch.zeros(2, 6)))
    with merge_into(net, adapter):
        assert net["mlp"](Bundle(torch.zeros(2, 6))).feats.shape == (2, 6)


def copy_without(model: nn.Module) -> nn.Module:
    clean = copy.deepcopy(model)
    remove_all(clean)
    return clean


@pytest.mark.parametrize("case", ["lora", "foura-adaptive", "spectral-r-rotation"])
def test_a_deep_copy_is_independent(model: Mixed, case: str) -> None:
    x = mixed_input()
    base = model(x)
    attachment = attach(model, make(model, case))
    adapted, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), adapted)
    attachment.remove()
    assert torch.equal(twin(x), adapted)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), base) and not torch.equal(twin(x), adapted)
    remove_all(twin)
    assert instance_keys(twin) == instance_keys(model)


def test_a_deep_copy_in_training_keeps_the_values_of_now(model: Mixed) -> None:
    x = mixed_input()
    with attach(model, make(model, "foura-dct"), trainable=True) as attachment:
        twin, adapted = copy.deepcopy(model), model(x)
        with torch.no_grad():
            for p in attachment.parameters():
                p.add_(1.0)
        assert torch.allclose(twin(x), adapted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x), adapted, rtol=1e-2)


@pytest.mark.parametrize("case", ["lora", "foura-dft", "foura-adaptive", "spectral-r-rotation"])
def test_strength_and_schedule(model: Mixed, case: str) -> None:
    """Strength · pattern · schedule multiply, and the order of saying it does not matter."""
    x, adapter = mixed_input(), make(model, case)
    ramp = Schedule(((0.0, 0.0), (1.0, 2.0)))
    with attach(model, adapter.scaled(0.5).with_layer_strength("unet.conv", 0.5)):
        expected = model(x)
    with attach(model, adapter.with_layer_strength("unet.conv", 0.5).with_schedule(ramp)) as attachment:
        attachment.set_progress(0.125)
        attachment.set_strength(2.0)
        assert torch.allclose(model(x), expected, atol=1e-5)
        attachment.set_progress(torch.tensor([0.125, 0.125, 0.125]))
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["lora", "foura-adaptive"])
def test_progress_per_row(model: Mixed, case: str) -> None:
    x, adapter = mixed_input(batch=2), make(model, case).with_schedule(Schedule(((0.0, 0.2), (1.0, 1.4))))
    places = torch.tensor([0.1, 0.8])
    with attach(model, adapter) as attachment:
        singles = []
        for i, p in enumerate(places):
            attachment.set_progress(float(p))
            singles.append(model(x[i : i + 1]))
        attachment.set_progress(places)
        assert torch.allclose(model(x), torch.cat(singles), atol=1e-5)
        doubled = model(torch.cat([x, x]))  # guidance doubles a batch whole
        assert torch.allclose(doubled, torch.cat([*singles, *singles]), atol=1e-5)
        with pytest.raises(SpectralAdapterError, match="the progress has 2 rows and the layer's input 3"):
            model(mixed_input(batch=3))


def test_unknown_progress_and_per_row_rotation_are_refused(model: Mixed) -> None:
    scheduled = make(model, "spectral-r-rotation").with_schedule(Schedule.window(0.2, 0.6))
    with attach(model, scheduled) as attachment:
        with pytest.raises(SpectralAdapterError, match="set_progress"):
            model(mixed_input())
        attachment.set_progress(torch.tensor([0.1, 0.3, 0.3]))
        with pytest.raises(SpectralAdapterError, match="rotation"):
            model(mixed_input())
        with pytest.raises(SpectralAdapterError, match="finite"):
            attachment.set_strength(float("nan"))


def test_text_encoders_do_not_follow_the_schedule() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    adapter = trained(LoRAConfig(2), {"text_encoder.0": net[0].weight})  # type: ignore[dict-item]
    with attach(net, adapter):
        expected = net(x)
    with attach(net, adapter.with_schedule(Schedule.window(0.5, 1.0))) as attachment:
        assert torch.equal(net(x), expected)
        attachment.set_progress(0.1)
        assert torch.equal(net(x), expected)


def test_a_new_strength_folds_nothing(model: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_core.attach.factors import Piece

    folds: list[float] = []
    original = Piece.fold
    monkeypatch.setattr(Piece, "fold", lambda self, *a: folds.append(a[2]) or original(self, *a))
    x = mixed_input()
    with (
        torch.no_grad(),
        attach(model, make(model, "foura-dct").with_schedule(Schedule(((0, 1), (1, 0))))) as a,
    ):
        for i in range(4):
            a.set_progress(i / 4)
            a.set_strength(1 + i)
            model(x)
        assert len(folds) == 7
        model.double()(x.double())
        assert len(folds) == 14
        model.float()(x)
        assert len(folds) == 14  # the one before is still there


@pytest.mark.parametrize("case", ALL)
def test_inference_mode_then_gradients(model: Mixed, case: str) -> None:
    """What inference_mode cached must serve a later backward pass, also of an adapter that was made in it."""
    x = mixed_input().requires_grad_()
    with torch.inference_mode():
        adapter = make(model, case)
    with attach(model, adapter):
        with torch.inference_mode():
            first = model(x)
        second = model(x)
        second.sum().backward()
    assert torch.allclose(first, second, atol=1e-6) and x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("case", ["lora", "foura-adaptive", "spectral-r"])
def test_autocast_follows_the_layer(model: Mixed, case: str) -> None:
    x, adapter = mixed_input(), make(model, case)
    with attach(model, adapter), torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.02 * exact.abs().max()
    with attach(model, adapter, trainable=True) as attachment, torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attachment.parameters())


@pytest.mark.parametrize(("net", "shape"), [(nn.Linear(5, 3), (5,)), (nn.Conv2d(4, 3, 3), (4, 6, 6))])
def test_an_input_without_a_batch(net: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    with attach(net, trained(LoRAConfig(2), {"unet.root": net.weight})):  # type: ignore[dict-item]
        assert torch.allclose(net(x), net(x[None])[0], atol=1e-6)
        net(x).sum().backward()


@pytest.mark.parametrize("kernel", [1, 3])
def test_one_and_three_dimensional_convolutions(kernel: int) -> None:
    for net, shape in (
        (nn.Conv1d(4, 5, 3, dilation=2), (2, 4, 9)),
        (nn.Conv3d(4, 5, 3, stride=2), (2, 4, 7, 7, 7)),
    ):
        x, adapter = torch.randn(shape), trained(FouRAConfig(3, gate="none"), {"unet.root": net.weight})
        with attach(net, adapter):
            attached = net(x)
        with merge_into(net, adapter):
            assert torch.allclose(attached, net(x), atol=1e-5)


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MERGEABLE)
def test_gradients_are_those_of_dense_weights(model: Mixed, case: str) -> None:
    """d loss / d parameter by the live path against autograd through W + ΔW, built whole."""
    x, adapter = mixed_input(), make(model, case)
    with attach(model, adapter, trainable=True) as attachment:
        model(x).square().mean().backward()
        live_grads = {n: p.grad for n, p in attachment.named_parameters()}
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    leaves: dict[str, Tensor] = {}
    for text, layer in adapter.layers.items():
        name, (term,) = LayerName.parse(text), layer.terms
        params = {k: v.double().clone().requires_grad_() for k, v in term.params.items()}
        leaves |= {f"{text}.{k}": v for k, v in params.items()}
        start, stop = name.rows or (0, layer.shape.out_features)
        update = delta(replace(term, params=params).factors(layer.shape))
        before, rest = weights[f"{name.path}.weight"], update.new_zeros
        padded = torch.cat(
            [rest(start, *update.shape[1:]), update, rest(len(before) - stop, *update.shape[1:])]
        )
        weights[f"{name.path}.weight"] = before + padded
    functional_call(model, weights, (x.double(),)).square().mean().backward()
    assert live_grads
    for name_, grad in live_grads.items():
        expected = leaves[name_].grad
        assert grad is not None and expected is not None
        assert (grad - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name_


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_optimiser_changed_is_seen_without_gradients_too(fused: bool) -> None:
    """torch's fused optimisers do not count up the version of what they change."""
    model, x = Mixed(), mixed_input()
    with attach(model, make(model, "foura-dct"), trainable=True) as attachment:
        optimiser = torch.optim.AdamW(attachment.parameters(), lr=0.1, fused=fused)
        with torch.no_grad():
            before = model(x)
        model(x).square().mean().backward()
        optimiser.step()
        with torch.no_grad():
            after = model(x)
        now = attachment.to_adapter()
    assert not torch.allclose(after, before, atol=1e-3)
    with attach(model, now), torch.no_grad():
        assert torch.allclose(model(x), after, atol=1e-5)


@pytest.mark.parametrize("case", GATED)
def test_gradients_of_soft_gates(case: str) -> None:
    """The slope along a random direction of all parameters against central differences."""
    model, x = Mixed().double(), mixed_input(torch.float64)
    with attach(model, make(model, case), trainable=True) as attachment:
        model(x).square().mean().backward()
        params = dict(attachment.named_parameters())
        generator = torch.Generator().manual_seed(5)
        direction = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
        slope = sum(float((p.grad * direction[n]).sum()) for n, p in params.items() if p.grad is not None)

        def loss(step: float) -> float:
            with torch.no_grad():
                for n, p in params.items():
                    p.add_(step * direction[n])
                value = float(model(x).square().mean())
                for n, p in params.items():
                    p.sub_(step * direction[n])
            return value

        numeric = (loss(3e-4) - loss(-3e-4)) / 6e-4
    assert all(p.grad is not None for p in params.values())
    assert abs(slope) > 1e-3
    assert slope == pytest.approx(numeric, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("case", ALL)
def test_training_round_trip(model: Mixed, case: str) -> None:
    """The trained adapter, attached for use, gives what training saw; the source is not changed by
    training."""
    x, start = mixed_input(), make(model, case)
    digest = start.content_hash
    with attach(model, start, trainable=True) as attachment:
        assert attachment.to_adapter().content_hash == digest
        with torch.no_grad():
            model(x)  # what this keeps must not outlive the next step
        optimiser = torch.optim.SGD(attachment.parameters(), lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
            attachment.gates.end_step()
        attachment.gates.mode = "hard"
        with torch.no_grad():
            seen = model(x)
        assert torch.allclose(
            seen, model(x), rtol=1e-4, atol=1e-5
        )  # the kept factors against those of the graph
        result = attachment.to_adapter()
        names = [name for name, _ in attachment.named_parameters()]
    assert start.content_hash == digest and result.content_hash != digest
    assert len(set(names)) == len(names) and all(name.startswith("unet.") for name in names)
    with attach(model, result):
        assert torch.allclose(model(x), seen, rtol=1e-4, atol=1e-5)
    if case in GATED:
        assert float(result.layers["unet.out"].terms[0].params["gate.mu"]) != 0.0


def test_two_forwards_two_backwards_and_checkpointing(model: Mixed) -> None:
    x = mixed_input().requires_grad_()
    with attach(model, make(model, "foura-dft"), trainable=True) as attachment:
        first, second = model(x), model(2 * x)
        first.sum().backward()
        second.sum().backward()
        plain = [p.grad.clone() for p in attachment.parameters() if p.grad is not None]
        for p in attachment.parameters():
            p.grad = None
        for factor in (1, 2):
            checkpoint(model, factor * x, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
        again = [p.grad for p in attachment.parameters() if p.grad is not None]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("case", ALL)
def test_folded_together_is_folded_one_by_one(model: Mixed, case: str) -> None:
    """Outputs and gradients, also where a layer is checkpointed, the strength changes and a layer does not
    run."""
    x = mixed_input().requires_grad_()
    with attach(model, make(model, case), trainable=True) as attachment:

        def gradients() -> list[Tensor | None]:
            attachment.set_strength(0.7)
            y = model(x).square().mean()
            attachment.set_strength(-1.3)
            y = y + checkpoint(model, 0.5 * x, use_reentrant=False).square().mean()  # type: ignore[union-attr]
            y = y + model.linear(model.conv(x).flatten(2).mT[..., :13].tanh().sum() * torch.ones(2, 13)).sum()
            return [y, *torch.autograd.grad(y, [x, *attachment.parameters()], allow_unused=True)]

        alone = gradients()
        with attachment.folded_together():
            together = gradients()
        for found, expected in zip(together, alone, strict=True):
            assert found is not None and expected is not None
            assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7
        with attachment.folded_together():
            model.linear(torch.ones(2, 13)).sum().backward()
        ran = {n for n, p in attachment.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert ran and all(name.startswith("unet.linear.") for name in ran)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_folded_together_ends_with_the_block(model: Mixed, error: type[BaseException]) -> None:
    """A parameter that changed is seen afterwards, whatever ended the block."""
    x = mixed_input()
    with attach(model, make(model, "foura-dct"), trainable=True) as attachment:
        before = model(x)
        with pytest.raises(error), attachment.folded_together():
            assert torch.allclose(model(x), before, atol=1e-5)
            raise error
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.zero_()
        changed = model(x)
    assert torch.equal(changed, model(x)) and not torch.allclose(changed, before, atol=1e-3)


def test_fused_terms_add_up(model: Mixed) -> None:
    """A layer of several terms, gated and fixed: the sum of what each gives alone, in use and in training."""
    net, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    weights = {"unet.root": net.weight.detach()}
    parts = [
        trained(c, weights, i)
        for i, c in enumerate([LoRAConfig(2), FouRAConfig(4), FouRAConfig(3, gate="none")])
    ]
    parts += [trained(SpectralRConfig((0, 1), strength_law="rotation"), weights, 9)]
    joined = parts[0].map_terms(lambda n, t: t)
    layer = parts[0].layers["unet.root"]
    layer = replace(layer, terms=tuple(t for p in parts for t in p.layers["unet.root"].terms))
    joined = replace(joined, layers={"unet.root": layer})
    base = net(x)
    alone = []
    for p in parts:
        with attach(net, p):
            alone.append(net(x) - base)
    with attach(net, joined):
        assert torch.allclose(net(x) - base, sum(alone), atol=1e-5)  # type: ignore[arg-type]
    with attach(net, joined, trainable=True) as attachment:
        attachment.gates.mode = "hard"
        assert torch.allclose(net(x) - base, sum(alone), atol=1e-5)  # type: ignore[arg-type]
        names = [n for n, _ in attachment.named_parameters()]
    assert len(names) == len(set(names)) and "unet.root#2.a" in names


def test_training_takes_one_adapter_and_to_adapter_needs_it(model: Mixed) -> None:
    a = make(model, "lora")
    with pytest.raises(SpectralAdapterError, match="expected one"):
        attach(model, [a, a], trainable=True)
    with attach(model, a) as attachment:
        assert list(attachment.parameters()) == []
        with pytest.raises(SpectralAdapterError, match="trainable=True"):
            attachment.to_adapter()


# -- torch.compile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora", "foura-adaptive"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_before_and_after(case: str) -> None:
    """A model compiled and called before attach must not go on without the adapter, nor with it after
    removal."""
    torch._dynamo.reset()
    counters.clear()
    model, x = Mixed(), mixed_input()
    adapter = make(model, case).with_schedule(Schedule(((0.0, 0.0), (1.0, 2.0))))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        base = compiled(x)
        with attach(compiled, adapter) as attachment:  # by the wrapper: the paths are the model's own
            for progress in (0.5, 0.25, 0.75, 0.3, 0.9):
                attachment.set_progress(progress)
                assert torch.allclose(compiled(x), model(x), atol=1e-5)
                assert not torch.allclose(compiled(x), base, atol=1e-3)
            # Without, with, and with a strength that turned out to vary: a new strength compiles nothing.
            assert counters["stats"]["unique_graphs"] <= 3
            again = torch.compile(model, backend="eager", fullgraph=True)
            assert torch.allclose(again(x), model(x), atol=1e-6)
        assert torch.equal(compiled(x), base)
    assert not any("forward" in m.__dict__ for m in model.modules())
    torch._dynamo.reset()


def test_create_names_the_layer() -> None:
    with pytest.raises(SpectralAdapterError, match=r"layer unet\.norm|cannot be adapted"):
        create({"unet.norm": torch.randn(5)}, LoRAConfig(2))
