"""Plots: nothing clipped or overlapping, values where they belong, gaps marked, always the same."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from PIL import Image, ImageFont

from spectral_core.errors import SpectralAdapterError
from spectral_core.plots import (
    abbreviate,
    as_picture,
    contact_sheet,
    heatmap,
    line_plot,
    save_picture,
    text,
)
from spectral_core.plots.scales import SERIES, heat, log_ticks, number, ticks

NAN = math.nan
LONG = "a very long label that no plot could ever show in one piece, with many many words in it"
LAYERS = [f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn2.to_out.0" for i in range(300)]


def picture(width=64, height=64, value=0.5) -> torch.Tensor:
    return torch.full((3, height, width), value)


def numbers(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


PLOTS = {
    "sheet": lambda: contact_sheet(
        [[picture(), picture(32, 48)], [picture(80, 20), None]], [LONG, "b"], ["x", LONG], LONG
    ),
    "sheet of one": lambda: contact_sheet([[picture(8, 8)]], title=LONG),
    "sheet of large ones": lambda: contact_sheet([[picture(900, 500)] * 2], ["row"], ["a", "b"]),
    "ragged sheet": lambda: contact_sheet([[picture()], [picture()] * 3], ["a", "b"], ["1", "2", "3"]),
    "heatmap": lambda: heatmap(
        numbers(20, 10), LAYERS[:20], list("abcdefghij"), "t", legend="l", x_label="x"
    ),
    "heatmap of one": lambda: heatmap([[0.3]], ["row"], ["column"], "one"),
    "heatmap, long labels": lambda: heatmap(numbers(2, 3), [LONG, "b"], [LONG] * 3, LONG, legend=LONG),
    "heatmap, tall": lambda: heatmap(numbers(300, 3), LAYERS, ["a", "b", "c"], y_label="layers"),
    "heatmap, wide": lambda: heatmap(numbers(3, 200), ["a", "b", "c"], [f"column {i}" for i in range(200)]),
    "heatmap, bare": lambda: heatmap(numbers(4, 40) * 1e9),
    "lines": lambda: line_plot({LONG: [1, 2, 3], "b": ([0, 5, 9], [-1e-4, NAN, 2])}, LONG, LONG, LONG),
    "lines, log": lambda: line_plot({"a": ([1, 10, 1e6], [1e-12, 0, 1e5])}, log_x=True, log_y=True),
    "lines, many": lambda: line_plot({f"s{i}": [i, i + 1] for i in range(40)}, "x", "y", "many"),
    "lines, constant": lambda: line_plot({"": [2.0]}, "x"),
    "lines, next to nothing": lambda: line_plot({"": [3e-14]}, "x"),
    "lines, less than nothing": lambda: line_plot({"": ([1e-20, 2e-20], [-1e-300, 0.0])}, "x"),
    "other letters": lambda: line_plot(
        {"ΔW, σ₁ → ‖x‖": [1.0], "vase à fleurs": [2.0], "花瓶": [3.0]}, title="Größe ≥ 1"
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_label_is_on_the_picture_and_none_covers_another(name):
    image = PLOTS[name]()
    labels = image.info["labels"]
    for label, (left, top, right, bottom) in labels:
        assert 0 <= left <= right <= image.width and 0 <= top <= bottom <= image.height, label
    for (one, a), (two, b) in itertools.combinations(labels, 2):
        across = min(a[2], b[2]) - max(a[0], b[0])
        down = min(a[3], b[3]) - max(a[1], b[1])
        assert across <= 1 or down <= 1, (one, two)


@pytest.mark.parametrize("name", PLOTS)
def test_the_same_input_gives_the_same_picture_with_a_white_border(name):
    image = PLOTS[name]()
    assert image.tobytes() == PLOTS[name]().tobytes()
    assert image.mode == "RGB" and image.width <= 2000
    for box in ((0, 0, image.width, 6), (0, image.height - 6, image.width, image.height)):
        assert [colour for _, colour in image.crop(box).getcolors()] == [(255, 255, 255)]


@pytest.mark.parametrize("name", PLOTS)
def test_plots_need_neither_a_scalable_font_nor_system_fonts(name, monkeypatch):
    bitmap = ImageFont.load_default_imagefont()

    def old_load_default():
        return bitmap

    def missing(*_args, **_kwargs):
        raise OSError("cannot open resource")

    monkeypatch.setattr(ImageFont, "load_default", old_load_default)
    monkeypatch.setattr(ImageFont, "truetype", missing)
    caches = (text._fonts, text._has, text.drawable)
    for cache in caches:
        cache.cache_clear()
    try:
        assert PLOTS[name]().info["labels"] is not None
    finally:
        for cache in caches:
            cache.cache_clear()


def test_contact_sheet_enlarges_with_hard_pixels_and_keeps_colours():
    chess = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    sheet = contact_sheet([[chess.float().expand(3, -1, -1), None]])
    assert sheet.size == (2 * 24 + 2 * 192 + 8, 2 * 24 + 192)
    assert [sheet.getpixel((24 + x, 24)) for x in (0, 2, 3, 5, 6)] == [(v, v, v) for v in (0, 0, 255, 255, 0)]
    assert sheet.getpixel((24 + 200 + 96, 24 + 20)) == (240, 241, 244)


def test_columns_are_as_wide_as_their_own_pictures():
    """A wide picture grows as much as the squares beside it; a strip stays within twice the cell."""
    square, wide = Image.new("RGB", (128, 128), "red"), Image.new("RGB", (192, 128), "blue")
    sheet = contact_sheet([[square, square], [square, wide], [None, None]])
    assert sheet.size == (2 * 24 + 256 + 8 + 384, 2 * 24 + 3 * 256 + 2 * 8)
    blue = [x for x in range(sheet.width) if sheet.getpixel((x, 24 + 256 + 8 + 100)) == (0, 0, 255)]
    assert (blue[0], blue[-1]) == (24 + 256 + 8, sheet.width - 25)
    middle = 24 + 256 + 8 + 192
    red = [x for x in range(260 + 24, sheet.width) if sheet.getpixel((x, 24 + 100)) == (255, 0, 0)]
    assert (red[0], red[-1]) == (middle - 128, middle + 127), "in the middle of its wide column"
    for size in ((1000, 16), (300, 4)):
        assert contact_sheet([[Image.new("RGB", size)]]).width <= 2 * 24 + 384


def test_pictures_from_tensors():
    red = torch.zeros(3, 2, 5)
    red[0] = 1.7
    assert as_picture(red).size == (5, 2) and as_picture(red).getpixel((0, 0)) == (255, 0, 0)
    assert as_picture(red[None]).getpixel((4, 1)) == (255, 0, 0)
    assert as_picture(torch.full((1, 2, 2), 0.5)).getpixel((0, 0)) == (128, 128, 128)
    assert as_picture(Image.new("L", (3, 3), 9)).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: contact_sheet([]), "no picture"),
        (lambda: contact_sheet([[None]]), "no picture"),
        (lambda: contact_sheet([[picture()]], ["a", "b"]), "2 row labels for 1 rows"),
        (lambda: contact_sheet([[picture()]], column_labels=["a", "b"]), "2 column labels for 1 columns"),
        (lambda: contact_sheet([[torch.zeros(8, 8, 3)]]), r"\(8, 8, 3\) is no picture: expected \(3, H, W\)"),
        (lambda: contact_sheet([[torch.full((3, 4, 4), NAN)]]), "NaN or Inf"),
        (lambda: contact_sheet([["file.png"]]), "a str is no picture"),
        (lambda: heatmap([]), "empty or ragged"),
        (lambda: heatmap([[]]), "empty or ragged"),
        (lambda: heatmap([[1, 2], [3]]), "empty or ragged"),
        (lambda: heatmap([1.0, 2.0]), "empty or ragged"),
        (lambda: heatmap([[NAN, None]]), "without a single finite number"),
        (lambda: heatmap([[1.0]], ["a", "b"]), "2 row labels for 1 rows"),
        (lambda: line_plot({}), "no finite point in 0 series"),
        (lambda: line_plot({"a": [NAN, None]}), "no finite point in 1 series"),
        (lambda: line_plot({"a": [0, -1]}, log_y=True), "only values above 0 count"),
        (lambda: line_plot({"a": ([1], [1, 2])}), "series 'a': 1 x values for 2 y values"),
    ],
)
def test_refused_inputs(draw, message):
    with pytest.raises(SpectralAdapterError, match=message):
        draw()


def test_heatmap_colours_and_gaps():
    image = heatmap([[0.0, 1.0], [NAN, 0.5]], value_format="{:.0f}")
    width, height = 80, 34
    place = {(r, c): (24 + c * width + 4, 24 + r * height + 4) for r in (0, 1) for c in (0, 1)}
    assert image.getpixel(place[0, 0]) == heat(0) and image.getpixel(place[0, 1]) == heat(1)
    assert image.getpixel(place[1, 0]) == (240, 241, 244) and image.getpixel(place[1, 1]) == heat(0.5)
    assert [label for label, _ in image.info["labels"]][:3] == ["0", "1", "0"]


def test_tall_heatmaps_average_neighbours_and_say_so():
    image = heatmap([[float(i), 1.0] for i in range(241)], LAYERS[:241], low=0, high=240)
    labels = [label for label, _ in image.info["labels"]]
    assert "Each cell is the mean over up to 3 rows." in labels
    rows = [label for label in labels if label.startswith("down")]
    assert len(rows) == 81 and rows[0] == "down0.at0.tb0.attn2.to_out +2" and not rows[-1].endswith("+2")
    box = dict(image.info["labels"])["down3.at0.tb0.attn2.to_out +2"]
    assert image.getpixel((int(box[2]) + 14, int(box[1] + box[3]) // 2)) == heat(4 / 240)


def test_wide_heatmaps_average_their_columns():
    image = heatmap([[float(i) for i in range(160)]] * 2, low=0, high=160)
    assert "Each cell is the mean over up to 2 columns." in [label for label, _ in image.info["labels"]]
    height = image.height - 30
    assert any(image.getpixel((25, y)) == heat(0.5 / 160) for y in range(24, height))
    width = next(x for x in range(25, 60) if image.getpixel((x, 70)) != image.getpixel((25, 70))) - 24
    assert image.getpixel((24 + 60 * width + 5, 70)) == heat(120.5 / 160)


def test_lines_pass_through_their_points():
    image = line_plot({"a": ([0, 1, 2], [0, 10, NAN]), "b": ([0, 2], [10, 10])}, width=600, height=300)
    at = dict(image.info["labels"])
    left, middle = ((at[t][0] + at[t][2]) / 2 for t in ("0.5", "1"))
    unit = middle - left
    top, bottom = (next((b[1] + b[3]) / 2 for t, b in image.info["labels"] if t == v) for v in ("10", "0"))
    for x, y, colour in ((1, 10, SERIES[1]), (0.5, 5, SERIES[0]), (1.5, 10, SERIES[1]), (1.5, 5, (255,) * 3)):
        place = (round(left + (x - 0.5) * 2 * unit), round(bottom + (top - bottom) * y / 10))
        assert image.getpixel(place) == colour, (x, y)


def test_colour_scale_rises_evenly_in_lightness():
    def lightness(colour):
        linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16

    values = [lightness(heat(i / 32)) for i in range(33)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert min(steps) > 0.5 * max(steps) > 0
    assert heat(-1) == heat(0) and heat(2) == heat(1)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 7), (1e-9, 3e-9), (0.31, 0.32), (5, 5), (0, 0), (-2e6, -1)]
)
def test_ticks_enclose_the_values_with_round_numbers(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 9
    steps = {round((b - a) / (found[1] - found[0]), 3) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}
    assert len({number(t) for t in found}) == len(found)


def test_one_value_alone_stands_on_an_axis_from_zero():
    assert (ticks(1, 1)[0], ticks(1, 1)[-1]) == (0, 1)
    assert (ticks(-3, -3)[0], ticks(-3, -3)[-1]) == (-3, 0)
    assert (ticks(0, 0)[0], ticks(0, 0)[-1]) == (0, 1)


def test_log_ticks_and_numbers():
    assert log_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert log_ticks(1, 1) == pytest.approx([1, 10])
    assert len(log_ticks(1e-12, 1e12)) <= 9
    assert [number(v) for v in (0, 0.25, 1234, 20000, 2e5, 1.5e-7)] == [
        "0", "0.25", "1234", "20,000", "2e5", "1.5e-7",
    ]  # fmt: skip


def test_layer_names_are_abbreviated():
    assert abbreviate(LAYERS[2]) == "down2.at0.tb0.attn2.to_out"
    assert abbreviate("text_encoder.text_model.encoder.layers.3.self_attn.q_proj") == "te.3.q_proj"
    assert abbreviate("unet.mid_block.resnets.1.conv1") == "mid.res1.conv1"
    assert abbreviate("step 10") == "step 10"


def test_save_is_atomic(tmp_path, monkeypatch):
    path = save_picture(contact_sheet([[picture()]]), tmp_path / "new" / "sheet.png")
    saved = Image.open(path)
    assert saved.size == contact_sheet([[picture()]]).size
    save_picture(contact_sheet([[picture(), picture()]]), path)
    assert Image.open(path).size != saved.size
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda *_a, **_k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SpectralAdapterError, match=r"sheet\.png: cannot be written \(disk full\)"):
        save_picture(contact_sheet([[picture()]]), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["sheet.png"]
    with pytest.raises(SpectralAdapterError, match=r"expected a name that ends in \.png"):
        save_picture(saved, tmp_path / "x.exe")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_formats(tmp_path, suffix):
    path = save_picture(contact_sheet([[picture()]]), tmp_path / f"sheet{suffix}")
    assert Image.open(path).format == {".jpg": "JPEG", ".webp": "WEBP"}[suffix]
