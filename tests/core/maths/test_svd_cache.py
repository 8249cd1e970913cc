"""The on-disk cache: keys, hits, damage, eviction, unwritable folders, two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.maths import svd_cache
from spectral_core.maths.svd import Columns, SVDColumns, top_columns
from spectral_core.maths.svd_cache import SUFFIX, SVDCache, content_key, default_cache_folder

TOP = Columns.block(0, 3)


def weight(seed: int = 0, shape: tuple[int, ...] = (40, 30)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: SVDColumns, b: SVDColumns) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in "usv")
    return tensors and (a.columns, a.solver, a.residual) == (b.columns, b.solver, b.residual)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def test_second_time_comes_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (TOP, Columns.block(1, 4), Columns.listed([5, 2]), Columns.bottom(2)):
        computed = SVDCache(tmp_path).get_or_compute(weight(), columns)
        cache = SVDCache(tmp_path)
        with monkeypatch.context() as patch:
            patch.delattr(svd_cache, "select_columns")
            assert same(cache.get_or_compute(weight(), columns), computed)
        assert (cache.report.hits, cache.report.misses, cache.report.problem) == (1, 0, "")
    assert same(SVDCache(tmp_path).get_or_compute(weight(), TOP), top_columns(weight(), 3))
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_single_element_changes_the_key(dtype: torch.dtype) -> None:
    base = weight(1, (700, 900)).to(dtype)  # several hashed pieces in every dtype
    seen = {content_key(base, TOP)}
    places = [0, 1, base.numel() // 2, base.numel() - 1]
    places += torch.randint(base.numel(), (10,), generator=torch.Generator().manual_seed(5)).tolist()
    for place in places:
        changed = base.clone()
        raw = changed.view(-1).view(torch.uint8)
        raw[place * base.element_size()] ^= 1  # the lowest bit of one element
        seen.add(content_key(changed, TOP))
    swapped = base.clone().view(-1)
    swapped[[0, 400_000]] = swapped[[400_000, 0]]
    seen.add(content_key(swapped.view_as(base), TOP))
    assert len(seen) == 2 + len(set(places))


def test_key_depends_on_shape_dtype_and_columns_but_not_layout() -> None:
    base = weight(2, (6, 8))
    variants = [
        content_key(base, TOP), content_key(base.view(8, 6), TOP), content_key(base.view(6, 2, 2, 2), TOP),
        content_key(base.view(torch.float16).view(6, 16), TOP), content_key(base, Columns.block(0, 2)),
        content_key(base, Columns.listed([2, 1, 0])), content_key(base, Columns.bottom(3)),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert content_key(base.T.contiguous().T, TOP) == variants[0]
    with torch.inference_mode():
        assert content_key(base.clone(), TOP) == variants[0]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "noise", "other entry", "no metadata"])
def test_damaged_entries_are_rebuilt(tmp_path: Path, damage: str) -> None:
    whole = SVDCache(tmp_path).get_or_compute(weight(), TOP)
    (path,) = entries(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-7]
    elif damage == "empty":
        data = bytearray()
    elif damage == "flipped":
        data[-3] ^= 4
    elif damage == "noise":
        data = bytearray(os.urandom(500))
    elif damage == "other entry":
        data = bytearray(svd_cache._encode(top_columns(weight(9), 3), "0" * 64))
    else:
        data = bytearray(svd_cache.save_safetensors({"u": whole.u, "s": whole.s, "v": whole.v}))
    path.write_bytes(data)
    cache = SVDCache(tmp_path)
    assert same(cache.get_or_compute(weight(), TOP), whole)
    assert (cache.report.rebuilt, cache.report.misses) == (1, 1)
    assert same(cache.get_or_compute(weight(), TOP), whole) and cache.report.hits == 1


def test_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache = SVDCache(tmp_path)
    for seed in range(3):
        cache.get_or_compute(weight(seed), TOP)
        path = tmp_path / f"{content_key(weight(seed), TOP)}{SUFFIX}"
        os.utime(path, (1000 + seed, 1000 + seed))
    size = entries(tmp_path)[0].stat().st_size
    cache.get_or_compute(weight(0), TOP)  # used again: now the newest
    small = SVDCache(tmp_path, max_bytes=2 * size + size // 2)
    small.get_or_compute(weight(3), TOP)
    left = {path.name[:64] for path in entries(tmp_path)}
    assert left == {content_key(weight(0), TOP), content_key(weight(3), TOP)} and small.report.evicted == 2


def test_an_entry_beyond_the_bound_is_not_written(tmp_path: Path) -> None:
    cache = SVDCache(tmp_path, max_bytes=100)
    assert same(cache.get_or_compute(weight(), TOP), top_columns(weight(), 3))
    assert not entries(tmp_path)
    with pytest.raises(SpectralAdapterError, match="0 or more"):
        SVDCache(tmp_path, max_bytes=-1)


def test_left_over_temporary_files_are_cleared(tmp_path: Path) -> None:
    old, new = tmp_path / ".old.part", tmp_path / ".new.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    SVDCache(tmp_path).get_or_compute(weight(), TOP)
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written_costs_only_speed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = SVDCache(tmp_path / "file" / "cache")
    for _ in range(2):
        assert same(cache.get_or_compute(weight(), TOP), top_columns(weight(), 3))
    assert cache.report.misses == 2 and "cannot write" in cache.report.problem


def test_a_failed_rename_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "in use")

    cache = SVDCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(svd_cache.os, "replace", refuse)
        assert same(cache.get_or_compute(weight(), TOP), top_columns(weight(), 3))
    assert list(tmp_path.iterdir()) == [] and "in use" in cache.report.problem
    cache.get_or_compute(weight(), TOP)
    assert cache.report.problem == "" and len(entries(tmp_path)) == 1


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECTRAL_ADAPTERS_CACHE", str(tmp_path / "mine"))
    assert default_cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("SPECTRAL_ADAPTERS_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "spectral_adapters"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "spectral_adapters"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert default_cache_folder() == tmp_path / "spectral_adapters"


HAMMER = """
import sys, torch
from spectral_core.maths.svd import Columns, top_columns
from spectral_core.maths.svd_cache import SVDCache
torch.set_num_threads(1)
weights = [torch.randn(20, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]
wanted = [top_columns(w, 3) for w in weights]
cache = SVDCache(sys.argv[1], max_bytes=int(sys.argv[2]))
for turn in range(60):
    i = (turn * 5 + int(sys.argv[3])) % 6
    got = cache.get_or_compute(weights[i], Columns.block(0, 3))
    assert torch.equal(got.u, wanted[i].u) and torch.equal(got.v, wanted[i].v)
assert cache.report.rebuilt == 0 and not cache.report.problem, cache.report
"""


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """A bound of about three of six entries, so that both evict what the other reads and writes."""
    root = Path(svd_cache.__file__).parents[2]
    command = [sys.executable, "-c", HAMMER, str(tmp_path), "3500"]
    both = [
        subprocess.Popen([*command, str(i)], cwd=root, stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    for process in both:
        _, trouble = process.communicate(timeout=120)
        assert process.returncode == 0, trouble
    assert 1 <= len(entries(tmp_path)) <= 5 and not list(tmp_path.glob(".*.part"))
