"""Merge: weights plus ΔW rounded once, exact unmerging in any order, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from spectral_core.adapter.schedule import Schedule
from spectral_core.attach.attaching import attach
from spectral_core.attach.merging import _Record, merge_into
from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.layers import as_fp32
from spectral_core.maths.lowrank import delta
from spectral_core.methods import LoRAConfig, SpectralAConfig
from tests.core.adapter_cases import GATED, MERGEABLE, Mixed, instance_keys, mixed_weights, trained

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MERGEABLE)
def test_one_rounding(case: str, dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    before, keys = state(model), instance_keys(model)
    adapter = trained(MERGEABLE[case], mixed_weights(model)).scaled(0.7)
    with merge_into(model, adapter):
        for name, path, rows in (
            ("unet.linear", "linear", slice(None)),
            ("unet.qkv[15:21]", "qkv", slice(15, 21)),
        ):
            original = as_fp32(before[f"{path}.weight"][rows])
            change = delta(adapter.layers[name].factors(adapter.strength)).to(original.dtype)
            merged = model.state_dict()[f"{path}.weight"][rows]
            assert merged.dtype == dtype
            assert torch.allclose(merged, (original + change).to(dtype), rtol=0, atol=1e-6)
            assert (merged != before[f"{path}.weight"][rows]).float().mean() > 0.5
        assert torch.equal(model.qkv.weight[14], before["qkv.weight"][14])  # between the slices
    assert same(model, before) and instance_keys(model) == keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merges_commute_and_unmerge_in_any_order(dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    before, identity = state(model), [id(p) for p in model.parameters()]
    a = trained(MERGEABLE["lora"], mixed_weights(model), 1)
    b = trained(MERGEABLE["spectral-a"], mixed_weights(model), 2)
    with merge_into(model, b):
        only_b = state(model)
    with merge_into(model, [a, b]):
        both = state(model)
    one, two = merge_into(model, b), merge_into(model, a)
    assert same(model, both)
    two.unmerge()
    assert same(model, only_b)
    two = merge_into(model, a)
    one.unmerge()
    one.unmerge()
    two.unmerge()
    assert same(model, before)
    assert [id(p) for p in model.parameters()] == identity
    assert not any(p.__dict__ for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["merge", "unmerge"])
def test_an_interruption(monkeypatch: pytest.MonkeyPatch, error: type[BaseException], moment: str) -> None:
    model = Mixed()
    before, calls = state(model), []
    adapter = trained(LoRAConfig(2), mixed_weights(model))
    original = _Record.write

    def write(self: _Record, *args: object) -> None:
        calls.append(self)
        original(self, *args)  # type: ignore[arg-type]
        if len(calls) == 3:
            raise error("in the middle")

    merged = merge_into(model, adapter) if moment == "unmerge" else None
    monkeypatch.setattr(_Record, "write", write)
    with pytest.raises(error):
        if merged is None:
            merge_into(model, adapter)
        else:
            merged.unmerge()
    if merged is not None:
        merged.unmerge()
    assert len(calls) > 3 and same(model, before)


def test_leaving_by_an_exception_unmerges() -> None:
    model = Mixed()
    before = state(model)
    with pytest.raises(ZeroDivisionError), merge_into(model, trained(LoRAConfig(2), mixed_weights(model))):
        raise ZeroDivisionError
    assert same(model, before)


def test_originals_elsewhere_and_conversion_meanwhile() -> None:
    model = Mixed()
    expected = state(copy.deepcopy(model).half())
    merged = merge_into(model, trained(LoRAConfig(2), mixed_weights(model)), keep_on="cpu")
    model.half()
    merged.unmerge()
    assert same(model, expected)


def test_a_foreign_change_is_not_lost() -> None:
    model = Mixed()
    before = state(model)
    adapter = trained(LoRAConfig(2), mixed_weights(model))
    merged = merge_into(model, adapter)
    with torch.no_grad():
        model.linear.weight.mul_(2)
    kept = state(model)
    with pytest.raises(SpectralAdapterError, match=r"unet\.linear: its weight was changed"):
        merged.unmerge()
    with pytest.raises(SpectralAdapterError, match=r"unet\.linear: its weight was changed"):
        merge_into(model, adapter)
    assert same(model, kept)
    merged.unmerge(discard_changes=True)
    assert same(model, before)


def test_inference_tensors_merge_too() -> None:
    with torch.inference_mode():
        model = Mixed()
        adapter = trained(SpectralAConfig((0, 1)), mixed_weights(model))
        before = state(model)
    with merge_into(model, adapter):
        assert not same(model, before)
    assert same(model, before)


def test_attention_that_is_read_directly_can_be_merged() -> None:
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(3, 2, 8)
    base = attention(x, x, x)[0]
    adapter = trained(LoRAConfig(2), {"unet.out_proj": attention.out_proj.weight})
    with merge_into(attention, adapter):
        assert not torch.allclose(attention(x, x, x)[0], base, atol=1e-3)
    assert torch.equal(attention(x, x, x)[0], base)


@pytest.mark.parametrize("case", GATED)
def test_an_adaptive_gate_is_refused(case: str) -> None:
    model = Mixed()
    before = state(model)
    with pytest.raises(SpectralAdapterError, match=r"unet\.conv has an adaptive gate.*freeze"):
        merge_into(model, trained(GATED[case], mixed_weights(model)))
    assert same(model, before)


def test_what_weights_cannot_hold() -> None:
    model = Mixed()
    adapter = trained(LoRAConfig(2), mixed_weights(model))
    with pytest.raises(SpectralAdapterError, match="with_schedule"):
        merge_into(model, adapter.with_schedule(Schedule.window(0.1, 0.5)))
    with pytest.raises(SpectralAdapterError, match="meta device"):
        merge_into(Mixed().to("meta"), adapter)
    model.linear.weight = nn.Parameter(torch.zeros(17, 13, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SpectralAdapterError, match=r"unet\.linear: a quantised weight.*int8"):
        merge_into(model, adapter)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    weights = {"unet.0": torch.randn(4, 4), "unet.1": torch.randn(4, 4)}
    with pytest.raises(SpectralAdapterError, match=r"unet\.0 and unet\.1 share one weight"):
        merge_into(tied, trained(LoRAConfig(2), weights))


def test_tied_weights_are_told_live_and_merged() -> None:
    """The two differ there by nature: in the weight it is everywhere, in the forward path at one place."""
    tree = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tree[1].weight = tree[0].weight
    adapter = trained(LoRAConfig(2), {"unet.0": torch.randn(4, 4), "unet.2": torch.randn(4, 4)})
    said = r"unet\.0: its weight is tied to that of 1: merged the adapter changes them too, live it does not"
    x = torch.randn(3, 4)
    base = tree[1](x)
    with attach(tree, adapter) as live:
        assert re.search(said, str(live.report)) and list(live.report.tied) == ["unet.0"]
        assert torch.equal(tree[1](x), base)
    with merge_into(tree, adapter) as merged:
        assert merged.report.tied == live.report.tied
        assert not torch.equal(tree[1](x), base)
    assert torch.equal(tree[1](x), base)
