"""Files read tensor by tensor: the same adapters, nothing held, and no mixture of two states of a file."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_core.adapter.adapter import Adapter, Term
from spectral_core.analysis.interference import retention
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load, save
from spectral_core.files.container import SafeFile
from spectral_core.files.lazy_tensors import LazyParams
from spectral_core.fusion import fuse
from spectral_core.statistics.collect import collect, modules_of
from spectral_core.statistics.moments import Statistics
from tests.core.fusion.fusion_cases import GATED, adapter, concepts, inputs
from tests.core.fusion.test_fusion_statistics import Rows


def files(folder: Path) -> list[Path]:
    found = []
    for i, concept in enumerate(concepts()):
        found.append(save(concept.map_terms(storable), folder / f"{i}.safetensors"))
    return found


def storable(_: str, term: Term) -> Term:
    """In float32, with singular values that are some."""
    params = {k: v.abs().float() if k == "s" else v.float() for k, v in term.params.items()}
    return Term(term.config, params, term.weight)


def test_the_same_adapter_and_the_same_fusions(tmp_path):
    paths = files(tmp_path)
    eager, lazy = [load(p) for p in paths], [load(p, lazy=True) for p in paths]
    for a, b in zip(eager, lazy, strict=True):
        assert a.content_hash == b.content_hash and a.parameter_count == b.parameter_count
    for method in ("sum", "average", "spectral", "subspaces"):
        found = [fuse(given, method, [1.0, -0.5, 2.0], rank=3).adapter for given in (eager, lazy)]
        assert found[0].content_hash == found[1].content_hash, method


def test_a_live_gate_is_found_again_though_its_tensors_are_read_anew(tmp_path):
    paths = [
        save(adapter(GATED, i, f"c{i}").map_terms(storable), tmp_path / f"{i}.safetensors") for i in (4, 5)
    ]
    kept = []
    for lazy in (False, True):
        given = [load(p, lazy=lazy) for p in paths]
        statistics = [seen(given, inputs(i)) for i in range(2)]
        result = fuse(given, "average", statistics=statistics)
        assert not result.adapter.mergeable
        kept.append([c.retention for c in result.report.concepts])
        assert retention(result.adapter, given, statistics).total == pytest.approx(kept[-1], abs=1e-6)
    assert kept[0] == pytest.approx(kept[1], abs=1e-12)


def seen(given: list[Adapter], x: dict[str, Tensor]) -> dict[str, Statistics]:
    """Statistics in the files' precision."""
    model = Rows().float()
    with collect(modules_of(model, given, "unet"), given) as collector:
        model.a(x["unet.a"].float())
        model.b(x["unet.b"].float())
    return collector.statistics()


def test_nothing_is_held(tmp_path):
    adapter = load(files(tmp_path)[0], lazy=True)
    term = next(iter(adapter.layers.values())).terms[0]
    assert isinstance(term.params, LazyParams)
    once = term.params["down"]
    assert term.params["down"] is not once
    gone = weakref.ref(once)
    del once
    gc.collect()
    assert gone() is None
    assert "down" in term.params and "else" not in term.params and len(term.params) == 2
    with pytest.raises(KeyError):
        term.params["else"]


def test_a_file_that_changes_is_noticed(tmp_path):
    path = files(tmp_path)[0]
    adapter = load(path, lazy=True)
    save(load(path).scaled(0.5), path, overwrite=True)
    with pytest.raises(SpectralAdapterError, match=r"0\.safetensors.*has changed"):
        fuse([adapter], error=0.1)
    path.unlink()
    with pytest.raises(SpectralAdapterError, match="cannot be read"):
        fuse([adapter], error=0.1)


def test_bad_numbers_are_named_when_they_are_read(tmp_path):
    path = files(tmp_path)[0]
    raw = bytearray(path.read_bytes())
    raw[-4:] = torch.tensor(float("nan")).numpy().tobytes()
    path.write_bytes(raw)
    adapter = load(path, lazy=True)  # the header is sound
    with pytest.raises(SpectralAdapterError, match=r"0\.safetensors: tensor unet\."):
        fuse([adapter], error=0.1)


def test_the_result_may_replace_one_of_its_sources(tmp_path):
    paths = files(tmp_path)[:2]
    expected = fuse([load(p) for p in paths]).adapter.content_hash
    fused = fuse([load(p, lazy=True) for p in paths]).adapter
    save(fused, paths[0], overwrite=True)
    assert load(paths[0]).content_hash == expected and os.listdir(tmp_path)


def test_saving_holds_one_term_at_a_time(tmp_path, monkeypatch):
    paths = files(tmp_path)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = SafeFile.read

    def counted(self: SafeFile, names: list[str] | None = None) -> dict[str, Tensor]:
        nonlocal most
        found = read(self, names)
        alive.extend(weakref.ref(tensor) for tensor in found.values())
        most = max(most, sum(each() is not None for each in alive))
        return found

    fused = fuse([load(p, lazy=True) for p in paths]).adapter
    monkeypatch.setattr(SafeFile, "read", counted)
    saved = save(fused, tmp_path / "fused.safetensors")
    monkeypatch.undo()
    largest = max(len(term.params) for layer in fused.layers.values() for term in layer.terms)
    assert len(alive) >= 2 * sum(len(t.params) for layer in fused.layers.values() for t in layer.terms)
    assert most <= largest + 1
    whole = save(fuse([load(p) for p in paths]).adapter, tmp_path / "whole.safetensors")
    assert load(saved).content_hash == load(whole).content_hash


def test_a_tensor_that_changes_while_it_is_saved_leaves_no_file(tmp_path):
    class Growing(LazyParams):
        asked = 0

        def __getitem__(self, name: str) -> Tensor:
            self.asked += 1
            return super().__getitem__(name) if self.asked <= len(self) else torch.zeros(3, 3)

    source = load(files(tmp_path)[0], lazy=True)
    growing = source.map_terms(
        lambda name, term: Term(term.config, Growing(dict(term.params), "", tuple(term.params)), term.weight)
    )
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SpectralAdapterError, match=r"changed while it was saved"):
        save(growing, tmp_path / "growing.safetensors")
    assert sorted(os.listdir(tmp_path)) == before
