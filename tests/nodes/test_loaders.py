"""Loaders and Apply Adapter: what they hand to the host layer, and what they say where something is amiss."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.nodes.conftest import LAYERS, Pack

FILE = "sub/cat.safetensors"


@pytest.fixture
def cat(ours: Pack, folders: Any, save: Any) -> Any:
    adapter = ours.adapter()
    save(adapter, folders.models / FILE)
    return adapter


@pytest.mark.parametrize("name", ["LoadFouRA", "LoadSpectralAdapter"])
def test_strengths_act_on_model_and_clip_only(ours: Pack, cat: Any, applied: list[Any], name: str) -> None:
    options = {"base_mismatch": "rebase"} if name == "LoadSpectralAdapter" else {}
    out = ours.node(name).load(
        adapter_name=FILE, strength_model=0.5, strength_clip=0.25, model="M", clip="C", **options
    )
    model, clip, adapter, report, words = out["result"]
    assert (model, clip, words) == ("M+cat", "C+cat", "cat, kitten")
    assert applied[0][1:] == ("M", "C", 0.5, 0.25, "auto", options.get("base_mismatch", "delta"))
    assert adapter.content_hash == cat.content_hash and adapter.strength == 1
    assert out["ui"] == {"text": (report,), "spectral_adapters": ()}, "no prompt has asked for its hash"
    for part in ("cat.safetensors", "kitten", "applied auto", "5 layers"):
        assert part in report


def test_unconnected_outputs_explain_themselves(ours: Pack, cat: Any, applied: list[Any]) -> None:
    model, clip, adapter, report, _ = ours.node("LoadFouRA").load(FILE, 1.0, 1.0, model="M")["result"]
    assert model == "M+cat" and applied[0][2] is None
    for use in (lambda: clip.tokenize("x"), lambda: clip(1), lambda: clip[0], lambda: list(clip)):
        with pytest.raises(ours.error, match=r"Load FouRA has no CLIP output: connect its input 'clip'"):
            use()
    assert not hasattr(clip, "get_ram_usage")  # the host may ask an output such things
    model, clip, adapter, report, _ = ours.node("LoadFouRA").load(FILE, 1.0, 1.0)["result"]
    assert len(applied) == 1 and "neither model nor clip is connected" in report
    assert len(adapter.layers) == len(LAYERS)
    with pytest.raises(ours.error, match="no MODEL output"):
        model.clone()


def test_errors_name_the_file(ours: Pack, cat: Any, monkeypatch: Any, applied: list[Any]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ours.error("no layer matched")

    monkeypatch.setattr(ours.module("nodes.host.apply").adapters, "apply", refuse)
    with pytest.raises(ours.error, match=r"cat\.safetensors: no layer matched"):
        ours.node("LoadFouRA").load(FILE, 1.0, 1.0, model="M")


def test_names_of_another_machine_are_checked_before_the_run(ours: Pack, cat: Any, folders: Any) -> None:
    for name in ("LoadFouRA", "LoadSpectralAdapter"):
        node = type(ours.node(name))
        assert node.VALIDATE_INPUTS(adapter_name=FILE) is True
        assert node.VALIDATE_INPUTS(adapter_name="other\\cat.safetensors") is True
        assert node.VALIDATE_INPUTS(adapter_name=None) is True, "a link is not known yet"
        assert "did you mean sub/cat.safetensors?" in node.VALIDATE_INPUTS(adapter_name="catt.safetensors")
        assert "'..'" in node.VALIDATE_INPUTS(adapter_name="../x.safetensors")
    lora = type(ours.node("LoadLoRAAsAdapter"))
    assert lora.VALIDATE_INPUTS(lora_name="none") is True
    assert "no files at all" in lora.VALIDATE_INPUTS(lora_name="x.safetensors")


def test_a_changed_file_is_read_again(ours: Pack, cat: Any, folders: Any, save: Any) -> None:
    node = ours.node("LoadFouRA")
    state = type(node).IS_CHANGED(adapter_name=FILE, strength_model=1.0, strength_clip=1.0, model=None)
    first = node.load(FILE, 1.0, 1.0)["result"][2]
    assert node.load("sub\\cat.safetensors", 0.5, 1.0)["result"][2] is first, "parsed once"
    other = save(ours.adapter(seed=1), folders.models / FILE)
    os.utime(other, ns=(10**9, 10**9))
    assert type(node).IS_CHANGED(adapter_name=FILE) != state
    assert node.load(FILE, 1.0, 1.0)["result"][2].content_hash != first.content_hash
    other.unlink()
    assert "not there" in type(node).IS_CHANGED(adapter_name=FILE)


def test_loaded_tensors_can_be_trained_although_nodes_run_in_inference_mode(ours: Pack, cat: Any) -> None:
    with torch.inference_mode():
        adapter = ours.node("LoadFouRA").load(FILE, 1.0, 1.0)["result"][2]
        adapter = ours.node("FuseAdapters").fuse(adapter, adapter, target_rank=1)["result"][0]
    tensors = [t for layer in adapter.layers.values() for term in layer.terms for t in term.params.values()]
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("damage", ["truncated", "text", "lora"])
def test_a_file_that_is_no_adapter_is_explained(ours: Pack, cat: Any, folders: Any, damage: str) -> None:
    path = folders.models / FILE
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("<html>not found</html>")
    else:
        path.unlink()
        ours.module("spectral_core.files.lora_export").export_lora(ours.adapter(), path)
    with pytest.raises(ours.error, match=r"cat\.safetensors"):
        ours.node("LoadFouRA").load(FILE, 1.0, 1.0)


def test_a_compact_file_asks_for_its_model(ours: Pack, folders: Any) -> None:
    methods, module = ours.module("spectral_core.methods"), ours.module("spectral_core.adapter.adapter")
    weights = {"unet.mid_block.a": torch.randn(8, 6)}

    def basis_of(_: str, weight: torch.Tensor) -> Any:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :2], s[:2], vh.mT[:, :2]

    adapter = module.create(weights, methods.SpectralRConfig((0, 1)), basis_of)
    path = folders.models / "r.safetensors"
    ours.module("spectral_core.files.adapter_file").save(adapter, path, compact=True)
    with pytest.raises(ours.error, match=r"compact file.*connect the model"):
        ours.node("LoadSpectralAdapter").load("r.safetensors", 1.0, 1.0)


def lora_model(prefix: str = "diffusion_model.double_blocks.0.img_attn.qkv") -> dict[str, torch.Tensor]:
    """As the host's Train LoRA makes it: alpha 1, and changed biases and norms beside the LoRA."""
    return {
        f"{prefix}.lora_up.weight": torch.randn(8, 2),
        f"{prefix}.lora_down.weight": torch.randn(2, 6),
        f"{prefix}.alpha": torch.tensor(1.0),
        f"{prefix}.diff_b": torch.ones(8),
        "diffusion_model.norm.diff": torch.zeros(6),
    }


def test_the_hosts_lora_model_is_taken(ours: Pack) -> None:
    tensors = lora_model()
    with torch.inference_mode():
        out = ours.node("LoadLoRAAsAdapter").load("none", lora_model=tensors)
    adapter, report, _ = out["result"]
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert list(adapter.layers) == [name, f"{name}.bias"], "a changed bias is a layer of its own"
    update = adapter.layers[name].factors()
    expected = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    assert torch.allclose(update.scaled_up() @ update.down, expected / 2)
    assert "1 biases and norms of the file change nothing" in report
    with pytest.raises(ours.error, match="no LoRA is chosen"):
        ours.node("LoadLoRAAsAdapter").load("none")
    with pytest.raises(ours.error, match="LORA_MODEL, a table"):
        ours.node("LoadLoRAAsAdapter").load("none", lora_model=object())


def test_flattened_convolutions_need_the_model(ours: Pack) -> None:
    tensors = lora_model("diffusion_model.input_blocks.1.0.in_layers.2")
    with pytest.raises(ours.error, match="connect the model that the LoRA was trained on"):
        ours.node("LoadLoRAAsAdapter").load("none", lora_model=tensors)


@pytest.mark.parametrize(
    ("suffix", "kind"), [("dora_scale", "DoRA"), ("oft_blocks", "OFT"), ("ia3_l", "IA3")]
)
def test_other_kinds_are_refused_by_name(ours: Pack, folders: Any, suffix: str, kind: str) -> None:
    tensors = lora_model() | {f"diffusion_model.x.{suffix}": torch.ones(2, 2)}
    with pytest.raises(ours.error, match=kind):
        ours.node("LoadLoRAAsAdapter").load("none", lora_model=tensors)


def test_a_lora_file_is_an_adapter(ours: Pack, folders: Any) -> None:
    adapter = ours.adapter()
    ours.module("spectral_core.files.lora_export").export_lora(
        adapter, folders.loras / "l.safetensors", dtype=torch.float32
    )
    read, report, _ = ours.node("LoadLoRAAsAdapter").load("l.safetensors")["result"]
    assert set(read.layers) == set(adapter.layers) and "l.safetensors" in report
    for name, layer in adapter.layers.items():
        ours_, theirs = (each.factors() for each in (layer, read.layers[name]))
        assert torch.allclose(ours_.scaled_up() @ ours_.down, theirs.scaled_up() @ theirs.down, atol=1e-5)


def test_apply_puts_the_list_on_top(ours: Pack, applied: list[Any]) -> None:
    one, two = ours.adapter(), ours.adapter(seed=1).with_provenance(name="dog")
    out = ours.node("ApplyAdapter").apply(one, 0.5, 0.25, "live", "strict", model="M", adapters=(two,))
    model, clip, report = out["result"]
    assert model == "M+cat+dog" and report == "applied live\napplied live"
    assert [call[1:] for call in applied] == [
        ("M", None, 0.5, 0.25, "live", "strict"),
        ("M+cat", None, 1.0, 1.0, "live", "strict"),
    ]
    with pytest.raises(ours.error, match="Apply Adapter has no CLIP output"):
        clip.clone()
    with pytest.raises(ours.error, match="nothing to apply to"):
        ours.node("ApplyAdapter").apply(one)
    with pytest.raises(ours.error, match="expected an ADAPTER"):
        ours.node("ApplyAdapter").apply("x", model="M")
    with pytest.raises(ours.error, match="'adapters' of Adapter Strength"):
        ours.node("ApplyAdapter").apply(one, model="M", adapters=one)
