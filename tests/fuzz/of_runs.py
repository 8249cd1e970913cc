"""Readers of what lies in the folders of trainings: checkpoints, settings, records, logs, reservations."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import torch

from spectral_core.methods import FouRAConfig, SpectralAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.locks import FileLock
from spectral_core.training.engine import columns
from spectral_core.training.engine.loop import train
from spectral_core.training.runs import checkpoint, events, finished, place
from tests.core.training.training_toy import Toy
from tests.fuzz import crafted, mutate
from tests.fuzz.reader import Reader, in_container, of_file, saved, texts

_STEPS = 2
_CONFIG = TrainConfig(steps=_STEPS, learning_rate=1e-2, seed=5, ema=0.9)


def _toy() -> Toy:
    return Toy(FouRAConfig(4, transform="dft", gate="adaptive"))


def _made_by_a_run(scratch: Path) -> bytes:
    """The last checkpoint of a small training."""
    toy = _toy()
    folder = scratch / "run"
    train(toy.setup, _CONFIG, "foura", run=place.Run(folder=folder))
    return checkpoint.path_of(folder, _STEPS).read_bytes()


def _signed(rng: random.Random, seed: bytes) -> bytes:
    """Mutated, and mostly with a digest that fits what it has become: no secret guards it."""
    content = in_container(checkpoint.VALUES_KEY)(rng, seed)
    if rng.random() < 0.1:
        return content
    with contextlib.suppress(Exception):  # what cannot be parsed stays as it is
        length = int.from_bytes(content[:8], "little")
        header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
        tensors = {
            name: torch.frombuffer(
                bytearray(rest[slice(*entry["data_offsets"])]), dtype=_DTYPES[entry["dtype"]]
            ).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        words = header["__metadata__"]
        words[checkpoint.DIGEST_KEY] = checkpoint.digest(tensors, words[checkpoint.VALUES_KEY])
        raw = json.dumps(header).encode()
        return len(raw).to_bytes(8, "little") + raw + rest
    return content


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def _resumed(path: Path) -> None:
    """The run goes on from it; its steps are made already, so that only the reading costs."""
    toy = _toy()
    result = train(toy.setup, _CONFIG, "foura", run=place.Run(folder=path.parent))
    assert result.resumed_at is not None
    found = [p for a in toy.setup.attachments for p in a.parameters()]
    assert all(bool(torch.isfinite(p).all()) for p in found), "resumed and not finite"


def _ledger(path: Path) -> None:
    columns.files_of(path.parent, {"layers": {}})


def _reserved(content: bytes, scratch: Path) -> None:
    """A reservation of a living training: its lock is held."""
    folder = scratch / columns.FOLDER
    folder.mkdir(exist_ok=True)
    note = folder / "a.json"
    note.write_bytes(content)
    with FileLock(note.with_suffix(".lock")), columns.reserve(scratch, {"layers": {"unet.a": 1}}, 2, "cat"):
        pass


def _events(path: Path) -> None:
    events.read_events(path)
    events.EventLog(path.parent, None).forget_after(1)


def _settings(path: Path) -> None:
    place.read_settings(path.parent)


def _found_again(path: Path) -> None:
    settings = {"config": {"steps": 20}}
    place.find_place(path.parents[1], path.parent.name, settings, extend=True)


def _result(path: Path) -> None:
    found = finished.find_result(place.Place(path.parent, "cat", "finished"), path.parent)
    assert found.path.parent == path.parent, "outside of the folder"


def _table(rng: random.Random, seed: bytes) -> bytes:
    if rng.random() < 0.4:
        return texts(rng, seed)
    return json.dumps(mutate.table(rng, json.loads(seed))).encode("utf-8", "surrogatepass")


def readers(scratch: Path) -> list[Reader]:
    """scratch: an empty folder, for making the sound inputs."""
    from spectral_core.files import adapter_file

    tensors, ledger = "a.safetensors", []
    for config in (SpectralAConfig((0, 3), True), SpectralAConfig((1, 2))):
        ledger.append(saved(lambda p, c=config: adapter_file.save(crafted.adapter(c), p), scratch))
    settings = json.dumps(
        {"config": {"steps": 10, "rate": 1e-4}, "targets": ["a"], "nested": {"x": [1, None]}}
    )
    record = json.dumps({"file": "cat.safetensors", "steps": 10, "content": "0f"})
    note = json.dumps({"name": "cat", "columns": [0, 1], "base": {"layers": {"unet.a": {"shape": [2, 2]}}}})
    log = b'{"event": "step", "step": 1, "loss": 0.5}\n{"event": "end", "step": 2}\n'
    newest = f"checkpoint-{_STEPS:08d}.safetensors"
    run = _made_by_a_run(scratch)
    return [
        of_file("checkpoint", (run,), in_container(checkpoint.VALUES_KEY), checkpoint.read, tensors),
        of_file("resumed", (run,), _signed, _resumed, newest),
        of_file("run settings", (settings.encode(),), _table, _settings, place.SETTINGS_FILE),
        of_file("run found again", (settings.encode(),), _table, _found_again, f"cat/{place.SETTINGS_FILE}"),
        of_file("run record", (record.encode(),), _table, _result, finished.RECORD),
        of_file("events", (log,), texts, _events, events.FILE, refuses=False),
        of_file(
            "columns", tuple(ledger), in_container(adapter_file.CONFIG_KEY), _ledger, tensors, refuses=False
        ),
        Reader("columns reserved", (note.encode(),), _table, _reserved, refuses=False),
    ]
