"""A checkpoint that is not what was written is left out, said, and the one before it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.training.runs import checkpoint, events, place
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
