"""The base fingerprint: tolerant of dtypes, strict on other models; small; the same on every machine."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Generator, Tensor

from spectral_core.adapter.fingerprint import CLOSE, SAME, compare, fingerprint
from spectral_core.errors import SpectralAdapterError


def model(seed: int = 0, layers: int = 40) -> dict[str, Tensor]:
    """Linear and convolution weights of odd sizes, scaled as networks have them."""
    generator = Generator().manual_seed(seed)
    shapes = [(33, 20), (17, 40), (8, 5, 3, 3), (64, 31)]
    return {
        f"unet.blocks.{i}.to_q": 0.03 * torch.randn(shapes[i % 4], generator=generator) for i in range(layers)
    }


def changed(base: dict[str, Tensor], relative: float) -> dict[str, Tensor]:
    generator = Generator().manual_seed(9)
    return {n: w + relative * w.std() * torch.randn(w.shape, generator=generator) for n, w in base.items()}


@pytest.mark.parametrize(
    ("dtype", "verdict"),
    [
        (torch.float64, "same"),
        (torch.float16, "same"),
        (torch.bfloat16, "same"),
        (torch.float8_e4m3fn, "close"),
    ],
)
def test_other_dtypes_of_the_same_weights(dtype: torch.dtype, verdict: str) -> None:
    base = model()
    match = compare(fingerprint(base), {n: w.to(dtype) for n, w in base.items()})
    assert match.verdict == verdict and match.compared == len(base) and not match.missing


@pytest.mark.parametrize("relative", [1e-3, 1e-2, 0.1, 0.5])
def test_distance_is_the_relative_distance_of_the_weights(relative: float) -> None:
    base = model()
    other = changed(base, relative)
    square = sum(float((other[n] - w).square().sum()) for n, w in base.items())
    true = math.sqrt(square / sum(float(w.square().sum()) for w in base.values()))
    match = compare(fingerprint(base), other)
    assert match.distance == pytest.approx(true, rel=0.2)
    assert match.verdict == ("same" if true <= SAME else "close" if true <= CLOSE else "different")


def test_an_unrelated_model_is_far_away() -> None:
    match = compare(fingerprint(model()), model(seed=1))
    assert match.verdict == "different" and match.distance == pytest.approx(math.sqrt(2), rel=0.2)


def test_one_changed_layer_is_named() -> None:
    base = model()
    other = {**base, "unet.blocks.7.to_q": 2 * base["unet.blocks.7.to_q"]}
    match = compare(fingerprint(base), other)
    assert match.worst_layer == "unet.blocks.7.to_q" and match.worst_distance > 0.2
    assert "unet.blocks.7.to_q" in str(match)


def test_missing_and_other_shapes() -> None:
    base = model(layers=6)
    some = dict(list(base.items())[:3])
    match = compare(fingerprint(base), {**some, "more": torch.ones(2, 2)})
    assert match.verdict == "same" and match.compared == 3 and len(match.missing) == 3
    match = compare(fingerprint(base), {**base, "unet.blocks.0.to_q": torch.ones(5, 5)})
    assert match.verdict == "different" and match.misfits == ("unet.blocks.0.to_q",)
    match = compare(fingerprint(base), {})
    assert match.verdict == "different" and math.isinf(match.distance) and "no layer in common" in str(match)
    nothing = {n: torch.zeros_like(w) for n, w in base.items()}
    assert compare(fingerprint(nothing), nothing).verdict == "same"
    assert compare(fingerprint(nothing), base).verdict == "different"


def test_it_survives_json_and_stays_small() -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    base = {f"{name}.{i}": weight for i, weight in enumerate(model(layers=200).values())}
    text = json.dumps(fingerprint(base), separators=(",", ":"))
    assert len(text) < 50_000
    assert compare(json.loads(text), base).distance < 2e-6


def test_the_numbers_are_frozen() -> None:
    """Files depend on them: the same weight has the same numbers on every machine and in every version."""
    weight = torch.arange(12.0).reshape(3, 4) - 5
    assert fingerprint({"unet.a": weight}) == {"kind": "signs-1", "layers": {"unet.a": FROZEN}}


FROZEN: list[object] = [[3, 4], 12.083, [14.0, -2.0, 18.0, -6.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, device="meta")],
)
def test_weights_without_a_fingerprint(weight: Tensor) -> None:
    with pytest.raises(SpectralAdapterError, match=r"layer unet\.a: a weight of shape"):
        fingerprint({"unet.a": weight})


def test_not_finite_weights() -> None:
    with pytest.raises(SpectralAdapterError, match=r"layer unet\.a: the weight holds NaN"):
        fingerprint({"unet.a": torch.full((2, 2), float("nan"))})


@pytest.mark.parametrize(
    "base",
    [
        {},
        {"kind": "other", "layers": {}},
        {"kind": "signs-1"},
        {"kind": "signs-1", "layers": {"a": 3}},
        {"kind": "signs-1", "layers": {"a": [[2, 2], 1.0, [1.0]]}},
        {"kind": "signs-1", "layers": {"a": [["x"], 1.0, [1.0] * 6]}},
        {"kind": "signs-1", "layers": {"a": [[2, 2], 1.0, [math.nan] * 6]}},
        {"kind": "signs-1", "layers": {"a": [[2, 2], None, [1.0] * 6]}},
    ],
)
def test_damaged_fingerprints(base: dict[str, object]) -> None:
    with pytest.raises(SpectralAdapterError, match="base fingerprint"):
        compare(base, {"a": torch.ones(2, 2)})
