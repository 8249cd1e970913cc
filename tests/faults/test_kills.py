"""Writers that are killed, run out of room, or are two: what was there stays, and nothing is left over."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.training.runs import checkpoint, place
from tests.fuzz import crafted

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS = int(os.environ.get("SPECTRAL_KILLS", "25"))


def forked(work: Callable[[], None]) -> int:
    """The process that does it: 0 at its end, 3 for the project's error, 1 for any other."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except SpectralAdapterError:
        status = 3
    finally:
        os._exit(status)


def state_of(step: int) -> checkpoint.State:
    generator = torch.Generator().manual_seed(step)
    tensors = {"parameters.a": torch.rand(64, 64, generator=generator)}
    return checkpoint.State(tensors, {"step": step})


def test_killed_at_any_moment_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    rng, step = random.Random(1), 1
    checkpoint.write(state_of(step), tmp_path, step)
    for _ in range(KILLS):

        def writing(first: int = step + 1) -> None:
            with place.locked(tmp_path):
                for number in range(first, first + 10_000):
                    checkpoint.write(state_of(number), tmp_path, number)
                    checkpoint.keep_newest(tmp_path, 2)

        child = forked(writing)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with place.locked(tmp_path):  # the dead one's lock is free, and what it left is gone
            assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))
        found, notes = checkpoint.read_newest(tmp_path)
        assert found is not None and not notes and found.values["step"] >= step
        step = found.values["step"]
        assert torch.equal(found.tensors["parameters.a"], state_of(step).tensors["parameters.a"])
    assert step > 1


def test_parts_of_a_living_writer_are_left_alone(tmp_path: Path) -> None:
    with place.locked(tmp_path):
        (tmp_path / ".a.part").touch()
        child = forked(lambda: place.locked(tmp_path).__enter__())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert (tmp_path / ".a.part").exists()


def test_no_room_leaves_the_last_file_and_nothing_else(tmp_path: Path) -> None:
    import resource

    before = adapter_file.save(crafted.adapter(), tmp_path / "a.safetensors").read_bytes()
    checkpoint.write(state_of(1), tmp_path, 1)

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            adapter_file.save(crafted.adapter(size=64), tmp_path / "a.safetensors", overwrite=True)
        except SpectralAdapterError:
            checkpoint.write(state_of(2), tmp_path, 2)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(full), 0)[1]) == 3
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "checkpoint-00000001.safetensors"]


def test_two_writers_leave_one_whole_file(tmp_path: Path) -> None:
    def writing(seed: int) -> None:
        for _ in range(30):
            adapter_file.save(crafted.adapter(size=8 * seed), tmp_path / "a.safetensors", overwrite=True)

    children = [forked(lambda seed=seed: writing(seed)) for seed in (1, 2)]  # type: ignore[misc]
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    adapter_file.load(tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may do everything")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SpectralAdapterError, match="cannot be"):
        adapter_file.save(crafted.adapter(), tmp_path / "a.safetensors")
    tmp_path.chmod(0o700)
