"""Adapter: a value; names, strengths, hashes, and operations that leave their inputs alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Term, create
from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.methods import LoRAConfig, SpectralAConfig
from spectral_core.names.layer_name import LayerName
from tests.core.adapter_cases import ALL, fresh, trained

WEIGHTS = {
    "unet.a.to_q": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
    "unet.a.conv": torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2)),
    "text_encoder.b[2:9]": torch.randn(7, 5, generator=torch.Generator().manual_seed(3)),
}

_WORD = st.text(st.characters(blacklist_characters=".[]", blacklist_categories=["Cs"]), min_size=1)
_PATH = st.text(st.characters(blacklist_characters="[]\n", blacklist_categories=["Cs"]), min_size=1)
_ROWS = st.none() | st.tuples(st.integers(0, 99), st.integers(1, 99)).map(lambda r: (r[0], r[0] + r[1]))


@given(_WORD, _PATH, _ROWS)
def test_layer_names_round_trip(part: str, path: str, rows: tuple[int, int] | None) -> None:
    name = LayerName(part, path, rows)
    assert LayerName.parse(str(name)) == name


@pytest.mark.parametrize(
    "name", ["unet", "unet.", ".to_q", "unet.q[3:3]", "unet.q[4:2]", "unet.q[1:]", "unet.q[1:2]x"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(SpectralAdapterError, match="layer name"):
        LayerName.parse(name)
    with pytest.raises(SpectralAdapterError, match="layer name"):
        Adapter({name: AdapterLayer(LayerShape(2, 2), ())})


@pytest.mark.parametrize("case", ALL)
def test_a_new_adapter_changes_nothing(case: str) -> None:
    adapter = fresh(ALL[case], WEIGHTS)
    assert adapter.parts == ("unet", "text_encoder") and adapter.methods == (ALL[case].method,)
    for name, layer in adapter.layers.items():
        assert layer.shape == LayerShape.of(WEIGHTS[name])
        factors = layer.terms[0].factors(layer.shape)
        assert torch.count_nonzero(delta(factors)) == 0
        if layer.mergeable:
            assert torch.count_nonzero(delta(trained(ALL[case], WEIGHTS).layers[name].factors())) > 0


def test_parameter_count() -> None:
    assert fresh(LoRAConfig(2), WEIGHTS).parameter_count == 2 * (7 + 5) + 2 * (6 + 4 * 9) + 2 * (7 + 5)
    assert (
        fresh(SpectralAConfig((0, 1), train_scale=True), WEIGHTS).parameter_count
        == 2 * 12 + 2 * 42 + 2 * 12 + 6
    )


def test_create_names_the_layer() -> None:
    with pytest.raises(SpectralAdapterError, match=r"unet\.a\.to_q"):
        create(
            WEIGHTS,
            SpectralAConfig((0,)),
            lambda name, weight: (_ for _ in ()).throw(SpectralAdapterError("no")),
        )


OPERATIONS: dict[str, Callable[[Adapter], Adapter]] = {
    "scaled": lambda a: a.scaled(0.5),
    "layer strength": lambda a: a.with_layer_strength("*.to_q", 2.0),
    "schedule": lambda a: a.with_schedule(Schedule.window(0.0, 0.5)),
    "only": lambda a: a.only("unet.*"),
    "weights": lambda a: a.map_terms(lambda n, t: replace(t, weight=2.0)),
    "tensors": lambda a: a.map_terms(lambda n, t: replace(t, params={k: v + 1 for k, v in t.params.items()})),
    "one entry": lambda a: a.map_terms(lambda n, t: replace(t, params=_nudged(n, t))),
    "configuration": lambda a: a.map_terms(lambda n, t: replace(t, config=LoRAConfig(3, alpha=1.0))),
    "precision": lambda a: a.map_terms(
        lambda n, t: replace(t, params={k: v.double() for k, v in t.params.items()})
    ),
    "token": lambda a: replace(a, tokens={"<x>": {"text_encoder": torch.ones(1, 4)}}),
    "renamed": lambda a: replace(a, layers={f"{n}x" if "[" not in n else n: v for n, v in a.layers.items()}),
    "two terms": lambda a: replace(a, layers={n: replace(v, terms=v.terms * 2) for n, v in a.layers.items()}),
}


def _nudged(name: str, term: Term) -> dict[str, torch.Tensor]:
    params = {k: v.clone() for k, v in term.params.items()}
    if name == "text_encoder.b[2:9]":
        params["up"][-1, -1] = torch.nextafter(params["up"][-1, -1], torch.tensor(9.0))
    return params


def test_operations_return_new_values_and_every_hash_differs() -> None:
    adapter = trained(LoRAConfig(3), WEIGHTS)
    tensors = {(n, k): v.clone() for n, x in adapter.layers.items() for k, v in x.terms[0].params.items()}
    digest, hashes = adapter.content_hash, set()
    for operation in OPERATIONS.values():
        hashes.add(operation(adapter).content_hash)
        assert adapter.content_hash == digest
    assert len(hashes | {digest}) == len(OPERATIONS) + 1
    assert all(torch.equal(adapter.layers[n].terms[0].params[k], v) for (n, k), v in tensors.items())


def test_equal_content_has_an_equal_hash() -> None:
    adapter = trained(LoRAConfig(3, alpha=6), WEIGHTS)
    again = trained(LoRAConfig(3, alpha=6.0), dict(reversed(WEIGHTS.items())), 1)
    rebuilt = replace(
        adapter.scaled(1).with_provenance(name="renamed"),
        layers={n: replace(adapter.layers[n]) for n in reversed(adapter.layers)},
    )
    assert rebuilt.content_hash == adapter.content_hash
    assert again.content_hash != adapter.content_hash  # drawn in another order: other numbers
    assert copy.deepcopy(adapter) is adapter and copy.copy(adapter.layers["unet.a.to_q"].terms[0])
    assert Adapter({}).content_hash == Adapter({}).content_hash


def test_it_cannot_be_changed() -> None:
    adapter = trained(LoRAConfig(2), WEIGHTS)
    term = adapter.layers["unet.a.to_q"].terms[0]
    with pytest.raises(FrozenInstanceError):
        adapter.strength = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        adapter.layers["unet.new"] = adapter.layers["unet.a.to_q"]  # type: ignore[index]
    with pytest.raises(TypeError):
        term.params["up"] = term.params["down"]  # type: ignore[index]
    layers = dict(adapter.layers)
    copied = Adapter(layers)
    layers.clear()
    assert len(copied.layers) == 3


def test_strengths_multiply() -> None:
    adapter = trained(LoRAConfig(2), WEIGHTS).scaled(0.5).scaled(3.0)
    adapter = adapter.with_layer_strength("unet.*", 2.0).with_layer_strength("*.conv", 0.25)
    adapter = adapter.with_layer_strength("text_encoder.b[2:9]", -1.0)  # a name with brackets names itself
    assert [adapter.strength_of(n) for n in WEIGHTS] == [3.0, 0.75, -1.5]
    with pytest.raises(SpectralAdapterError, match=r"no layer matches 'vae\.\*'"):
        adapter.with_layer_strength("vae.*", 1.0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(SpectralAdapterError, match="finite"):
            adapter.scaled(bad)


def test_only() -> None:
    adapter = trained(LoRAConfig(2), WEIGHTS)
    assert list(adapter.only("unet.*").layers) == ["unet.a.to_q", "unet.a.conv"]
    assert list(adapter.only(["*.conv", "text_encoder.b[2:9]"]).layers) == [
        "unet.a.conv",
        "text_encoder.b[2:9]",
    ]
    with pytest.raises(SpectralAdapterError, match="no layer matches"):
        adapter.only("other.*")


def test_term_weights_scale_the_update() -> None:
    adapter = trained(LoRAConfig(2), WEIGHTS)
    layer = adapter.layers["unet.a.conv"]
    doubled = replace(
        layer, terms=(replace(layer.terms[0], weight=2.0), replace(layer.terms[0], weight=-0.5))
    )
    assert torch.allclose(delta(doubled.factors(0.5)), 0.75 * delta(layer.factors()), atol=1e-6)
    with pytest.raises(SpectralAdapterError, match="freeze"):
        trained(ALL["foura-adaptive"], WEIGHTS).layers["unet.a.conv"].factors()
