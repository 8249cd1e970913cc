"""What a file, a folder or a workflow says is bounded before anything is made of it: a second, 200 MB."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spectral_core.adapter import schedule_words
from spectral_core.adapter.schedule import MOST_POINTS, Schedule
from spectral_core.cli import options
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.files.container import MAX_TABLES, MAX_TENSORS, open_safely, strict_json
from spectral_core.files.lora_import import read_lora
from spectral_core.methods import LoRAConfig, SpectralAConfig
from spectral_core.names.layer_name import LayerName
from spectral_core.training.config import reading
from spectral_core.training.data import folder
from spectral_core.training.data.order import Order
from tests.faults.processes import with_memory
from tests.fuzz import crafted

SECONDS = 1.0
BYTES = 200 << 20


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """At most a second of this process's time; Python's own memory below 200 MB."""
    tracemalloc.start(1)
    started = time.process_time()
    try:
        yield
        spent, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert spent < seconds * 5 and peak < BYTES, (spent, peak)  # tracing makes it about five times as slow


def refused(call: Callable[[], Any], message: str) -> None:
    with bounded(), pytest.raises(SpectralAdapterError, match=message):
        call()


def words(count: int, form: str) -> str:
    return ",".join(form.format(i) for i in range(count))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{" + words(60_000, '"k{}":1') + ',"k7":2}', "'k7' is given twice"),
        ('{"a":[' + words(1_000_000, "[]") + "]}", f"allowed are {MAX_TABLES}"),
        ('{"a":[' + words(3_000_000, "1") + "]}", "values, allowed are"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
        ('{"' + '\\"' * 300_000, "not valid JSON"),
        ('{"' + '\\"[,' * 300_000, "not valid JSON"),
        ("{" + words(MAX_TENSORS + 1, '"k{}":1') + "}", f"allowed are {MAX_TENSORS}"),
        ('{"a":' + "9" * 5000 + "}", "is not allowed"),
        ('{"' + "a" * 2001 + '":{}}', "letters, allowed are 2000"),
    ],
)
def test_headers(tmp_path: Path, header: str, message: str) -> None:
    path = crafted.raw(header.encode(), b"", tmp_path / "a.safetensors")
    refused(lambda: open_safely(path), message)


def test_words_are_no_tables() -> None:
    text = json.dumps({"caption": "[{," * MAX_TABLES})
    assert strict_json(text)["caption"].startswith("[{,")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_strengths": [[f"*.{i}.*", 0.5] for i in range(40_000)]}, "at most 1000"),
        ({"layer_strengths": [["*a" * 9, 0.5]]}, "at most 8"),
        ({"layer_strengths": [["re:.*", 0.5]]}, "regular expressions are not read"),
        ({"schedule": [[i / 20_000, 1.0] for i in range(20_000)]}, f"at most {MOST_POINTS}"),
        ({"tokens": [{"token": f"<{i}>", "parts": ["te"]} for i in range(20_000)]}, "at most 1000"),
        ({"configurations": [{"method": "lora", "rank": 10**12}]}, "from 1 to 65536"),
        (
            {"configurations": [{"method": "spectral_a", "columns": [10**9], "train_scale": False}]},
            "0 .* to 65535",
        ),
    ],
)
def test_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = adapter_file.save(crafted.adapter(), tmp_path / "a.safetensors")
    refused(lambda: adapter_file.load(crafted.edited(path, **changes)), message)


def test_strengths_at_the_bound_are_quick(tmp_path: Path) -> None:
    path = adapter_file.save(crafted.adapter(layers=64), tmp_path / "a.safetensors")
    adapter = adapter_file.load(
        crafted.edited(path, layer_strengths=[[f"*.{i}.*", 0.5] for i in range(1000)])
    )
    with bounded():
        assert adapter.strength_of("unet.down_blocks.3.attentions.0.to_q") == 0.25


def test_schedules_at_the_bound_are_quick() -> None:
    count = MOST_POINTS - 8
    points = tuple((i / (count - 1), float(i % 2)) for i in range(count))
    schedule = Schedule(points)
    with bounded():
        assert all(0 <= schedule.at(i / 1000) <= 1 for i in range(1000))
        assert schedule_words.product(schedule, Schedule.window(0.0, 0.5)).at(0.75) == 0
    refused(lambda: schedule_words.parse("0:1," * 100_000), f"at most {MOST_POINTS}")
    refused(lambda: schedule_words.product(schedule, schedule), f"at most {MOST_POINTS}")


def test_numbers_in_names() -> None:
    assert LayerName.parse("unet.a[0:5]").rows == (0, 5)
    for name in ("unet.a[0:" + "9" * 5000 + "]", "unet.a[0:9999999999]", "unet." + "a" * 2000):
        refused(lambda name=name: LayerName.parse(name), "expected")
    refused(lambda: LoRAConfig(10**12), "65536")
    refused(lambda: SpectralAConfig(tuple(range(70_000))), "65535")


def test_a_lora_mid_that_grows(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(1, 8000, 1, 1),
        "lora_unet_a.lora_mid.weight": torch.ones(8000, 1, 1, 1),
        "lora_unet_a.lora_up.weight": torch.ones(1, 8000, 1, 1),
    }
    path = crafted.file(tensors, {}, tmp_path / "a.safetensors")
    refused(lambda: read_lora(path), "lora_mid takes more than 96 MiB")


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_files_take_the_memory_of_a_layer(tmp_path: Path, kind: str) -> None:
    """Sixty layers that together are half a gigabyte and more, as LoKr out of two megabytes."""
    tensors: dict[str, torch.Tensor] = {}
    for i in range(60):
        name = f"lora_unet_down_blocks_{i}_a"
        if kind == "loha":
            halves = {"a": (4096, 16), "b": (16, 4096)}
            small = {f"w{k}_{half}": shape for k in (1, 2) for half, shape in halves.items()}
            tensors |= {f"{name}.hada_{key}": torch.ones(shape) for key, shape in small.items()}
        else:
            tensors |= {f"{name}.lokr_w1": torch.ones(64, 64), f"{name}.lokr_w2": torch.ones(64, 64)}
    path = crafted.file(tensors, {}, tmp_path / "a.safetensors")

    def work() -> None:
        adapter = read_lora(path).adapter
        assert len(adapter.layers) == 60
        layer = next(iter(adapter.layers.values()))
        assert layer.shape.weight_shape == (4096, 4096)
        layer.factors()

    if sys.platform.startswith("linux"):
        with_memory(400 << 20, work)
    else:
        work()


def test_repeats_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "999999999999_x").mkdir()
    refused(lambda: folder.find_examples(tmp_path), "at most 10000")
    (tmp_path / "999999999999_x").rename(tmp_path / ("9" * 200 + "_x"))
    refused(lambda: folder.find_examples(tmp_path), "no pictures found")
    examples = [folder.Example(tmp_path / "a.png", "", 10_000)] * 101
    refused(lambda: Order(examples, 1, 0), "at most 1000000")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


def test_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(13_000, 13_000))
    refused(lambda: folder.picture_size(path), "13000 × 13000 pixels, at most 50 million")
    path.write_bytes(png(8, 8)[:29])
    refused(lambda: folder.picture_size(path), "cannot be read as a picture")
    for kind in ("GIF", "TIFF", "PPM", "ICO"):
        Image.new("RGB", (16, 16)).save(path, kind)
        refused(lambda: folder.picture_size(path), "cannot be read as a picture")
    words = png(8, 8)[:-12] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 << 20))) + png(8, 8)[-12:]
    path.write_bytes(words)
    refused(lambda: folder.load_picture(path, 8, 8), "cannot be read as a picture")
    many = b"".join(chunk(b"tEXt", b"a\0" + b"b" * (2 << 20)) for _ in range(40))
    path.write_bytes(png(8, 8)[:33] + many + png(8, 8)[33:])
    refused(lambda: folder.load_picture(path, 8, 8), "cannot be read as a picture")
    Image.new("RGB", (16, 8)).save(path, "JPEG")  # the content counts, not the name
    assert folder.picture_size(path) == (16, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_only_ordinary_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    os.mkfifo("a.safetensors")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("b.safetensors")
        for path, kind in (("a.safetensors", "a named pipe"), ("b.safetensors", "a socket")):
            for read in (open_safely, read_lora, adapter_file.load, adapter_file.inspect):
                refused(lambda path=path, read=read: read(Path(path)), kind)
    refused(lambda: open_safely(Path("/dev/zero")), "a device")
    os.mkfifo("a.png")
    refused(lambda: folder.find_examples(Path()), "no pictures found")
    refused(lambda: folder.picture_size(Path("a.png")), "a named pipe")
    Image.new("RGB", (8, 8)).save("b.png")
    os.mkfifo("b.txt")
    os.mkfifo("adapter_config.json")
    assert [e.captioned for e in folder.find_examples(Path())] == [False]


def test_a_sparse_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    size = 4 * 10**12
    header = {"a.lora_down.weight": {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]}}
    header["a.lora_up.weight"] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [size, size + 4]}
    path = crafted.raw(json.dumps(header).encode(), b"", tmp_path / "a.safetensors")
    try:
        os.truncate(path, path.stat().st_size + size + 4)
    except OSError:
        pytest.skip("no sparse files of this size here")
    refused(lambda: read_lora(path), "GiB of memory|larger than the memory")


@pytest.mark.parametrize("text", ["0-999999999999", "9" * 5000, "0-4095," * 1000, "5-3", "a"])
def test_column_lists(text: str) -> None:
    refused(lambda: reading.columns(text), "columns")


@pytest.mark.parametrize("text", ["a" + ".a" * 30_000 + "=1", "[a" + ".a" * 30_000 + "]", "#\n" * 600_000])
def test_toml_whose_keys_are_long(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    refused(lambda: options.read_table(tmp_path / "a.toml"), "dots in a line")


@pytest.mark.parametrize("text", ["9" * 5000, "0", "100000", "8x-8", "x", "512x99999"])
def test_sizes(text: str) -> None:
    refused(lambda: reading.size(text), "size")
