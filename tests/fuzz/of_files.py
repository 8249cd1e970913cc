"""Readers of files that people give each other: adapters, LoRAs, statistics, pictures, caches."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spectral_core.adapter import schedule_words, strengths
from spectral_core.adapter.adapter import Adapter
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file, metadata
from spectral_core.files.container import open_safely
from spectral_core.files.lora_export import export_lora
from spectral_core.files.lora_import import read_lora
from spectral_core.maths.lowrank import check_usable, concatenate, delta
from spectral_core.maths.svd import Columns
from spectral_core.maths.svd_cache import SUFFIX as SVD_SUFFIX
from spectral_core.maths.svd_cache import SVDCache, content_key
from spectral_core.methods import FouRAConfig, LoRAConfig, SpectralAConfig, SpectralRConfig
from spectral_core.pipelines import single_file
from spectral_core.statistics import file as statistics_file
from spectral_core.statistics.moments import Statistics
from spectral_core.training.data import disk_cache, folder
from tests.fuzz import crafted, mutate
from tests.fuzz.reader import Reader, in_container, of_file, saved, texts


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
    strengths.describe(adapter)


def _saved_again(adapter: Adapter, folder: Path) -> None:
    """What was read can be written, or is refused: as this project's file and as a LoRA."""
    for work in (
        lambda: adapter_file.save(adapter, folder / "again.safetensors", overwrite=True),
        lambda: export_lora(adapter, folder / "lora.safetensors", overwrite=True),
    ):
        with contextlib.suppress(SpectralAdapterError):
            work()


def _adapter(path: Path) -> None:
    adapter_file.is_adapter_file(path)
    adapter_file.inspect(path)
    adapter = adapter_file.load(path)
    used(adapter)
    _saved_again(adapter, path.parent)


def _tensors_alone(path: Path) -> None:
    used(adapter_file.from_tensors(open_safely(path).read(), "a").adapter)


def _lora(path: Path) -> None:
    metadata.trained_words(open_safely(path).metadata)
    adapter = read_lora(path).adapter
    used(adapter)
    _saved_again(adapter, path.parent)


def _statistics(path: Path) -> None:
    found = statistics_file.load(path)
    for name in found:
        each = found[name]
        assert bool(torch.isfinite(each.coordinates(torch.ones(1, each.width))).all())


def _picture(path: Path) -> None:
    folder.picture_size(path)
    assert bool(torch.isfinite(folder.load_picture(path, 16, 16)).all())


def _mask(path: Path) -> None:
    assert bool(torch.isfinite(folder.load_mask(path, 16, 16)).all())


def _cached_tensors(path: Path) -> None:
    """A damaged entry is made anew; what comes is a dictionary of tensors either way."""
    cache = disk_cache.TensorCache(path.parent)
    found = cache.get_or_compute(path.stem, lambda: {"latent": torch.zeros(4)})
    assert all(isinstance(value, torch.Tensor) for value in found.values())


_MATRIX = torch.linspace(-1, 1, 48).reshape(8, 6) + torch.eye(8, 6)
_COLUMNS = Columns.block(0, 2)


def _cached_columns(path: Path) -> None:
    """Whatever lies in the cache, the right columns come."""
    found = SVDCache(path.parent).get_or_compute(_MATRIX, _COLUMNS)
    wanted = torch.linalg.svdvals(_MATRIX)[:2]
    assert torch.allclose(found.s, wanted, atol=1e-5), "wrong columns out of the cache"


def _peft(path: Path) -> None:
    used(read_lora(path.with_name("adapter_model.safetensors")).adapter)


def _whole_model(header: bytes, scratch: Path) -> None:
    """A checkpoint with this header, its tensors a hole of the right size."""
    path = scratch / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + _model_bytes("sd1"))
    try:
        single_file.inspect_checkpoint(path)
    finally:
        path.unlink()


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
    found = [saved(lambda p, c=c: adapter_file.save(crafted.adapter(c), p), scratch) for c in configs]
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
    return (*found, saved(lambda p: adapter_file.save(rich, p, config_tensor=True), scratch))


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
    found = [saved(lambda p, f=f: crafted.file(f, _SHOWN, p), scratch) for f in files]
    return (*found, saved(lambda p: export_lora(crafted.adapter(), p), scratch))


def _statistics_seed(scratch: Path) -> bytes:
    x = torch.rand(20, 6)
    whole = {"unet.a": Statistics.of(x), "unet.b": Statistics.of(x).within(torch.eye(6)[:3].double())}
    return saved(lambda p: statistics_file.save(whole, p), scratch)


_SHOWN = {
    "ss_network_dim": "2",
    "trained_words": '["cat", "dog"]',
    "ss_tag_frequency": '{"10_cat": {"cat": 3}}',
}


def _peft_seed(scratch: Path) -> tuple[bytes, bytes]:
    """A PEFT file, and the settings beside it."""
    name = "base_model.model.unet.down_blocks.0.to_q.lora_{}.weight"
    tensors = {name.format("A"): torch.rand(2, 8), name.format("B"): torch.rand(6, 2)}
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "alpha_pattern": {"to_q": 8},
        "use_rslora": True,
    }
    return saved(lambda p: crafted.file(tensors, {}, p), scratch), json.dumps(settings).encode()


def _model_shapes(family: str) -> dict[str, list[int]]:
    """The telling names of a family's checkpoint, and one tensor in place of all the others of a part."""
    known, unet = single_file.FAMILIES[family], single_file.UNET
    first, text = [320, 4, 3, 3], [640, known.text_width]
    rest = [known.unet_parameters - math.prod(first) - math.prod(text)]
    return {
        f"{unet}input_blocks.0.0.weight": first,
        f"{unet}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": text,
        f"{unet}rest": rest,
        **{f"{prefix}all": [size] for prefix, size in known.parts.values()},
    }


def _model_bytes(family: str) -> int:
    return 2 * sum(math.prod(shape) for shape in _model_shapes(family).values())


def _model_header(family: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"modelspec.prediction_type": "epsilon"}}
    position = 0
    for name, shape in _model_shapes(family).items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, end]}
        position = end
    return json.dumps(header).encode()


def _cache_seed(scratch: Path) -> bytes:
    cache = SVDCache(scratch)
    cache.get_or_compute(_MATRIX, _COLUMNS)
    return (scratch / f"{content_key(_MATRIX, _COLUMNS)}{SVD_SUFFIX}").read_bytes()


def _table(rng: random.Random, seed: bytes) -> bytes:
    """Mutations of a JSON file: mostly of what it says, sometimes of its text."""
    if rng.random() < 0.3:
        return texts(rng, seed)
    return json.dumps(mutate.table(rng, json.loads(seed))).encode("utf-8", "surrogatepass")


def readers(scratch: Path) -> list[Reader]:
    """scratch: an empty folder, for making the sound inputs."""
    adapters, tensors = _adapters(scratch), "a.safetensors"
    peft, settings = _peft_seed(scratch)
    key = adapter_file.CONFIG_KEY

    def read_peft(content: bytes, where: Path) -> None:
        (where / "adapter_model.safetensors").write_bytes(peft)
        (where / "adapter_config.json").write_bytes(content)
        _peft(where / "adapter_config.json")

    return [
        of_file("adapter", adapters, in_container(key), _adapter, tensors),
        of_file("adapter in tensors", adapters[-1:], in_container(key), _tensors_alone, tensors),
        of_file("lora", _loras(scratch), in_container("lora_adapter_metadata", *_SHOWN), _lora, tensors),
        Reader("lora settings", (settings,), _table, read_peft),
        of_file(
            "statistics",
            (_statistics_seed(scratch),),
            in_container(statistics_file.KEY),
            _statistics,
            tensors,
        ),
        Reader("checkpoint of a model", (_model_header("sd1"),), _table, _whole_model),
        of_file("picture", _pictures(), mutate.data, _picture, "a.png"),
        of_file("mask", _pictures()[:8], mutate.data, _mask, "a.mask.png"),
        of_file(
            "cached latents",
            (saved(lambda p: crafted.file({"latent": torch.ones(4)}, {}, p), scratch),),
            in_container(),
            _cached_tensors,
            tensors,
            refuses=False,
        ),
        of_file(
            "cached columns",
            (_cache_seed(scratch),),
            in_container(),
            _cached_columns,
            f"{content_key(_MATRIX, _COLUMNS)}{SVD_SUFFIX}",
            refuses=False,
        ),
    ]
