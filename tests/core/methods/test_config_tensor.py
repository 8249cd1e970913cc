"""A file whose configuration is a tensor as well: for programs that hand on tensors only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectral_core.adapter.adapter import Adapter
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file as fileformat
from spectral_core.methods import MethodConfig
from tests.core.adapter_cases import ALL, trained

LAYERS = {"unet.a.to_q": torch.randn(12, 10), "text_encoder.b": torch.randn(9, 8)}


def adapter(config: MethodConfig) -> Adapter:
    return trained(config, LAYERS, size=0.1).scaled(0.7).with_layer_strength("unet*", 0.5)


@pytest.mark.parametrize("name", list(ALL))
def test_tensors_alone_are_the_adapter(name: str, tmp_path: Path) -> None:
    ours = adapter(ALL[name])
    path = fileformat.save(ours, tmp_path / "a.safetensors", config_tensor=True)
    tensors = load_file(path)
    assert tensors[fileformat.CONFIG_KEY].dtype == torch.uint8
    assert fileformat.from_tensors(tensors, "x").adapter.content_hash == ours.content_hash
    assert fileformat.load(path).content_hash == ours.content_hash
    assert fileformat.CONFIG_KEY not in load_file(fileformat.save(ours, tmp_path / "b.safetensors"))
    assert "uint8" not in fileformat.inspect(path).dtypes


@pytest.mark.parametrize("damage", ["other", "shorter", "float", "no tensor", "missing", "strange"])
def test_what_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = fileformat.save(adapter(next(iter(ALL.values()))), tmp_path / "a.safetensors", config_tensor=True)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored = tensors[fileformat.CONFIG_KEY]
    if damage == "other":
        text = json.loads(bytes(stored.numpy()))
        text["strength"] = 0.71
        stored = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
    elif damage == "shorter":
        stored = stored[:-1].clone()
    elif damage == "float":
        stored = stored.float()
    if damage in ("other", "shorter", "float"):
        tensors[fileformat.CONFIG_KEY] = stored
        save_file(tensors, path, metadata)
        with pytest.raises(SpectralAdapterError, match="something else than the metadata"):
            fileformat.load(path)
        return
    if damage == "no tensor":
        del tensors[fileformat.CONFIG_KEY]
    elif damage == "missing":
        del tensors[next(k for k in tensors if k.startswith("unet"))]
    else:
        tensors["unet.other.a"] = torch.zeros(2, 2)
    with pytest.raises(SpectralAdapterError, match=r"x: (no tensor|tensor)"):
        fileformat.from_tensors(tensors, "x")
