"""Exported LoRA files in diffusers and PEFT: a pipeline that loads one computes what the merged adapter
computes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from spectral_core.adapter.adapter import Adapter, AdapterLayer
from spectral_core.files.lora_export import export_lora, import_lora
from spectral_core.maths.lowrank import delta
from spectral_core.names.layer_name import LayerName
from spectral_core.names.spellings import canonical_path, path_spellings
from tests.core.adapter_cases import GATED, MERGEABLE, trained

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
            bos_token_id=0, eos_token_id=1, max_position_embeddings=16,
        )
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder.eval(),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


SITES = (
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "unet.down_blocks.1.attentions.0.proj_in",  # a 1×1 convolution
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.1.resnets.0.conv_shortcut",
    "unet.down_blocks.0.downsamplers.0.conv",  # stride 2
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1",
)


def module(models: dict[str, nn.Module], name: str) -> nn.Module:
    layer = LayerName.parse(name)
    modules = dict(models[layer.part].named_modules())
    return next(modules[p] for p in path_spellings(canonical_path(layer.path)) if p in modules)


def models_of(pipe: Any) -> dict[str, nn.Module]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def compute(models: dict[str, nn.Module]) -> Tensor:
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        text = models["text_encoder"](torch.arange(8)[None])[0]
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        return models["unet"](noise, torch.tensor(500), encoder_hidden_states=text).sample  # type: ignore[no-any-return]


def weights(pipe: Any) -> dict[str, Tensor]:
    return {name: module(models_of(pipe), name).weight.detach() for name in SITES}  # type: ignore[misc]


def merged(pipe: Any, adapter: Adapter) -> Tensor:
    models = {part: copy.deepcopy(model) for part, model in models_of(pipe).items()}
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            module(models, name).weight += delta(layer.factors(adapter.strength_of(name)))  # type: ignore[operator]
    return compute(models)


def through_diffusers(pipe: Any, path: Path) -> Tensor:
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        return compute(models_of(pipe))
    finally:
        pipe.unload_lora_weights()


def assert_same_change(found: Tensor, expected: Tensor, base: Tensor, tolerance: float = 1e-3) -> None:
    """Relative to the change that the adapter makes, which must be one."""
    change = float((expected - base).norm())
    assert change > 0.05 * float(base.norm())
    assert float((found - expected).norm()) < tolerance * change


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("case", MERGEABLE)
def test_every_method_through_diffusers(pipe: Any, tmp_path: Path, case: str, naming: str) -> None:
    base = compute(models_of(pipe))
    adapter = trained(MERGEABLE[case], weights(pipe), size=0.1).scaled(0.8).with_layer_strength("text*", 1.5)
    export_lora(adapter, tmp_path / "a.safetensors", naming, torch.float32)
    expected = merged(pipe, adapter)
    assert_same_change(through_diffusers(pipe, tmp_path / "a.safetensors"), expected, base)
    assert torch.equal(compute(models_of(pipe)), base), "unloaded"
    assert_same_change(merged(pipe, import_lora(tmp_path / "a.safetensors")), expected, base)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_layers_of_different_ranks(pipe: Any, tmp_path: Path, naming: str) -> None:
    """Terms of several methods and frozen gates with other masks: each layer has its own rank and alpha."""
    base = compute(models_of(pipe))
    parts = [trained(MERGEABLE[c], weights(pipe), size=0.1) for c in ("lora", "foura-dft", "spectral-a")]
    layers = {}
    for i, name in enumerate(SITES):
        terms = tuple(p.layers[name].terms[0] for p in parts[: i % 3 + 1])
        layers[name] = AdapterLayer(parts[0].layers[name].shape, terms)
    adapter = Adapter(layers)
    report = export_lora(adapter, tmp_path / "a.safetensors", naming, torch.float32)
    assert len({layer.rank for layer in report.layers.values()}) == 3
    assert_same_change(through_diffusers(pipe, tmp_path / "a.safetensors"), merged(pipe, adapter), base)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_an_adaptive_gate_arrives_as_its_frozen_mask(pipe: Any, tmp_path: Path, naming: str) -> None:
    base = compute(models_of(pipe))
    adapter = trained(GATED["foura-adaptive"], weights(pipe), size=0.1)
    mean_open = torch.tensor([0.9, 0.1, 0.8, 0.2])
    adapter = adapter.map_terms(lambda n, t: replace(t, params={**t.params, "gate.mean_open": mean_open}))
    report = export_lora(adapter, tmp_path / "a.safetensors", naming, torch.float32)
    assert report.gate_loss is not None and 0 < report.gate_loss < 1

    def frozen(name: str, term: Any) -> Any:
        params = {
            "a": term.params["a"],
            "b": term.params["b"],
            "gate.mask": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        }
        return replace(term, config=replace(term.config, gate="frozen"), params=params)

    expected = merged(pipe, adapter.map_terms(frozen))
    assert_same_change(through_diffusers(pipe, tmp_path / "a.safetensors"), expected, base)


def test_float16_files_are_as_close_as_their_rounding(pipe: Any, tmp_path: Path) -> None:
    base = compute(models_of(pipe))
    adapter = trained(MERGEABLE["spectral-a"], weights(pipe), size=0.1)
    report = export_lora(adapter, tmp_path / "a.safetensors", "diffusers")
    assert 1e-5 < report.rounding < 1e-3
    assert_same_change(through_diffusers(pipe, tmp_path / "a.safetensors"), merged(pipe, adapter), base, 5e-3)


def test_a_file_that_diffusers_wrote_is_imported(pipe: Any, tmp_path: Path) -> None:
    """Another rank and alpha per layer, kept by diffusers in the file's metadata."""
    from peft import LoraConfig

    base = compute(models_of(pipe))
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_k", "conv1"], alpha_pattern={"to_k": 9}
    )
    config.init_lora_weights = False
    try:
        pipe.unet.add_adapter(config)
        expected = compute(models_of(pipe))
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(pipe.unet)
        pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict())
    finally:
        pipe.unload_lora_weights()
    (path,) = tmp_path.glob("*.safetensors")
    assert_same_change(merged(pipe, import_lora(path)), expected, base)
