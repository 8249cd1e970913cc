"""Which columns a new concept gets: the files are the ledger, trainings under way hold theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectral_core.adapter.adapter import Provenance, create
from spectral_core.adapter.fingerprint import fingerprint
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import save
from spectral_core.methods import LoRAConfig, SpectralAConfig, SpectralRConfig
from spectral_core.training.data.locks import FileLock
from spectral_core.training.engine.columns import FOLDER, lowest_free, reserve
from tests.core.training.training_toy import basis

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
        assert held.columns == (4, 5, 6, 7) and held.notes == ()
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
    with FileLock(tmp_path / "lock"):
        assert not FileLock(tmp_path / "lock").try_acquire()
        with pytest.raises(SpectralAdapterError, match="held this lock"):
            FileLock(tmp_path / "lock").acquire(0.1)
    with FileLock(tmp_path / "lock"):
        pass
