"""Readers of words: settings files, captions, names, what nodes, the command line and prompts are told."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from spectral_core.adapter import block_strengths, schedule_words
from spectral_core.attach.targets import find_targets
from spectral_core.cli import options
from spectral_core.cli import train as command
from spectral_core.names.layer_name import LayerName
from spectral_core.training.config import reading
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data import folder
from spectral_webui import infotext, request
from tests.conftest import imported_pack
from tests.fuzz import crafted, mutate
from tests.fuzz.of_files import used
from tests.fuzz.reader import Reader, of_file, texts


class _Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(2, 2) for name in ("to_q", "to_k", "to_v", "ff")})
            for _ in range(8)
        )


def _captioned(path: Path) -> None:
    assert folder.caption_for(path.with_suffix(".png"), "<cat>")


def _named(name: str, scratch: Path) -> None:
    """Folders and files of such names, where the system takes them."""
    shutil.rmtree(scratch / "pictures", ignore_errors=True)
    try:
        place = scratch / "pictures" / name.replace("/", "∕")[:60]
        place.mkdir(parents=True, exist_ok=True)
        (place / "a.png").touch()
    except (OSError, ValueError):
        return
    folder.find_examples(scratch / "pictures")


def _lists(text: str, _: Path) -> None:
    reading.columns(text)


def _tag(text: str, _: Path) -> None:
    request.rewritten(f"a <spectral:{text}> b", lambda found: found)
    request.tags_in_lines(text)
    infotext.pasted({infotext.KEY: text, "Prompt": text}, lambda digits: "cat")
    request.parse(text.split(":"))


def _prompt(rng: random.Random, seed: str) -> Any:
    return mutate.table(rng, json.loads(seed))


def readers(scratch: Path) -> list[Reader]:
    """scratch: an empty folder; nothing is put there."""
    tree, small = _Tree(), crafted.adapter(layers=4)
    settings = json.dumps({"steps": 10, "rate": 1e-4, "targets": ["a", "b"], "nested": {"x": [1, 2.5, None]}})
    toml = 'steps = 10\nrate = 1e-4\n[nested]\nx = [1, 2.5]\ny = "a"\n'
    training = json.dumps(
        {"steps": 10, "learning_rate": 1e-4, "columns": "0-7", "size": [64, 64], "ema": 0.9}
    )
    known = [option for found in command.groups().values() for option in found]
    imported_pack()
    pack = "pack_under_test.nodes"
    rows = importlib.import_module(f"{pack}.stack").read_rows
    names = importlib.import_module(f"{pack}.host.files.names")
    metadata = importlib.import_module(f"{pack}.host.files.metadata")
    loader = {"class_type": "SpectralAdapters_LoadFouRA", "inputs": {"adapter_name": "a.safetensors"}}
    extra = {"workflow": {"nodes": [], "extra": {"spectral_adapters": {"a.safetensors": "0" * 64}}}}
    prompt = {"prompt": {"1": loader}, "extra_data": {"extra_pnginfo": extra}}

    def configured(path: Path) -> None:
        """The command ``train`` with this file, as far as its settings."""
        command.only(TrainConfig, options.gather(argparse.Namespace(), path, known))

    def text(name: str, seed: str, read: Any) -> Reader:
        return Reader(name, (seed,), mutate.text, lambda t, _: read(t))

    def arrives(content: Any, _: Path) -> None:
        assert metadata.on_prompt(content) is content

    return [
        of_file("json", (settings.encode(),), texts, options.read_table, "a.json"),
        of_file("toml", (toml.encode(),), texts, options.read_table, "a.toml"),
        of_file("training settings", (training.encode(),), texts, configured, "a.json"),
        of_file("caption", (b"a picture of <TOK>, red",), texts, _captioned, "a.txt"),
        Reader("picture folder's name", ("10_cat",), mutate.text, _named, refuses=False),
        text("layer name", "unet.a.b[0:5]", LayerName.parse),
        text("targets", "attention, blocks.*.to_[qk]", lambda t: find_targets(tree, "unet", t)),
        text(
            "block strengths",
            "down_blocks.1: 0.5, IN: 0.8\nto_q: 0",
            lambda t: used(block_strengths.apply(small, t)[0]),
        ),
        text("schedule", "0:1, 0.5:0.3, 1:0", lambda t: schedule_words.named("custom", 0.1, 0.9, t)),
        text("columns in words", "0-7, 12", reading.columns),
        text("size", "768x512", reading.size),
        text("pair", "0.9,0.99", reading.pair),
        text("adapter stack", "a.safetensors | 0.8 | 0.5 | bell\n# lora:b.safetensors | 1", rows),
        text("file name", "cats/a.safetensors", names.safe_parts),
        Reader("prompt that arrives", (json.dumps(prompt),), _prompt, arrives, refuses=False),
        Reader("tag of the webui", ("cat:0.8:1:start=0.2:curve=bell:blocks=IN/0.5",), mutate.text, _tag),
    ]
