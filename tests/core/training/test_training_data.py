"""Picture folders: layout, captions, broken input, order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spectral_core.errors import SpectralAdapterError
from spectral_core.training.data.folder import (
    Example,
    Order,
    find_examples,
    insert_token,
    load_mask,
    load_picture,
    load_pictures,
)
from spectral_core.training.engine.checks import caption_warnings


@pytest.mark.parametrize("level", [0, 32768, 65535])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path, level: int) -> None:
    """Pictures and masks: Pillow's own conversion cuts everything above 255 off to white."""
    Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / "a.png")
    wanted = level / 65535
    assert float(load_picture(tmp_path / "a.png", 8, 8).mean()) == pytest.approx(2 * wanted - 1, abs=0.01)
    assert float(load_mask(tmp_path / "a.png", 8, 8).mean()) == pytest.approx(wanted, abs=0.005)


def test_pictures_of_other_formats_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.gif", "c.tiff"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    for name in ("d.avif", "e.xcf", "notes.md", "f.xcf"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a.txt", "e.txt"):
        (tmp_path / name).write_text("a thing")
    examples = find_examples(tmp_path, "<v>")
    (note,) = caption_warnings(examples)
    assert [e.path.name for e in examples] == ["a.jpg"]
    assert note == "4 files are left out, which are not read: b.gif, c.tiff, d.avif, …"


def picture(
    path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (20, 10), mode: str = "RGB"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def test_kohya_layout_repeats_captions_and_placeholder(tmp_path: Path) -> None:
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("\ufeff<TOK> on\n a table ", encoding="utf-8")
    picture(tmp_path / "a.JPG")
    picture(tmp_path / "10_dog" / "c.webp").with_suffix(".caption").write_text("grass", encoding="utf-8")
    picture(tmp_path / "regularisation" / "ignored.png")
    found = find_examples(tmp_path, "<dog>")
    assert [(e.path.name, e.caption, e.repeats) for e in found] == [
        ("a.JPG", "a picture of <dog>", 1),
        ("b.png", "<dog> on a table", 1),
        ("c.webp", "<dog>, grass", 10),
    ]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", "<x>"),
        ("<TOK>", "<x>"),
        ("my <x> here", "my <x> here"),
        ("a, b", "<x>, a, b"),
        ("<TOK> <TOK>", "<x> <x>"),
    ],
)
def test_insert_token(caption: str, expected: str) -> None:
    assert insert_token(caption, "<x>") == expected


def test_empty_or_missing_folder_and_broken_pictures_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(SpectralAdapterError, match=r"nowhere.*not a folder"):
        find_examples(tmp_path / "nowhere", "<x>")
    with pytest.raises(SpectralAdapterError, match=r"no pictures found; expected files ending in \.png"):
        find_examples(tmp_path, "<x>")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(SpectralAdapterError, match=r"broken\.png: cannot be read"):
        load_picture(broken, 8, 8)
    picture(tmp_path / "ok.png").with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SpectralAdapterError, match=r"ok\.txt: not UTF-8"):
        find_examples(tmp_path, "<x>")


def test_pictures_are_cropped_about_the_centre_turned_and_flattened_on_white(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (255, 255, 255)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert torch.equal(load_picture(tmp_path / "wide.png", 8, 8), torch.ones(3, 8, 8))

    clear = picture(tmp_path / "clear.png", (255, 0, 0, 0), mode="RGBA")
    assert torch.equal(load_picture(clear, 4, 4), torch.ones(3, 4, 4))

    turned = Image.fromarray(
        np.concatenate([np.zeros((4, 8, 3), np.uint8), np.full((4, 8, 3), 255, np.uint8)])
    )
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    shown = load_picture(tmp_path / "turned.png", 8, 8)
    assert shown[:, 0].min() == 1 and shown[:, -1].max() == -1
    assert load_pictures([Example(clear, ""), Example(clear, "")], 6, 4).shape == (2, 3, 4, 6)


def test_order_shows_every_picture_as_often_as_its_repeats_and_is_seeded() -> None:
    examples = [Example(Path("a"), "a"), Example(Path("b"), "b", repeats=3)]
    order = Order(examples, 2, seed=5)
    batches = [order.next() for _ in range(6)]  # three epochs of four
    assert Counter(i for b in batches for i in b) == {0: 3, 1: 9}
    assert all(sorted(batches[2 * k] + batches[2 * k + 1]) == [0, 1, 1, 1] for k in range(3))
    again = Order(examples, 2, seed=5)
    assert [again.next() for _ in range(6)] == batches
    assert [Order(examples, 2, seed=s).next() for s in range(8)] != [batches[0]] * 8
