"""The report before a fusion: who bleeds into whom, where, and in which form it is told."""

from __future__ import annotations

import json

import pytest

from spectral_core.analysis.interference import affinity, crosstalk, overlap
from spectral_core.analysis.interference_report import measure
from spectral_core.errors import SpectralAdapterError
from tests.core.fusion.fusion_cases import GATED, SHAPES, adapter, concepts, inputs
from tests.core.fusion.test_fusion_statistics import gathered


def statistics(adapters):
    return [gathered(adapters, inputs(i)) for i in range(len(adapters))]


def test_numbers_are_those_of_the_measurements_at_the_fusions_weights():
    adapters = concepts()
    given, weights = statistics(adapters), [1.0, -2.0, 0.5]
    found = measure(adapters, given, weights)
    scaled = [a.scaled(w) for a, w in zip(adapters, weights, strict=True)]
    assert found.concepts == ("one", "two", "three")
    assert found.overlaps == tuple(overlap(scaled)) and len(found.overlaps) == 6
    assert found.crosstalk == crosstalk(scaled, given) and found.affinity == affinity(scaled)
    assert found.crosstalk.total != crosstalk(adapters, given).total
    assert measure(adapters).crosstalk is None


def test_warnings_name_the_pair_the_direction_and_the_worst_layers():
    adapters = [adapter(c.layers["unet.a"].terms[0].config, i + 1, n) for i, (c, n) in enumerate(
        zip(concepts()[:1] * 2, ("loud", "quiet"), strict=True))]  # fmt: skip
    adapters[1] = adapters[1].scaled(0.05).with_layer_strength("unet.b", 3.0)
    for given, measured in ((statistics(adapters), True), (None, False)):
        found = measure(adapters, given)
        assert [(w.from_concept, w.into_concept) for w in found.warnings] == [("loud", "quiet")]
        warning = found.warnings[0]
        known = found.crosstalk if measured else found.affinity
        assert warning.strength == known.total[1][0] > 0.3 and warning.measured is measured
        by_layer = sorted(((known.layers[n][1][0], n) for n in SHAPES), reverse=True)
        assert warning.worst == tuple((n, v) for v, n in by_layer)
        text = str(warning)
        assert text.startswith("loud will bleed into quiet") and text.endswith(f"({by_layer[1][0]:.2f})")
        assert ("is predicted to do" in text) is not measured
        assert f"warning: {text}" in found.text
    assert measure(adapters, threshold=1e9).warnings == ()


def test_forms():
    adapters = [*concepts()[:2], adapter(GATED, 4, "live")]
    found = measure(adapters, statistics(adapters))
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["crosstalk"]["total"][0][2] == found.crosstalk.total[0][2]
    assert plain["overlaps"][0]["pair"] == ["one", "two"] and plain["warnings"][0]["worst"]
    assert "one and two: rows overlap" in found.text and "crosstalk on activations: " in found.text
    assert "crosstalk predicted from the weights" in measure(adapters).text
    pictures = found.pictures()
    assert set(pictures) == {"bleed", "bleed_by_layer", "overlap_by_layer"}
    assert all(min(picture.size) > 100 for picture in pictures.values())
    apart = [adapters[0].only(["unet.a"]), adapters[1].only(["unet.b"])]
    assert "overlap_by_layer" not in measure(apart).pictures() and measure(apart).warnings == ()


def test_refused():
    with pytest.raises(SpectralAdapterError, match="1 weights for 2 adapters"):
        measure(concepts()[:2], weights=[1.0])
    with pytest.raises(SpectralAdapterError, match="expected at least two"):
        measure(concepts()[:1])
