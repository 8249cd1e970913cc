"""The file of a finished run: its own is replaced, somebody else's never, also one that appears meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectral_core.adapter.adapter import Adapter, create
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load
from spectral_core.methods import LoRAConfig
from spectral_core.training.runs import place as place_module
from spectral_core.training.runs.finished import RECORD, find_result, save_result, save_stopped
from spectral_core.training.runs.place import Place, take_place


def adapter(seed: int) -> Adapter:
    return create({"unet.a": torch.randn(6, 5)}, LoRAConfig(2), generator=torch.Generator().manual_seed(seed))


def place(folder: Path) -> Place:
    return take_place(folder / ".runs", "x", {"config": {"steps": 2}})


def test_a_run_replaces_its_own_file_only(tmp_path: Path) -> None:
    run = place(tmp_path)
    expected = find_result(run, tmp_path)
    assert expected.path == tmp_path / "x.safetensors" and not expected.made and not expected.is_there
    assert save_result(adapter(1), expected, run, 2) == expected.path
    known = find_result(run, tmp_path)
    assert known.path == expected.path and known.is_there
    assert save_result(adapter(2), known, run, 4) == expected.path
    assert load(expected.path).content_hash == adapter(2).content_hash
    expected.path.unlink()
    assert find_result(run, tmp_path).made and not find_result(run, tmp_path).is_there


def test_somebody_elses_file_stays(tmp_path: Path) -> None:
    run, theirs = place(tmp_path), tmp_path / "x.safetensors"
    early = find_result(run, tmp_path)
    theirs.write_bytes(b"theirs")
    assert find_result(run, tmp_path).path == tmp_path / "x-2.safetensors"
    assert save_result(adapter(1), early, run, 2) == tmp_path / "x-2.safetensors"
    assert theirs.read_bytes() == b"theirs"
    assert find_result(run, tmp_path).path.name == "x-2.safetensors", "it is remembered"


def test_a_broken_record_is_an_error_and_leads_nowhere_else(tmp_path: Path) -> None:
    run = place(tmp_path)
    for text in ("{", "[]", "{}", '{"file": 3}', '{"file": "../../y.safetensors", "steps": 1}', "[" * 9000):
        (run.folder / RECORD).write_text(text)
        with pytest.raises(
            SpectralAdapterError, match=r"result\.json: what this run has saved cannot be read"
        ):
            find_result(run, tmp_path)


def test_a_record_that_cannot_be_written_is_told_of_and_the_adapter_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place_module, "write_whole", full)
    with pytest.raises(SpectralAdapterError, match=r"result\.json: cannot be written \(No space left"):
        save_result(adapter(1), find_result(run, tmp_path), run, 2)
    assert load(tmp_path / "x.safetensors").content_hash == adapter(1).content_hash


def test_a_stopped_run_keeps_what_it_has_in_its_own_folder(tmp_path: Path) -> None:
    run = place(tmp_path)
    for seed in (1, 2):
        assert save_stopped(adapter(seed), run).parent == run.folder
    assert not list(tmp_path.glob("*.safetensors"))
