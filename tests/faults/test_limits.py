"""What the system refuses: a user who may not, a read-only disk, too little memory, a clock that jumps.

Every refusal is one clear error, or costs what can be done without; what is there stays.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.files.lora_import import read_lora
from spectral_core.maths.svd import Columns
from spectral_core.maths.svd_cache import SVDCache
from spectral_core.methods import LoRAConfig, SpectralAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data import disk_cache, folder
from spectral_core.training.engine import columns
from spectral_core.training.engine.loop import train
from spectral_core.training.runs import checkpoint, events, place
from tests.core.training.training_toy import Toy
from tests.faults.processes import ended, forked, with_memory
from tests.fuzz import crafted

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
NOBODY = 65534
CONFIG = TrainConfig(steps=3, warmup=1, learning_rate=1e-2, seed=3)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    found = Path(tempfile.mkdtemp())
    found.chmod(0o755)
    yield found
    shutil.rmtree(found)


def as_nobody(work: Callable[[], None]) -> None:
    """Do it as a user who may not; what it asserts is asserted here."""
    trained(place.Run())  # what is imported late is imported now: that user may not read Python's own folder

    def restricted() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    assert ended(forked(restricted)) == 0


def trained(run: place.Run) -> tuple[str, list[str]]:
    toy = Toy(LoRAConfig(4))
    result = train(toy.setup, CONFIG, "lora", run=run)
    return toy.digest, result.notes


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(SpectralAdapterError, match=words):
        call()


# --- a user who may not ----------------------------------------------------------------------------------


def test_a_folder_that_may_not_be_written(shared: Path) -> None:
    adapter_file.save(crafted.adapter(), shared / "a.safetensors")
    shared.chmod(0o555)
    matrix = torch.eye(6)[:4] + 0.1

    def work() -> None:
        adapter_file.load(shared / "a.safetensors")
        refused(lambda: adapter_file.save(crafted.adapter(), shared / "b.safetensors"), "cannot be written")
        refused(
            lambda: adapter_file.save(crafted.adapter(), shared / "a.safetensors", overwrite=True),
            "cannot be written .*nothing was saved",
        )
        refused(lambda: trained(place.Run(folder=shared / "run")), "cannot be made")
        refused(lambda: trained(place.Run(folder=shared)), "cannot be written")
        refused(lambda: place.take_place(shared, "cat", {"config": {"steps": 3}}), "cannot be written")
        refused(lambda: columns.reserve(shared, {"layers": {}}, 2, "cat"), "cannot be written")
        cache = disk_cache.TensorCache(shared)
        assert torch.equal(cache.get_or_compute("key", lambda: {"a": torch.ones(2)})["a"], torch.ones(2))
        svd = SVDCache(shared)
        svd.get_or_compute(matrix, Columns.block(0, 2))
        assert "cannot write" in svd.report.problem
        events.EventLog(shared, None).say("step", 1, {})

    as_nobody(work)
    shared.chmod(0o755)
    assert [each.name for each in shared.iterdir()] == ["a.safetensors"]


def test_files_that_may_not_be_read(shared: Path) -> None:
    good = adapter_file.save(crafted.adapter(SpectralAConfig((0, 1))), shared / "good.safetensors")
    secret = shared / "secret.safetensors"
    shutil.copy(good, secret)
    (shared / "pictures").mkdir()
    for name in ("pictures/a.png", "pictures/b.png"):
        Image.new("RGB", (8, 8)).save(shared / name)
    (shared / "pictures/b.txt").write_text("b")
    (shared / "run").mkdir()
    place.claim(place.Place(shared / "run", "run", "new"), {"config": {"steps": 3}})
    for each in (secret, shared / "pictures/a.png", shared / "pictures/b.txt", shared / "run/run.json"):
        each.chmod(0)
    (shared / "hidden").mkdir(0)

    def work() -> None:
        for read in (adapter_file.load, adapter_file.inspect, read_lora, checkpoint.read):
            refused(lambda read=read: read(secret), "cannot be read .Permission denied")
        layers = {"layers": dict.fromkeys(crafted.adapter().layers)}
        held, skipped = columns.files_of(shared, layers)
        assert [use.holder for use in held] == ["good.safetensors"]
        assert len(skipped) == 1 and "secret.safetensors: cannot be read" in skipped[0]
        refused(lambda: folder.picture_size(shared / "pictures/a.png"), "Permission denied")
        refused(lambda: folder.find_examples(shared / "pictures"), "Permission denied")
        refused(lambda: folder.find_examples(shared / "hidden"), "cannot be listed")
        refused(lambda: place.find_place(shared, "run", {"config": {"steps": 3}}), "cannot be read")

    as_nobody(work)


# --- a disk that is read-only ----------------------------------------------------------------------------


def test_a_disk_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on, says so, and goes on from its last checkpoint when the disk is back."""
    wanted, _ = trained(place.Run(folder=tmp_path / "whole", checkpoint_every=1))
    opened, state = Path.open, {"read only": False}

    def open_or_refuse(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if state["read only"] and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, mode, *rest, **more)

    def listen(event: events.Event) -> None:
        state["read only"] = event["step"] >= 2

    monkeypatch.setattr(Path, "open", open_or_refuse)
    digest, notes = trained(place.Run(folder=tmp_path / "run", checkpoint_every=1, listener=listen))
    assert digest == wanted and "Read-only file system" in notes[0] and "step 1" in notes[0]
    state["read only"] = False
    assert [step for step, _ in checkpoint.listed(tmp_path / "run")] == [1]
    assert trained(place.Run(folder=tmp_path / "run", checkpoint_every=1))[0] == wanted
    assert not [*(tmp_path / "run").glob(".*.part")]


# --- memory ----------------------------------------------------------------------------------------------


def test_too_little_memory_is_told(tmp_path: Path) -> None:
    size = 600 << 20
    header = {
        "a.lora_down.weight": {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]},
        "a.lora_up.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [size, size + 4]},
    }
    path = crafted.raw(json.dumps(header).encode(), b"", tmp_path / "large.safetensors")
    os.truncate(path, path.stat().st_size + size + 4)
    picture = tmp_path / "a.png"
    Image.new("RGB", (7000, 7000)).save(picture)

    def work() -> None:
        refused(lambda: read_lora(path), "memory")
        refused(lambda: folder.load_picture(picture, 64, 64), "memory")
        adapter_file.save(crafted.adapter(), tmp_path / "small.safetensors")

    with_memory(100 << 20, work)
    adapter_file.load(tmp_path / "small.safetensors")


def test_a_training_that_runs_out_of_memory_keeps_its_last_step(tmp_path: Path) -> None:
    wanted, _ = trained(place.Run(folder=tmp_path / "whole"))

    def work() -> None:
        toy = Toy(LoRAConfig(4))

        def greedy() -> None:
            if checkpoint.listed(tmp_path / "run"):
                torch.ones(1 << 28).numpy()

        toy.on_call = greedy
        with pytest.raises((RuntimeError, MemoryError)):
            train(toy.setup, CONFIG, "lora", run=place.Run(folder=tmp_path / "run", checkpoint_every=1))

    with_memory(400 << 20, work)
    log = events.read_events(tmp_path / "run" / events.FILE)
    assert "Out of memory" in next(event["text"] for event in log if event["event"] == "error")
    assert [step for step, _ in checkpoint.listed(tmp_path / "run")] == [1]
    assert trained(place.Run(folder=tmp_path / "run"))[0] == wanted


# --- the clock -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    wanted, _ = trained(place.Run(folder=tmp_path / "whole", checkpoint_every=1))
    now = time.time

    def jump(event: events.Event) -> None:
        if event["step"] == 2:
            monkeypatch.setattr(time, "time", lambda: now() + years * 365.25 * 86_400)

    run = place.Run(folder=tmp_path / "run", checkpoint_every=1, listener=jump)
    assert trained(run)[0] == wanted
    seconds = [e["seconds"] for e in events.read_events(tmp_path / "run" / events.FILE) if "seconds" in e]
    assert seconds == sorted(seconds) and seconds[-1] < 60


def test_the_newest_checkpoint_is_told_by_its_step(tmp_path: Path) -> None:
    for step in (1, 2):
        path = checkpoint.write(checkpoint.State({}, {"step": step}), tmp_path, step)
        os.utime(path, (time.time() + 10**8 / step,) * 2)  # the older one lies farther in the future
    found, _ = checkpoint.read_newest(tmp_path)
    assert found is not None and found.values["step"] == 2


def test_a_cache_from_the_future_is_used_and_bounded(tmp_path: Path) -> None:
    matrices = [torch.eye(12)[:10] * (k + 1) + 0.1 for k in range(4)]
    for matrix in matrices[:3]:
        SVDCache(tmp_path).get_or_compute(matrix, Columns.block(0, 2))
    sizes = [each.stat().st_size for each in tmp_path.iterdir()]
    for each in tmp_path.iterdir():
        os.utime(each, (time.time() + 10**8,) * 2)
    cache = SVDCache(tmp_path, sum(sizes))
    cache.get_or_compute(matrices[0], Columns.block(0, 2))
    cache.get_or_compute(matrices[3], Columns.block(0, 2))
    assert cache.report.hits == 1 and cache.report.evicted == 1
    assert SVDCache(tmp_path).get_or_compute(matrices[3], Columns.block(0, 2)).s.shape == (2,)
