"""A checkpoint that is not what was written is left out, said, and the one before it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import FouRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.loop import train
from spectral_core.training.runs import checkpoint, events, place, schema
from tests.core.training.training_toy import Toy
from tests.fuzz import crafted


def written(folder: Path) -> Path:
    for step in (1, 2):
        tensors = {
            "parameters.a": torch.full((4, 4), float(step)),
            "noise": torch.arange(8, dtype=torch.uint8),
        }
        path = checkpoint.write(checkpoint.State(tensors, {"step": step}), folder, step)
    return path


@pytest.mark.parametrize("fault", ["flipped", "zeroed", "renamed", "cut", "numbers", "no digest"])
def test_the_one_before_is_resumed_and_it_is_said(tmp_path: Path, fault: str) -> None:
    path = written(tmp_path)
    header, data = crafted.parts(path)
    if fault == "flipped":
        data = bytes([data[0] ^ 1]) + data[1:]
    elif fault == "zeroed":
        data = bytes(len(data))
    elif fault == "renamed":
        header["parameters.b"] = header.pop("parameters.a")
    elif fault == "cut":
        data = data[:-3]
    elif fault == "numbers":
        header["__metadata__"][checkpoint.VALUES_KEY] = json.dumps({"step": 7})
    else:
        del header["__metadata__"][checkpoint.DIGEST_KEY]
    crafted.raw(json.dumps(header).encode(), data, path)
    found, notes = checkpoint.read_newest(tmp_path)
    assert found is not None and found.values == {"step": 1}
    assert len(notes) == 1 and path.name in notes[0]


def test_nan_is_not_resumed(tmp_path: Path) -> None:
    written(tmp_path)
    bad = {"parameters.a": torch.full((4, 4), float("nan"))}
    checkpoint.write(checkpoint.State(bad, {"step": 3}), tmp_path, 3)
    found, notes = checkpoint.read_newest(tmp_path)
    assert found is not None and found.values == {"step": 2} and "NaN" in notes[0]


@pytest.mark.parametrize("crafted_", [[4.0, 0, 4], [-1.0, 2, 4], [4.0, 2, 0], [4.0, 2]])
def test_a_calibration_over_no_steps_is_refused(crafted_: list[float]) -> None:
    """What ended a resumed run in a division by zero."""
    assert not schema.problem(schema.CALIBRATION, [4.0, 2, 4])
    assert schema.problem(schema.CALIBRATION, crafted_)


def test_settings_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    settings = {"config": {"steps": 3}}
    taken = place.take_place(tmp_path, "cat", settings)
    assert place.find_place(tmp_path, "cat", settings).folder == taken.folder
    (taken.folder / place.SETTINGS_FILE).write_text('{"config": ')
    with pytest.raises(SpectralAdapterError, match=r"cannot be read .* from a copy"):
        place.find_place(tmp_path, "cat", settings)


def test_the_log_goes_on_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = events.EventLog(tmp_path, None)
    log.say("step", 1, {})
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        log.say("step", 2, {})
    with (tmp_path / events.FILE).open("a") as file:
        file.write('{"event": "st')  # what fitted of it
    log.say("step", 3, {})
    assert [event["step"] for event in events.read_events(tmp_path / events.FILE)] == [1, 3]


def test_lines_of_a_log_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / events.FILE
    lines = ['{"event": "step", "step": {}}', '{"event": "step", "step": null}', "[1]", "[" * 9000, "NaN"]
    log.write_text("\n".join([*lines, '{"event": "step", "step": 1}', '{"event": "warning"}']))
    assert [event["step"] for event in events.read_events(log)] == [1, 0]
    events.EventLog(tmp_path, None).forget_after(0)
    assert [event["event"] for event in events.read_events(log)] == ["warning"]


WRONG = {  # places in a checkpoint's numbers that fit their digest, and are not what a run writes
    "random.numpy_position": 10**9,
    "random.python_version": 2,
    "gates.runtimes.0.temperature": -1.0,
    "gates.runtimes.0.counts.mu.net.first": {},
    "order.queue": ["a"],
    "watch.loss": [1.0],
    "smoothed": [0.5, "a"],
    "optimiser0.state": {"x": {}},
    "step": -1,
    "steps": True,
    "share": float("nan"),
    "order.another": [],
    "calibration": {"a": [1.0, 0, 1]},
    "seconds": "long",
}


@pytest.mark.parametrize("place_of", WRONG)
def test_numbers_that_no_run_has_written_are_not_resumed(tmp_path: Path, place_of: str) -> None:
    config = TrainConfig(steps=2, learning_rate=1e-2)
    kind = FouRAConfig(4, transform="dft", gate="adaptive")
    train(Toy(kind).setup, config, "foura", run=place.Run(folder=tmp_path))
    state = checkpoint.read(checkpoint.path_of(tmp_path, 2))
    here, (*way, last) = state.values, place_of.replace("net.first", "net|first").split(".")
    for key in way:
        here = here[int(key)] if isinstance(here, list) else here[key]
    here[last.replace("|", ".")] = WRONG[place_of]
    checkpoint.write(state, tmp_path, 2)
    with pytest.raises(SpectralAdapterError, match="does not fit this run"):
        train(Toy(kind).setup, config, "foura", run=place.Run(folder=tmp_path))


def test_an_optimiser_with_nan_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(steps=2, learning_rate=1e-2)
    kind = FouRAConfig(4, gate="none")
    train(Toy(kind).setup, config, "foura", run=place.Run(folder=tmp_path))
    state = checkpoint.read(checkpoint.path_of(tmp_path, 2))
    name = next(n for n in state.tensors if n.startswith("optimiser") and "exp_avg" in n)
    state.tensors[name] = torch.full_like(state.tensors[name], float("nan"))
    with pytest.raises(SpectralAdapterError, match="NaN"):
        checkpoint.read(checkpoint.write(state, tmp_path, 2))
