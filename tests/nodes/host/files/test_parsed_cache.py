"""Memory of adapters from files: held once, as the file's tensors or folded, and let go with the node."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nodes.conftest import Pack

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FILE = "wide.safetensors"


@pytest.fixture
def wide(ours: Pack, folders: Any, save: Any) -> Path:
    """A file with one adaptive FouRA layer whose matrices are too large to be kept for nothing."""
    methods, adapters = ours.module("spectral_core.methods"), ours.module("spectral_core.adapter.adapter")
    generator = torch.Generator().manual_seed(5)
    weights = {LAYER: torch.randn(200, 160, generator=generator)}
    made = adapters.create(weights, methods.FouRAConfig(4), None, generator)

    def moved(name: str, term: Any) -> Any:
        learned = methods.method_of(term.config).trainable(term.config)
        noise = {k: 0.1 * torch.randn(term.params[k].shape, generator=generator) for k in learned}
        params = {k: v + noise[k] if k in noise else v for k, v in term.params.items()}
        return adapters.Term(term.config, params)

    return Path(save(made.map_terms(moved), folders.models / FILE))


def held(term: Any) -> set[str]:
    return set(term.params._held)


def fold(ours: Pack, adapter: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = ours.module("nodes.host.apply.folded_cache").folded(
        LAYER, adapter.layers[LAYER], (0,)
    )
    return found


def test_folding_sets_the_matrices_down_and_they_are_read_again(ours: Pack, wide: Path) -> None:
    read = ours.module("spectral_core.files.adapter_file").load(wide)
    opened = ours.module("nodes.host.files.adapters").open_adapter(FILE)
    (term,), (expected,) = opened.adapter.layers[LAYER].terms, read.layers[LAYER].terms
    assert held(term) == set(expected.params)
    up, down = fold(ours, opened.adapter)
    assert up.untyped_storage().nbytes() == up.nbytes and down.untyped_storage().nbytes() == down.nbytes
    assert set(expected.params) - held(term) == {"a", "b"}, "gates stay"
    assert term.params["a"] is term.params["a"], "one tensor for those who use it at the same time"
    assert set(term.params) == set(expected.params) and "a" in term.params and "c" not in term.params
    for name, value in expected.params.items():
        assert torch.equal(term.params[name], value), name
    assert not term.params["a"].is_inference()
    assert opened.adapter.content_hash == read.content_hash
    with pytest.raises(KeyError):
        term.params["c"]


def test_an_adapter_with_its_tensors_set_down_is_saved_and_fused(
    ours: Pack, wide: Path, tmp_path: Any
) -> None:
    fileformat, fusion = ours.module("spectral_core.files.adapter_file"), ours.module("spectral_core.fusion")
    adapter = ours.module("nodes.host.files.adapters").open_adapter(FILE).adapter
    fold(ours, adapter)
    saved = fileformat.load(fileformat.save(adapter, tmp_path / "again.safetensors"))
    assert saved.content_hash == adapter.content_hash
    fused = fusion.fuse([adapter, adapter.scaled(0.5)], "sum", freeze_gates=True).adapter
    assert len(fused.layers[LAYER].terms) >= 1


@pytest.mark.parametrize("change", ["written", "removed"])
def test_a_file_that_is_another_one_now_is_refused(ours: Pack, wide: Path, change: str) -> None:
    adapter = ours.module("nodes.host.files.adapters").open_adapter(FILE).adapter
    up, _ = fold(ours, adapter)
    if change == "written":
        os.utime(wide, ns=(1, 1))
    else:
        wide.unlink()
    with pytest.raises(ours.error, match=r"wide\.safetensors"):
        adapter.layers[LAYER].terms[0].params["a"]
    assert torch.equal(fold(ours, adapter)[0], up), "pictures need the file no more"


def test_an_adapter_goes_with_its_node_and_outputs(ours: Pack, wide: Path) -> None:
    factors = ours.module("nodes.host.apply.folded_cache")
    gc.collect()
    before = len(factors._KEPT)
    node, other = ours.node("LoadFouRA"), ours.node("LoadFouRA")
    first = node.load(FILE, 1.0, 1.0)["result"][2]
    fold(ours, first)
    assert (
        node.load(FILE, 0.5, 1.0)["result"][2] is first and other.load(FILE, 1.0, 1.0)["result"][2] is first
    )
    del first
    gc.collect()
    assert len(factors._KEPT) == before + 1, "the node keeps it for the next strength"
    assert node.load(FILE, 0.2, 1.0)["result"][2] in [other.load(FILE, 1.0, 1.0)["result"][2]]
    del node, other
    gc.collect()
    assert len(factors._KEPT) == before
