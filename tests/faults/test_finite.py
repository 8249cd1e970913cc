"""What is accepted is finite in use, and what is not is refused with its layer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Term
from spectral_core.attach.attaching import attach
from spectral_core.attach.merging import merge_into
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.files.lora_import import read_lora
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import Factors, delta
from spectral_core.methods import (
    METHODS,
    FouRAConfig,
    LoRAConfig,
    MethodConfig,
    SpectralAConfig,
    SpectralRConfig,
)
from spectral_core.statistics import file as statistics_file
from spectral_core.statistics.moments import Statistics
from tests.fuzz import crafted


def lora(down: float, up: float, alpha: float | None = None, dtype: torch.dtype = torch.float32) -> Adapter:
    params = {"down": torch.full((2, 4), down, dtype=dtype), "up": torch.full((4, 2), up, dtype=dtype)}
    layer = AdapterLayer(LayerShape(4, 4), (Term(LoRAConfig(2, alpha), params),))
    return Adapter({"unet.a": layer})


@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        (lora(3e38, 3e38), torch.float32),
        (lora(1e300, 1e300, dtype=torch.float64), torch.float32),
        (lora(1.0, 1.0, 1e35), torch.float32),
        (lora(1.0, float("nan")), torch.float32),
        (lora(1.0, 1.0, 7e5), torch.float16),
    ],
)
def test_an_update_that_is_not_finite_is_refused_live_and_merged(adapter: Adapter, base: torch.dtype) -> None:
    tree = nn.ModuleDict({"a": nn.Linear(4, 4, dtype=base)})
    before = tree["a"].weight.detach().clone()
    with pytest.raises(SpectralAdapterError, match=r"layer unet\.a"):
        merge_into(tree, adapter, "unet")
    assert torch.equal(tree["a"].weight, before)
    with pytest.raises(SpectralAdapterError, match=r"layer unet\.a"), attach(tree, adapter, "unet"):
        tree["a"](torch.ones(1, 4, dtype=base))
    assert torch.equal(tree["a"].weight, before)


def test_a_base_with_nan_is_named_before_a_merge() -> None:
    tree = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with torch.no_grad():
        tree["a"].weight[1, 2] = float("nan")
    with pytest.raises(SpectralAdapterError, match="the model's own weight holds NaN"):
        merge_into(tree, lora(1.0, 1.0), "unet")


def test_strengths_multiply_within_bounds() -> None:
    with pytest.raises(SpectralAdapterError, match="at most 1e\\+06"):
        lora(1.0, 1.0).scaled(1e308)
    adapter = lora(1.0, 1.0).scaled(1e5).with_layer_strength("unet.*", 1e5)
    with pytest.raises(SpectralAdapterError, match=r"layer unet\.a: its strength"):
        adapter.strength_of("unet.a")


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(2),
        FouRAConfig(2, gate="none"),
        SpectralAConfig((0, 1), True),
        SpectralRConfig((0, 1), True),
    ],
)
def test_tensors_of_different_precision_make_the_same_update(config: MethodConfig) -> None:
    layer = next(iter(crafted.adapter(config).layers.values()))
    (term,) = layer.terms
    wanted = delta(term.factors(layer.shape))
    for wide in term.params:
        params = {k: v.double() if k == wide else v for k, v in term.params.items()}
        found = METHODS[config.method].fold(config, layer.shape, params, 1.0)
        assert torch.allclose(delta(found).float(), wanted, atol=1e-6), wide


def test_factors_of_two_precisions_take_the_better_one() -> None:
    found = Factors(torch.ones(1, 2), torch.ones(2, 1, dtype=torch.float64))
    assert found.down.dtype == found.up.dtype == torch.float64


def test_a_mid_of_another_precision(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_c.lora_down.weight": torch.rand(2, 4, 1, 1),
        "lora_unet_c.lora_mid.weight": torch.rand(2, 2, 3, 3).double(),
        "lora_unet_c.lora_up.weight": torch.rand(4, 2, 1, 1).half(),
    }
    adapter = read_lora(crafted.file(tensors, {}, tmp_path / "a.safetensors")).adapter
    assert delta(next(iter(adapter.layers.values())).factors()).dtype == torch.float64


@pytest.mark.parametrize(
    "shapes",
    [
        {"w1_a": (6, 2), "w1_b": (), "w2_a": (6, 2), "w2_b": (2, 8)},
        {"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (6, 2), "w2_b": (2, 1)},
        {"w1_a": (1, 6, 2), "w1_b": (6, 8), "w2_a": (1, 6, 2), "w2_b": (6, 8)},
    ],
)
def test_halves_of_a_loha_that_do_not_fit(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {f"lora_unet_h.hada_{name}": torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(SpectralAdapterError, match="the shapes do not fit each other"):
        read_lora(crafted.file(tensors, {}, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("words", ["[" * 9000, "[1e999]", "[" + "9" * 5000 + "]"])
def test_trained_words_that_are_no_json_are_words(tmp_path: Path, words: str) -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(1, 4),
        "lora_unet_a.lora_up.weight": torch.ones(4, 1),
    }
    path = crafted.file(tensors, {"trained_words": words}, tmp_path / "a.safetensors")
    assert read_lora(path).adapter.provenance.trigger_words == (words,)


@pytest.mark.parametrize(
    ("moment", "count", "message"),
    [
        (torch.full((3, 3), float("nan")), 5, "NaN"),
        (torch.ones(3, 2), 5, "shape"),
        (torch.ones(3, 3, dtype=torch.int32), 5, "expected floats"),
        (torch.ones(3, 3), 0, "count"),
        (torch.ones(3, 3), -1, "count"),
        (torch.ones(()), 1, "shape"),
    ],
)
def test_statistics(tmp_path: Path, moment: torch.Tensor, count: int, message: str) -> None:
    path = statistics_file.save({"unet.a": Statistics(moment, count)}, tmp_path / "a.safetensors")
    with pytest.raises(SpectralAdapterError, match=message):
        statistics_file.load(path)["unet.a"]


def test_a_surrogate_in_one_file_does_not_stop_the_others(tmp_path: Path) -> None:
    from spectral_core.training.engine import columns

    path = adapter_file.save(crafted.adapter(SpectralAConfig((0, 1))), tmp_path / "good.safetensors")
    header, data = crafted.parts(path)
    header["__metadata__"][adapter_file.CONFIG_KEY] = "\ud800"
    import json

    crafted.raw(json.dumps(header).encode(), data, tmp_path / "bad.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
    layers = {"layers": dict.fromkeys(crafted.adapter().layers)}
    held, skipped = columns.files_of(tmp_path, layers)
    assert [use.holder for use in held] == ["good.safetensors"]
    assert any("bad.safetensors" in why for why in skipped)
