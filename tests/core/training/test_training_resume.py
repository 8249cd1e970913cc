"""Nothing is lost: a run stopped anywhere and resumed equals the uninterrupted one, to the last bit."""

from __future__ import annotations

import errno
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.files import writing as safewrite
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig
from spectral_core.training.config.config import Optimiser, TrainConfig
from spectral_core.training.data.folder import Order
from spectral_core.training.engine import optim
from spectral_core.training.engine.loop import train
from spectral_core.training.engine.trainer import Trainer
from spectral_core.training.runs import checkpoint
from spectral_core.training.runs.events import read_events
from spectral_core.training.runs.interrupts import after_the_block
from spectral_core.training.runs.outcome import TrainResult
from spectral_core.training.runs.place import Run, locked, take_place
from tests.core.training.training_toy import CONFIGS, Toy

PACKAGES = {"schedulefree": "schedulefree", "prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}


def settings(**changes: Any) -> TrainConfig:
    common: dict[str, Any] = {
        "steps": 20,
        "warmup": 3,
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "seed": 5,
    }
    return TrainConfig(**(common | changes))


def of(optimiser: str) -> dict[str, Any]:
    """Settings for an optimiser; skips where its package is missing."""
    if optimiser in PACKAGES:
        pytest.importorskip(PACKAGES[optimiser])
    schedule = "constant" if optimiser == "schedulefree" else "cosine"
    return {
        "optimiser": optimiser,
        "schedule": schedule,
        "learning_rate": 1.0 if optimiser == "prodigy" else 1e-2,
    }


def stop_at(step: int) -> Any:
    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise KeyboardInterrupt

    return listen


def whole(toy: Toy, config: TrainConfig, method: str) -> tuple[str, TrainResult]:
    result = train(toy.setup, config, method)
    return toy.digest, result


@pytest.mark.parametrize("optimiser", get_args(Optimiser))
@pytest.mark.parametrize("method", CONFIGS, ids=str)
def test_ten_steps_and_ten_resumed_are_twenty(method: MethodConfig, optimiser: str, tmp_path: Path) -> None:
    config = settings(**of(optimiser))
    expected, full = whole(Toy(method), config, method.method)
    first = train(Toy(method).setup, config, method.method, run=Run(tmp_path, listener=stop_at(10)))
    assert first.stopped and first.losses == full.losses[:10]
    toy = Toy(method)
    second = train(toy.setup, config, method.method, run=Run(tmp_path))
    assert second.resumed_at == 10 and second.losses == full.losses
    assert toy.digest == expected
    assert (second.gates is None) == (full.gates is None) and second.gates == full.gates


def test_averages_of_a_byte_are_resumed_to_the_bit(tmp_path: Path) -> None:
    """Of parameters that are large enough to have such: a run that is not broken off ends alike."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no optimiser of 8 bits")
    config = settings(optimiser="adamw8bit")

    def begun() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        values = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
        parameter = torch.nn.Parameter(values)
        group = optim.Group("adapter", (parameter,), 1e-2, 0.01)
        return parameter, optim.build([group], config)[0]

    def step(parameter: torch.nn.Parameter, optimiser: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator)
        optimiser.step()

    whole, its = begun()
    for seed in range(6):
        step(whole, its, seed)
    first, its = begun()
    for seed in range(3):
        step(first, its, seed)
    packed = checkpoint.pack_optimiser(its)
    assert {v.dtype for v in packed.tensors.values()} >= {torch.uint8}, "its averages take a byte"
    path = checkpoint.write(
        checkpoint.State({**packed.tensors, "parameter": first.detach()}, packed.values), tmp_path, 3
    )
    read = checkpoint.read(path)
    second, its = begun()
    with torch.no_grad():
        second.copy_(read.tensors.pop("parameter"))
    checkpoint.unpack_optimiser(its, read)
    for seed in range(3, 6):
        step(second, its, seed)
    assert torch.equal(second, whole)


def test_every_part_of_the_state_is_resumed(tmp_path: Path) -> None:
    """Averaged parameters, accumulation, prior examples, float16's loss scale, drawn noise levels."""
    config = settings(
        accumulation=2,
        ema=0.9,
        precision="fp16",
        timesteps="logit-normal",
        weighting="min-snr",
        target_open=0.5,
    )
    method = FouRAConfig(4, gate="adaptive")

    def toy() -> Toy:
        made = Toy(method, batch=2)
        return Toy(method, batch=2, prior=Order(made.examples[:3], 2, 9))

    expected, full = whole(toy(), config, "foura")
    train(toy().setup, config, "foura", run=Run(tmp_path, listener=stop_at(7)))
    train(toy().setup, config, "foura", run=Run(tmp_path, listener=stop_at(19)))
    last = toy()
    assert train(last.setup, config, "foura", run=Run(tmp_path)).losses == full.losses
    assert last.digest == expected


@pytest.mark.parametrize("calls", [1, 12])
def test_a_step_that_breaks_off_is_undone(calls: int, tmp_path: Path) -> None:
    """Cancelled between two batches of a step, or an error in the model: as if the step had not begun."""
    config = settings(accumulation=3)
    expected, _ = whole(Toy(FouRAConfig(4), batch=1), config, "foura")
    toy, seen = Toy(FouRAConfig(4), batch=1), []

    def fail() -> None:
        seen.append(torch.rand(1))  # a model may draw random numbers of its own
        if len(seen) == calls:
            raise MemoryError("no room")

    toy.on_call = fail
    with pytest.raises(MemoryError):
        train(toy.setup, config, "foura", run=Run(tmp_path))
    events = read_events(tmp_path / "events.jsonl")
    assert "Out of memory: lower batch_size" in events[-1]["text"]
    assert events[-1]["step"] == (calls - 1) // 3
    asked: list[int] = []
    resumed = Toy(FouRAConfig(4), batch=1)
    run = Run(tmp_path, cancel=lambda: len(asked) == 16 or bool(asked.append(1)))
    assert train(resumed.setup, config, "foura", run=run).stopped
    again = Toy(FouRAConfig(4), batch=1)
    train(again.setup, config, "foura", run=Run(tmp_path))
    assert again.digest == expected


def test_global_random_numbers_and_samples(tmp_path: Path) -> None:
    """A model that draws from the global generators resumes too; samples disturb nothing and are the same."""
    config = settings(optimiser="adamw", ema=0.9, steps=8)

    def noisy(toy: Toy) -> Toy:
        toy.on_call = lambda: drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return toy

    def sample(step: int) -> list[Any]:
        torch.rand(5), random.random(), np.random.rand()
        sampled.append((step, toy.digest))
        return []

    drawn: list[Any] = []
    sampled: list[Any] = []
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    toy = noisy(Toy(FouRAConfig(4)))
    torch.manual_seed(3)
    train(toy.setup, config, "foura")
    expected, full = toy.digest, list(drawn)
    drawn.clear()
    random.seed(3), np.random.seed(3)
    toy = noisy(Toy(FouRAConfig(4)))
    torch.manual_seed(3)
    run = Run(tmp_path, sampler=sample, sample_every=2)
    train(toy.setup, config, "foura", run=replace(run, listener=stop_at(5)))
    random.random(), torch.rand(1)
    toy = noisy(Toy(FouRAConfig(4)))
    train(toy.setup, config, "foura", run=run)
    assert drawn == full and toy.digest == expected
    assert [step for step, _ in sampled] == [2, 4, 6, 8] and sampled[-1][1] == expected


def test_extending_a_finished_run_is_a_new_schedule_and_says_so(tmp_path: Path) -> None:
    config = settings(steps=10)
    train(Toy(LoRAConfig(4)).setup, config, "lora", run=Run(tmp_path))
    toy = Toy(LoRAConfig(4))
    again = train(toy.setup, config, "lora", run=Run(tmp_path))
    assert again.resumed_at == 10 and len(again.losses) == 10 and again.notes == []
    events: list[dict[str, Any]] = []
    longer = train(toy.setup, settings(steps=14), "lora", run=Run(tmp_path, listener=events.append))
    assert "was finished at step 10 of 10; going on to 14 is a new schedule" in longer.notes[0]
    rates = [e["learning_rate"] for e in events if e["event"] == "step"]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2]) and rates[3] <= 1e-2
    with pytest.raises(SpectralAdapterError, match=r"steps 12: the run in .* has made 14 already"):
        train(Toy(LoRAConfig(4)).setup, settings(steps=12), "lora", run=Run(tmp_path))
    with pytest.raises(SpectralAdapterError, match=r"other settings \(config\.seed: 5 there, 6 here\)"):
        train(Toy(LoRAConfig(4)).setup, settings(steps=20, seed=6), "lora", run=Run(tmp_path))
    with pytest.raises(SpectralAdapterError, match=r"other settings .*method: lora there, foura here"):
        train(Toy(FouRAConfig(4)).setup, settings(steps=20), "foura", run=Run(tmp_path))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, config = safewrite._write_to, settings(steps=9)
    expected, _ = whole(Toy(LoRAConfig(4)), config, "lora")

    def full(stream: Any, tensors: Any, metadata: Any) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            monkeypatch.setattr(safewrite, "_write_to", full)

    result = train(Toy(LoRAConfig(4)).setup, config, "lora", run=Run(tmp_path, 3, listener=fill))
    assert len(result.losses) == 9, "a full disk must not end the training"
    note = result.notes[0]
    assert "No space left on device" in note and "the last good one is that of step 3" in note
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [3] and not list(tmp_path.glob(".*.part"))
    monkeypatch.setattr(safewrite, "_write_to", write)
    toy = Toy(LoRAConfig(4))
    assert train(toy.setup, config, "lora", run=Run(tmp_path)).resumed_at == 3
    assert toy.digest == expected
    steps = [e["step"] for e in read_events(tmp_path / "events.jsonl") if e["event"] == "step"]
    assert steps == list(range(1, 10)), "what came after the checkpoint is told once"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    config = settings(steps=9)
    expected, _ = whole(Toy(LoRAConfig(4)), config, "lora")
    train(Toy(LoRAConfig(4)).setup, config, "lora", run=Run(tmp_path, 3, listener=stop_at(7)))
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [7, 6]
    newest = checkpoint.path_of(tmp_path, 7)
    newest.write_bytes(newest.read_bytes()[:-10])
    toy = Toy(LoRAConfig(4))
    result = train(toy.setup, config, "lora", run=Run(tmp_path))
    assert result.resumed_at == 6 and "checkpoint-00000007" in result.notes[0] and toy.digest == expected
    for _, path in checkpoint.listed(tmp_path):
        path.write_bytes(b"x")
    with pytest.raises(SpectralAdapterError, match="no checkpoint can be read"):
        train(Toy(LoRAConfig(4)).setup, config, "lora", run=Run(tmp_path))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    def second(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            with pytest.raises(SpectralAdapterError, match="another training is using it"):
                train(Toy(LoRAConfig(4)).setup, settings(steps=3), "lora", run=Run(tmp_path))

    train(Toy(LoRAConfig(4)).setup, settings(steps=3), "lora", run=Run(tmp_path, listener=second))
    with locked(tmp_path):
        pass  # free again


def test_a_run_is_found_by_its_name_and_settings(tmp_path: Path) -> None:
    def wanted(**changes: Any) -> dict[str, Any]:
        return {"config": settings(**changes).as_dict(), "data": "cats"}

    first = take_place(tmp_path, "cat", wanted())
    assert (first.name, first.state) == ("cat", "new")
    assert take_place(tmp_path, "cat", wanted()).state == "unfinished"
    other = take_place(tmp_path, "cat", wanted(seed=1))
    assert (other.name, other.state, other.earlier) == ("cat-2", "new", ("cat",))
    train(Toy(LoRAConfig(4)).setup, settings(), "lora", run=Run(first.folder))
    assert take_place(tmp_path, "cat", wanted()).state == "finished"
    assert take_place(tmp_path, "cat", wanted(steps=30), extend=True).name == "cat"
    assert take_place(tmp_path, "cat", wanted(steps=40)).name == "cat-3"
    for bad in ("", "../x", ".x", "a/b"):
        with pytest.raises(SpectralAdapterError, match="expected a plain name"):
            take_place(tmp_path, bad, wanted())


def test_an_interrupt_between_gradients_and_update_undoes_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = whole(Toy(LoRAConfig(4)), settings(), "lora")
    own = Trainer._check

    def interrupted(trainer: Trainer, *given: Any) -> None:
        if trainer.step == 7:
            raise KeyboardInterrupt
        own(trainer, *given)

    monkeypatch.setattr(Trainer, "_check", interrupted)
    assert train(Toy(LoRAConfig(4)).setup, settings(), "lora", run=Run(tmp_path)).stopped
    monkeypatch.undo()
    toy = Toy(LoRAConfig(4))
    assert train(toy.setup, settings(), "lora", run=Run(tmp_path)).resumed_at == 7
    assert toy.digest == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_an_update(number: signal.Signals) -> None:
    def raising(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, raising)
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), after_the_block():
            signal.raise_signal(number)
            done.append("the update")
        assert done and signal.getsignal(number) is raising
    finally:
        signal.signal(number, before)
