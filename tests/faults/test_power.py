"""After a power cut at any moment, with everything lost that was not synced: what was said to be saved is
there, and nothing that is there is broken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_core.files import adapter_file
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.loop import train
from spectral_core.training.runs import checkpoint, finished, place
from spectral_core.whole_file import whole_file, write_whole
from tests.core.training.training_toy import Toy
from tests.faults.disk import Disk, PowerCut
from tests.fuzz import crafted

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")


def cuts(folder: Path, work: Callable[[Path], None], most: int = 1000) -> Iterator[tuple[Disk, Path]]:
    """Every folder that a cut during the work may leave, with the disk that was cut."""
    for moment in range(most):
        here = folder / f"disk{moment}"
        here.mkdir()
        disk = Disk(here, moment)
        try:
            with disk.recording():
                work(here)
        except PowerCut:
            for found in disk.after_the_cut(folder / f"found{moment}"):
                yield disk, found
        else:
            assert moment > 0, "nothing was synced"
            return
        finally:
            disk.close()
    raise AssertionError("the work has no end")


def state_of(step: int) -> checkpoint.State:
    tensors = {"parameters.a": torch.full((32, 32), float(step))}
    return checkpoint.State(tensors, {"step": step})


def test_a_disk_that_forgets_forgets(tmp_path: Path) -> None:
    """The layer itself: a writer that does not sync loses its file, or leaves one with nothing in it."""

    def careless(folder: Path) -> None:
        (folder / "b").write_text("new")
        import os

        os.replace(folder / "b", folder / "a")
        write_whole(folder / "end", "")

    lost = {
        (found / "a").read_text() if (found / "a").exists() else None for _, found in cuts(tmp_path, careless)
    }
    assert None in lost and "" in lost and "new" not in lost


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, overwrite: bool) -> None:
    said: dict[Path, bool] = {}

    def work(folder: Path) -> None:
        write_whole(folder / "a", "old")
        with whole_file(folder / ("a" if overwrite else "b"), overwrite) as stream:
            stream.write(b"new")
        said[folder] = True

    seen = set()
    for disk, found in cuts(tmp_path, work):
        first = (found / "a").read_text() if (found / "a").exists() else None
        second = (found / "b").read_text() if (found / "b").exists() else None
        assert first in (None, "old", "new") and second in (None, "new")
        assert not said.get(disk.folder) or "new" in (first, second)
        seen.add((first, second))
    assert len(seen) >= 3


def test_checkpoints(tmp_path: Path) -> None:
    """The newest that was said to be written is found, whole; what was half done goes with the next lock."""
    written: dict[Path, int] = {}

    def work(folder: Path) -> None:
        for step in (1, 2, 3):
            checkpoint.write(state_of(step), folder, step)
            written[folder] = step
            checkpoint.keep_newest(folder, 2)

    count = 0
    for disk, found in cuts(tmp_path, work):
        newest, notes = checkpoint.read_newest(found)
        least = written.get(disk.folder, 0)
        assert not notes and (newest.values["step"] if newest else 0) >= least
        if newest is not None:
            wanted = state_of(newest.values["step"]).tensors["parameters.a"]
            assert torch.equal(newest.tensors["parameters.a"], wanted)
        with place.locked(found):
            assert not [*found.glob("*.part"), *found.glob(".*.part")]
        count += 1
    assert count > 10


@pytest.mark.parametrize("kind", [LoRAConfig(4), FouRAConfig(4, transform="dft", gate="adaptive")])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, kind: Any) -> None:
    config = TrainConfig(steps=4, learning_rate=1e-2, seed=3)

    def trained(folder: Path) -> str:
        toy = Toy(kind)
        train(toy.setup, config, kind.method, run=place.Run(folder=folder, checkpoint_every=1))
        return toy.digest

    uninterrupted = trained(tmp_path / "whole")
    count = 0
    for _, found in cuts(tmp_path, lambda folder: (trained(folder), None)[1]):
        assert trained(found) == uninterrupted
        count += 1
    assert count > 12


def test_settings_and_record_of_a_run(tmp_path: Path) -> None:
    settings = {"config": {"steps": 3}}
    run = place.Place(Path(), "cat", "new")

    def work(folder: Path) -> None:
        here = place.Place(folder, "cat", "new")
        place.claim(here, settings)
        result = finished.Result(folder / "cat.safetensors", False)
        finished.save_result(crafted.adapter(), result, here, 3)

    for _, found in cuts(tmp_path, work):
        assert place.read_settings(found) in (None, settings)
        result = finished.find_result(place.Place(found, run.name, "new"), found)
        if (found / "cat.safetensors").exists():
            adapter_file.load(found / "cat.safetensors")
        if result.made:
            assert result.is_there, "the record names a file that the power has taken"
