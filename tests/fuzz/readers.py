"""Every reader with sound inputs of its own, how they are mutated, what is done with the result."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from spectral_core.adapter import block_strengths, schedule_words
from spectral_core.adapter.adapter import Adapter
from spectral_core.attach.targets import find_targets
from spectral_core.cli import options
from spectral_core.files import adapter_file
from spectral_core.files.lora_export import export_lora
from spectral_core.files.lora_import import read_lora
from spectral_core.maths.lowrank import check_usable, concatenate, delta
from spectral_core.methods import FouRAConfig, LoRAConfig, SpectralAConfig, SpectralRConfig
from spectral_core.names.layer_name import LayerName
from spectral_core.statistics import file as statistics_file
from spectral_core.statistics.moments import Statistics
from spectral_core.training.data import folder
from spectral_core.training.engine import columns
from spectral_core.training.runs import checkpoint, events, place
from tests.fuzz import crafted, mutate


@dataclass(frozen=True)
class Reader:
    """seeds: sound inputs. change(rng, seed): a hostile one. read(input, path): what a user would do with it;
    it raises AssertionError for a result that must not be."""

    name: str
    seeds: tuple[Any, ...]
    change: Callable[[random.Random, Any], Any]
    read: Callable[[Any, Path], Any]


def _saved(make: Callable[[Path], Any], scratch: Path) -> bytes:
    path = scratch / "seed.safetensors"
    path.unlink(missing_ok=True)
    made = make(path)
    return (made if isinstance(made, Path) else path).read_bytes()


def _in_file(read: Callable[[Path], Any], name: str) -> Callable[[bytes, Path], Any]:
    def write_and_read(content: bytes, scratch: Path) -> Any:
        path = scratch / name
        path.write_bytes(content)
        return read(path)

    return write_and_read


def used(adapter: Adapter) -> None:
    """As merging does: folded, checked, multiplied out; what is accepted is finite."""
    for name, layer in adapter.layers.items():
        strength = adapter.strength_of(name)
        if layer.shape.out_features * layer.shape.fan_in > 1 << 20:
            continue
        terms = [term.factors(layer.shape, strength) for term in layer.terms]
        update = delta(check_usable(concatenate(terms), f"layer {name}"))
        assert bool(torch.isfinite(update.float()).all()), f"accepted and not finite: {name}"
    if adapter.schedule is not None:
        [adapter.schedule.at(i / 7) for i in range(8)]


def _adapter(path: Path) -> None:
    adapter_file.is_adapter_file(path)
    adapter_file.inspect(path)
    used(adapter_file.load(path))


def _lora(path: Path) -> None:
    used(read_lora(path).adapter)


def _statistics(path: Path) -> None:
    found = statistics_file.load(path)
    for name in found:
        each = found[name]
        assert bool(torch.isfinite(each.coordinates(torch.ones(1, each.width))).all())


def _ledger(path: Path) -> None:
    columns.files_of(path.parent, {"layers": {}})


def _picture(path: Path) -> None:
    folder.picture_size(path)
    assert bool(torch.isfinite(folder.load_picture(path, 16, 16)).all())
    folder.load_mask(path, 16, 16)


def _events(path: Path) -> None:
    events.read_events(path)


def _settings(path: Path) -> None:
    place.read_settings(path.parent)


def _pictures() -> tuple[bytes, ...]:
    found = []
    picture = Image.effect_noise((24, 20), 40).convert("RGB")
    for kind, mode in (
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("WEBP", "RGBA"),
        ("BMP", "RGB"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
    ):
        stream = io.BytesIO()
        source = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
        source.save(stream, kind)
        found.append(stream.getvalue())
    return tuple(found)


def _adapters(scratch: Path) -> tuple[bytes, ...]:
    configs = (
        LoRAConfig(2, 4.0),
        FouRAConfig(2),
        SpectralAConfig((0, 3), True),
        SpectralRConfig((1, 2), True),
    )
    found = [_saved(lambda p, c=c: adapter_file.save(crafted.adapter(c), p), scratch) for c in configs]
    rich = crafted.adapter().with_layer_strength("unet.*", 0.5)
    rich = rich.with_schedule(schedule_words.parse("0:1, 1:0.5"))
    rich = Adapter(
        rich.layers,
        rich.provenance,
        1.5,
        rich.layer_strengths,
        rich.schedule,
        {"<cat>": {"text_encoder": torch.ones(1, 4)}},
    )
    return (*found, _saved(lambda p: adapter_file.save(rich, p, config_tensor=True), scratch))


def _loras(scratch: Path) -> tuple[bytes, ...]:
    down, up = torch.rand(2, 8), torch.rand(6, 2)
    kohya = {"lora_unet_mid_block_attentions_0_proj_in": (down, up), "base_model.model.unet.x": (down, up)}
    files: list[dict[str, torch.Tensor]] = [
        {
            f"{name}.{role}.weight": value
            for name, pair in kohya.items()
            for role, value in zip(
                ("lora_down", "lora_up") if "lora_unet" in name else ("lora_A", "lora_B"), pair, strict=True
            )
        }
        | {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(4.0)},
        {
            "lora_unet_c.lora_down.weight": torch.rand(2, 4, 1, 1),
            "lora_unet_c.lora_mid.weight": torch.rand(2, 2, 3, 3),
            "lora_unet_c.lora_up.weight": torch.rand(4, 2, 1, 1),
        },
        {
            f"lora_unet_h.hada_w{i}_{h}": torch.rand(*s)
            for i in (1, 2)
            for h, s in (("a", (6, 2)), ("b", (2, 8)))
        },
        {
            "lora_unet_k.lokr_w1": torch.rand(2, 2),
            "lora_unet_k.lokr_w2_a": torch.rand(3, 1),
            "lora_unet_k.lokr_w2_b": torch.rand(1, 4),
            "lora_unet_k.alpha": torch.tensor(1.0),
        },
    ]
    found = [_saved(lambda p, f=f: crafted.file(f, {"ss_network_dim": "2"}, p), scratch) for f in files]
    return (*found, _saved(lambda p: export_lora(crafted.adapter(), p), scratch))


def _statistics_seed(scratch: Path) -> bytes:
    x = torch.rand(20, 6)
    whole = {"unet.a": Statistics.of(x), "unet.b": Statistics.of(x).within(torch.eye(6)[:3].double())}
    return _saved(lambda p: statistics_file.save(whole, p), scratch)


def _checkpoint_seed(scratch: Path) -> bytes:
    tensors = {"parameters.a": torch.rand(3, 2), "noise": torch.get_rng_state(), "losses": torch.rand(4)}
    state = checkpoint.State(tensors, {"step": 3, "identity": {"a": 1}, "watch": [1.0, None]})
    return checkpoint.write(state, scratch, 3).read_bytes()


class _Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(2, 2), "ff": nn.Linear(2, 2)}) for _ in range(8)
        )


def all_readers(scratch: Path) -> Mapping[str, Reader]:
    """By name. scratch: an empty folder."""
    tree, small = _Tree(), crafted.adapter(layers=4)
    settings = json.dumps({"steps": 10, "rate": 1e-4, "targets": ["a", "b"], "nested": {"x": [1, 2.5, None]}})
    toml = 'steps = 10\nrate = 1e-4\n[nested]\nx = [1, 2.5]\ny = "a"\n'
    events_seed = b'{"event": "step", "step": 1, "loss": 0.5}\n{"event": "end", "step": 2}\n'

    def file(
        name: str, seeds: tuple[bytes, ...], change: Any, read: Callable[[Path], Any], at: str
    ) -> Reader:
        return Reader(name, seeds, change, _in_file(read, at))

    def changed(*words: str) -> Callable[[random.Random, bytes], bytes]:
        return lambda rng, seed: mutate.container(rng, seed, words)

    def texts(rng: random.Random, seed: bytes) -> bytes:
        if rng.random() < 0.3:
            return mutate.data(rng, seed)
        return mutate.text(rng, seed.decode()).encode("utf-8", "surrogatepass")

    adapters, tensors = _adapters(scratch), "a.safetensors"
    readers = [
        file("adapter", adapters, changed(adapter_file.CONFIG_KEY), _adapter, tensors),
        file("columns", adapters[2:4], changed(adapter_file.CONFIG_KEY), _ledger, tensors),
        file("lora", _loras(scratch), changed("lora_adapter_metadata"), _lora, tensors),
        file("statistics", (_statistics_seed(scratch),), changed(statistics_file.KEY), _statistics, tensors),
        file(
            "checkpoint",
            (_checkpoint_seed(scratch),),
            changed(checkpoint.VALUES_KEY),
            checkpoint.read,
            tensors,
        ),
        file("picture", _pictures(), mutate.data, _picture, "a.png"),
        file("json", (settings.encode(),), texts, options.read_table, "a.json"),
        file("toml", (toml.encode(),), texts, options.read_table, "a.toml"),
        file("events", (events_seed,), texts, _events, "events.jsonl"),
        file("run settings", (settings.encode(),), texts, _settings, place.SETTINGS_FILE),
        Reader("layer name", ("unet.a.b[0:5]",), mutate.text, lambda name, _: LayerName.parse(name)),
        Reader(
            "targets",
            ("attention, blocks.*.to_[qk]",),
            mutate.text,
            lambda t, _: find_targets(tree, "unet", t),
        ),
        Reader(
            "block strengths",
            ("down_blocks.1: 0.5, IN: 0.8\nto_q: 0",),
            mutate.text,
            lambda t, _: used(block_strengths.apply(small, t)[0]),
        ),
        Reader(
            "schedule",
            ("0:1, 0.5:0.3, 1:0",),
            mutate.text,
            lambda t, _: schedule_words.named("custom", 0.1, 0.9, t),
        ),
    ]
    return {reader.name: reader for reader in readers}
