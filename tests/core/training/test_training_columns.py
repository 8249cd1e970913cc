"""Which columns a new concept gets: the files are the ledger, trainings under way hold theirs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_core.adapter.adapter import Provenance, create
from spectral_core.adapter.fingerprint import fingerprint
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import save
from spectral_core.methods import LoRAConfig, SpectralAConfig, SpectralRConfig
from spectral_core.methods.spectral_a import reach
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.locks import FileLock
from spectral_core.training.engine.columns import FOLDER, lowest_free, reserve
from spectral_core.training.engine.loop import train
from spectral_core.training.engine.optim import groups
from spectral_core.training.runs.place import Run, take_place
from tests.core.training.training_toy import Toy, basis

WEIGHTS = {"unet.a": torch.randn(16, 16, generator=torch.Generator().manual_seed(0))}
BASE = fingerprint(WEIGHTS)
OTHER = fingerprint({"unet.a": torch.randn(16, 16, generator=torch.Generator().manual_seed(1))})


def concept(path: Path, config: SpectralAConfig | SpectralRConfig | LoRAConfig, base: object = BASE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(create(WEIGHTS, config, basis, provenance=Provenance(base=base)), path)  # type: ignore[arg-type]


def test_the_lowest_block_that_no_file_of_this_base_uses(tmp_path: Path) -> None:
    concept(tmp_path / "dog.safetensors", SpectralAConfig((0, 1, 2, 3)))
    concept(tmp_path / "sub" / "cat.safetensors", SpectralRConfig((8, 9, 10, 11)))
    concept(tmp_path / "lora.safetensors", LoRAConfig(2))
    concept(tmp_path / ".runs" / "old" / "start.safetensors", SpectralAConfig((4, 5, 6, 7)))
    concept(tmp_path / "elsewhere.safetensors", SpectralAConfig((4, 5, 6, 7)), OTHER)
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with reserve(tmp_path, BASE, 4, "new") as held:
        assert held.columns == (4, 5, 6, 7) and len(held.notes) == 1
        assert (
            "which columns it holds is not known" in held.notes[0] and "broken.safetensors" in held.notes[0]
        )
        with reserve(tmp_path, BASE, 4, "second") as other:
            assert other.columns == (12, 13, 14, 15), "the first is still training"
        with reserve(tmp_path, OTHER, 2, "third") as third:
            assert third.columns == (0, 1), "another base has its own columns"
    with reserve(tmp_path, BASE, 4, "again") as held:
        assert held.columns == (4, 5, 6, 7), "a training that is over holds nothing"
    assert not list((tmp_path / FOLDER).glob("*.json"))


def test_columns_that_are_taken_are_told(tmp_path: Path) -> None:
    concept(tmp_path / "dog.safetensors", SpectralAConfig((0, 1, 2, 3)))
    with reserve(tmp_path, BASE, (2, 3, 4, 5), "cat") as held:
        assert held.columns == (2, 3, 4, 5)
        assert "columns 2–3 are taken by dog.safetensors: the concepts will mix" in held.notes[0]
        with reserve(tmp_path, BASE, (5, 6), "fox") as other:
            assert "columns 5 are taken by the training of cat" in other.notes[0]


def test_a_training_that_died_holds_nothing(tmp_path: Path) -> None:
    held = reserve(tmp_path, BASE, 4, "dead")
    held._lock.release()  # what the operating system does when a process ends
    with reserve(tmp_path, BASE, 4, "new") as fresh:
        assert fresh.columns == (0, 1, 2, 3)


def test_lowest_free() -> None:
    assert lowest_free(set(), 3) == (0, 1, 2)
    assert lowest_free({0, 1, 5}, 3) == (2, 3, 4)
    assert lowest_free({0, 1, 4}, 3) == (5, 6, 7)
    with pytest.raises(SpectralAdapterError, match="at least 1"):
        lowest_free(set(), 0)


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    with FileLock(tmp_path / "lock"):
        started = time.monotonic()
        with pytest.raises(InterruptedError):
            FileLock(tmp_path / "lock", stop).acquire()
        with pytest.raises(InterruptedError), FileLock(tmp_path / FOLDER / "lock"):
            reserve(tmp_path, BASE, 4, "waits", stop)
        with pytest.raises(InterruptedError), FileLock(tmp_path / ".runs.lock"):
            take_place(tmp_path, "cat", {"config": {"steps": 1}}, asked=stop)
        assert time.monotonic() - started < 30, "not until the minute is over"
        assert not FileLock(tmp_path / "lock").try_acquire()
        with pytest.raises(SpectralAdapterError, match="held this lock"):
            FileLock(tmp_path / "lock").acquire(0.1)
    with FileLock(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("optimiser", ["adamw", "schedulefree"])
def test_the_first_step_changes_the_weights_alike_whichever_columns(optimiser: str) -> None:
    """Adam's first step is the rate in every entry, so A·S₁'s mean over all layers is the rate."""
    pytest.importorskip("schedulefree" if optimiser == "schedulefree" else "torch")
    for block in (0, 3):
        made = Toy(SpectralAConfig(tuple(range(4 * block, 4 * block + 4))), block=block)
        options = TrainConfig(steps=1, learning_rate=1e-3, warmup=0, weight_decay=0.0, optimiser=optimiser)  # type: ignore[arg-type]
        told: list[dict[str, Any]] = []
        train(made.setup, options, "spectral_a", run=Run(listener=told.append))
        terms = [layer.terms[0].params for layer in made.attachment.to_adapter().layers.values()]
        size = sum(float(params["s"].mean()) for params in terms) / len(terms)
        assert list(made.attachment.rate_factors().values()) == pytest.approx([1 / size] * 4)
        for params in terms:
            assert params["a_u"].abs().max() == pytest.approx(1e-3 / size, rel=1e-3)
        (step,) = [event for event in told if event["event"] == "step"]
        assert step["learning_rates"] == {"adapter": pytest.approx(1e-3)}


def test_the_scale_of_the_singular_values_and_prodigy_keep_one_rate() -> None:
    params = {"s": torch.tensor([4.0, 2.0])}
    config = SpectralAConfig((0, 1), train_scale=True)
    assert reach(config, params) == {"a_u": 3.0, "a_v": 3.0}
    named = [
        (name, torch.nn.Parameter(torch.zeros(2)))
        for name in ("unet.x.a_u", "unet.x.a_s", "text_encoder.x.a_u")
    ]
    factors = {"unet.x.a_u": 0.5, "text_encoder.x.a_u": 0.25}
    found = groups(named, [], TrainConfig(learning_rate=1e-2), "spectral_a", factors)
    assert [(g.label, g.rate, g.factor, len(g.parameters)) for g in found] == [
        ("adapter", 1e-2, 0.5, 1),
        ("adapter", 1e-2, 1.0, 1),
        ("text encoder", 5e-3, 0.25, 1),
    ]
    found = groups(named, [], TrainConfig(optimiser="prodigy"), "spectral_a", factors)
    assert [(g.label, g.factor, len(g.parameters)) for g in found] == [
        ("adapter", 1.0, 2),
        ("text encoder", 1.0, 1),
    ]
