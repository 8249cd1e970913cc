"""SD 1.x and SD3 through CheckpointLoaderSimple: an adapter in the whole chain of the host's own nodes.

The checkpoints are tiny (``tiny_checkpoints``), their pictures noise; what counts is that the adapter finds
its layers by the host's own names (SD3: rows of the fused q,k,v), that merged and live agree, and that the
base is the same to the bit afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectral_core.adapter.adapter import Adapter, create
from spectral_core.files import adapter_file as fileformat
from spectral_core.methods import MethodConfig, method_of
from spectral_core.methods.foura import FouRAConfig
from spectral_core.methods.lora import LoRAConfig
from spectral_core.methods.spectral_a import SpectralAConfig
from tests.host.apply import tiny_checkpoints as tiny
from tests.host.booted import Host
from tests.host.graphs import Graph, node, picture, pictures_of
from tests.host.watching import succeed

ADAPTIVE = FouRAConfig(rank=4, transform="dct", gate="adaptive")
METHODS: dict[str, MethodConfig] = {
    "foura": ADAPTIVE,
    "foura-ungated": FouRAConfig(rank=4, transform="dft", gate="none"),
    "spectral_a": SpectralAConfig(columns=(0, 1, 2, 3)),
    "lora": LoRAConfig(rank=4),
}
ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def layers_of(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer names and weights of a few attention layers, with the text encoder where names allow it."""
    model = "model.diffusion_model."
    if family == "sd3":
        width, found = tiny.SD3_WIDTH, {}
        for i in range(2):
            fused = weights[f"{model}joint_blocks.{i}.x_block.attn.qkv.weight"]
            for row in (0, 2):  # q and v
                rows = slice(row * width, (row + 1) * width)
                name = f"diffusion_model.joint_blocks.{i}.x_block.attn.qkv[{rows.start}:{rows.stop}]"
                found[name] = fused[rows].float()
        return found
    native = f"{model}input_blocks.1.1.transformer_blocks.0"
    clip = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.v_proj.weight"
    found = {
        f"{ATTENTION}.{layer}": weights[f"{native}.{layer}.weight"].float()
        for layer in ("attn1.to_q", "attn1.to_v", "attn2.to_k", "ff.net.2")
    }
    return {**found, "text_encoder.text_model.encoder.layers.0.self_attn.v_proj": weights[clip].float()}


def trained(weights: dict[str, Tensor], method: MethodConfig) -> Adapter:
    """A new adapter with every trained number moved off its start."""
    generator = torch.Generator().manual_seed(5)
    made = create(weights, method, generator=generator)
    layers = {}
    for name, layer in made.layers.items():
        (term,) = layer.terms
        moved = dict(term.params)
        for key in method_of(method).trainable(method):
            moved[key] = moved[key] + 0.2 * torch.randn(moved[key].shape, generator=generator)
        layers[name] = replace(layer, terms=(replace(term, params=moved),))
    return replace(made, layers=layers)


@pytest.fixture(scope="module", params=["sd1", "sd3"])
def checkpoint(request: pytest.FixtureRequest, host: Host) -> tuple[str, dict[str, Tensor]]:
    """A family, and the weights of its checkpoint in this host's models."""
    family = request.param
    weights = getattr(tiny, family)()
    tiny.write(weights, host.folder / "models" / "checkpoints" / f"{family}.ckpt")
    return family, weights


def graph(family: str, again: int, **more: Any) -> Graph:
    """Two steps of a small picture; the last of ``more`` is what the sampler gets. ``again``: 0 to 9."""
    last = next(reversed(more)) if more else "checkpoint"
    made = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{family}.ckpt"),
        **more,
        **picture([last, 0], [last, 1], ["checkpoint", 2], "a red star", steps=2, size=64),
    }
    made["sampler"]["inputs"] |= {"sampler_name": "euler", "denoise": 1.0 - 1e-5 * again}
    return made


def loaded(name: str) -> dict[str, Any]:
    on = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1]}
    inputs = {"adapter_name": name, "strength_model": 1.0, "strength_clip": 1.0}
    return {"load": node("SpectralAdapters_LoadFouRA", **inputs, **on)}


def applied(name: str, mode: str) -> dict[str, Any]:
    inputs = {"strength_model": 1.0, "strength_clip": 1.0}
    return {
        "file": node("SpectralAdapters_LoadFouRA", adapter_name=name, **inputs),
        "apply": node(
            "SpectralAdapters_ApplyAdapter",
            adapter=["file", 2],
            mode=mode,
            base_mismatch="delta",
            model=["checkpoint", 0],
            clip=["checkpoint", 1],
            **inputs,
        ),
    }


def drawn(host: Host, asked: Graph) -> np.ndarray:
    return np.asarray(pictures_of(host, succeed(host, asked).entry)[0]).astype(int)


@pytest.mark.parametrize("kind", list(METHODS))
def test_adapter_on_a_checkpoint(host: Host, checkpoint: tuple[str, dict[str, Tensor]], kind: str) -> None:
    (family, weights), method = checkpoint, METHODS[kind]
    name = f"{family}_{kind}.safetensors"
    path = Path(host.folder / "models" / "spectral_adapters" / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fileformat.save(trained(layers_of(family, weights), method), path)
    base = drawn(host, graph(family, 0))
    with_it = drawn(host, graph(family, 0, **loaded(name)))
    assert np.abs(with_it - base).max() > 8, "the adapter changes the picture"
    live = drawn(host, graph(family, 0, **applied(name, "live")))
    if method is ADAPTIVE:
        assert np.array_equal(live, with_it), "the loader applies an adaptive gate live"
    else:
        merged = drawn(host, graph(family, 0, **applied(name, "merged")))
        assert np.array_equal(merged, with_it)
        assert np.abs(live - merged).max() <= 2
    again = succeed(host, graph(family, 1 + list(METHODS).index(kind)))
    assert "checkpoint" in again.cached and "sampler" not in again.cached
    assert np.array_equal(np.asarray(pictures_of(host, again.entry)[0]), base), "the base is as it was"
