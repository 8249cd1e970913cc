"""The one writer: whole and synced with its folder, or nothing; and every other writer goes through it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from spectral_core import whole_file
from spectral_core.whole_file import write_whole
from tests.conftest import ROOT


def test_content_and_folder_are_synced_before_and_after_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        said.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr(whole_file.os, "fsync", synced)
    monkeypatch.setattr(whole_file.os, "replace", lambda a, b: (said.append("name"), replace(a, b)))
    write_whole(tmp_path / "a.json", "ü")
    assert said == ["file", "name", "folder"] and (tmp_path / "a.json").read_bytes() == "ü".encode()


def test_an_error_in_the_midst_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"old")
    with pytest.raises(ValueError, match="full"), whole_file.whole_file(path) as stream:
        stream.write(b"half")
        raise ValueError("full")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_file_that_has_appeared_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"

    def refuse(*_: object) -> None:
        raise PermissionError("no hard links")

    for links in (True, False):
        path.unlink(missing_ok=True)
        if not links:
            monkeypatch.setattr(whole_file.os, "link", refuse)
        with whole_file.whole_file(path, overwrite=False) as stream:
            stream.write(b"first")
        with pytest.raises(FileExistsError), whole_file.whole_file(path, overwrite=False) as stream:
            stream.write(b"second")
        assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def test_nothing_else_in_the_core_writes_or_renames_files() -> None:
    for source in (ROOT / "spectral_core").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        if source.name != "whole_file.py":
            assert "os.replace" not in text and "mkstemp" not in text, source
            is_own = source.parent.name == "clip_bpe"  # into a temporary folder, for a library to read
            assert is_own or (".write_text(" not in text and ".write_bytes(" not in text), source
