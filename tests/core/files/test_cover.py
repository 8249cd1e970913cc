"""Covers: a picture beside a file, never in the place of another."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from spectral_core.files.cover import SIDE, copy_cover, cover_of, write_cover


def test_a_cover_is_small_stays_and_travels(tmp_path: Path) -> None:
    file, other = tmp_path / "v1.5.safetensors", tmp_path / "lora.safetensors"
    assert cover_of(file) is None and copy_cover(file, other) is None
    path = write_cover(file, Image.new("RGBA", (2 * SIDE, SIDE), "red"))
    assert path.name == "v1.5.preview.png" and cover_of(file) == path
    with Image.open(path) as picture:
        assert picture.size == (SIDE, SIDE // 2) and picture.mode == "RGB"
    before = path.read_bytes()
    assert write_cover(file, Image.new("RGB", (8, 8))) == path and path.read_bytes() == before
    assert copy_cover(file, other) == tmp_path / "lora.preview.png"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".png", ".png"], "nothing unfinished is left"


def test_a_broken_cover_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.preview.png").write_bytes(b"no picture")
    assert copy_cover(tmp_path / "a.safetensors", tmp_path / "b.safetensors") is None
    assert not (tmp_path / "b.preview.png").exists()
