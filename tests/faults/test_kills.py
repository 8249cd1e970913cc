"""Writers that are killed, run out of room, or are two: what was there stays, and nothing is left over."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.methods import FouRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.loop import train
from spectral_core.training.runs import checkpoint, events, place
from tests.core.training.training_toy import Toy
from tests.faults.processes import ended, forked, in_memory
from tests.fuzz import crafted

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS = int(os.environ.get("SPECTRAL_KILLS", "25"))


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


@pytest.mark.parametrize("moment", ["fsync", "replace", "unlink"])
def test_killed_between_writing_and_naming(tmp_path: Path, moment: str) -> None:
    """Just before, at each of the first times."""
    for count in range(4):
        folder = tmp_path / str(count)
        folder.mkdir()
        checkpoint.write(state_of(1), folder, 1)

        def writing(folder: Path = folder, count: int = count) -> None:
            real, left = getattr(os, moment), [count]

            def kill(*given: Any, **more: Any) -> None:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                real(*given, **more)

            setattr(os, moment, kill)
            with place.locked(folder):
                for step in range(2, 9):
                    checkpoint.write(state_of(step), folder, step)
                    checkpoint.keep_newest(folder, 2)

        assert ended(forked(writing)) == -signal.SIGKILL
        with place.locked(folder):
            assert not list(folder.glob(".*.part"))
        found, notes = checkpoint.read_newest(folder)
        assert found is not None and not notes
        wanted = state_of(found.values["step"]).tensors["parameters.a"]
        assert torch.equal(found.tensors["parameters.a"], wanted)


@pytest.fixture
def quick() -> Iterator[Path]:
    with in_memory() as folder:
        yield folder


def test_killed_trainings_resume_to_the_bit(quick: Path) -> None:
    """Kills at random moments of whole trainings, until so many have been: each run ends as the one that
    nobody has killed, with its settings and its log whole, no lock and nothing unfinished left."""
    config = TrainConfig(steps=25, warmup=2, learning_rate=1e-2, seed=3, ema=0.9)
    settings = {"config": {"steps": 25}}

    def trained(root: Path) -> None:
        found = place.take_place(root, "cat", settings)
        toy = Toy(FouRAConfig(4, transform="dft", gate="adaptive"))
        train(toy.setup, config, "foura", run=place.Run(folder=found.folder, checkpoint_every=1))
        (root / "digest").write_text(toy.digest)

    trained(quick / "whole")
    wanted = (quick / "whole" / "digest").read_text()
    rng, kills, runs = random.Random(2), 0, 0
    while kills < KILLS // 2:
        root = quick / str(runs)
        for _ in range(200):
            child = forked(lambda root=root: trained(root))  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
            if ended(child) == 0:
                break
            kills += 1
        else:
            trained(root)
        assert (root / "digest").read_text() == wanted
        assert [each.name for each in root.iterdir() if each.is_dir()] == ["cat"], "no second run beside it"
        log = events.read_events(root / "cat" / events.FILE)
        assert [e["step"] for e in log if e["event"] == "step"] == list(range(1, 26))
        with place.locked(root / "cat"):
            left = sorted(each.name for each in (root / "cat").iterdir())
        newest = [f"checkpoint-{step:08d}.safetensors" for step in (24, 25)]
        assert left == [*newest, events.FILE, place.SETTINGS_FILE, "run.lock"]
        runs += 1


def test_parts_of_a_living_writer_are_left_alone(tmp_path: Path) -> None:
    with place.locked(tmp_path):
        (tmp_path / ".a.part").touch()
        child = forked(lambda: place.locked(tmp_path).__enter__())
        assert ended(child) == 3
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

    assert ended(forked(full)) == 3
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "checkpoint-00000001.safetensors"]


def test_two_writers_leave_one_whole_file(tmp_path: Path) -> None:
    def writing(seed: int) -> None:
        for _ in range(30):
            adapter_file.save(crafted.adapter(size=8 * seed), tmp_path / "a.safetensors", overwrite=True)

    children = [forked(lambda seed=seed: writing(seed)) for seed in (1, 2)]  # type: ignore[misc]
    for child in children:
        assert ended(child) == 0
    adapter_file.load(tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
