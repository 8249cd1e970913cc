"""LoRA files: export equals the adapter for every method, alpha rules, what is lost is measured; import of
every dialect.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Generator, Tensor

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Term
from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load, save
from spectral_core.files.container import open_safely
from spectral_core.files.lora_export import export_lora, import_lora, read_lora
from spectral_core.maths.lowrank import delta
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.names.unet_blocks import UNetLayout, unet_table
from tests.core.adapter_cases import GATED, MERGEABLE, trained

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.1.conv1"
FC = "text_encoder.text_model.encoder.layers.3.mlp.fc1"
ROOT = Path(__file__).resolve().parents[3]
SHAPES = {Q: (13, 7), CONV: (9, 5, 3, 3), FC: (6, 11)}


def weights(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def updates(adapter: Adapter) -> dict[str, Tensor]:
    return {n: delta(layer.factors(adapter.strength_of(n))) for n, layer in adapter.layers.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def as_kohya_reader(path: Path) -> dict[str, Tensor]:
    """alpha / rows · up · down by kohya's rules, written independently of the code under test."""
    tensors = {k: v.double() for k, v in safetensors.torch.load_file(path).items()}
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            base = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{base}.lora_up.weight"], tensors[f"{base}.alpha"].item()
            product = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
            found[base] = (alpha / down.shape[0] * product).reshape(up.shape[0], *down.shape[1:])
    return found


KOHYA = {
    Q: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    CONV: "lora_unet_down_blocks_0_resnets_1_conv1",
    FC: "lora_te_text_model_encoder_layers_3_mlp_fc1",
}


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("case", MERGEABLE)
def test_export_is_the_adapter_for_any_reader(tmp_path: Path, case: str, strength: float) -> None:
    adapter = trained(MERGEABLE[case], weights()).scaled(strength).with_layer_strength("text*", 0.5)
    expected = updates(adapter)
    for naming in ("kohya", "diffusers"):
        report = export_lora(adapter, tmp_path / f"{naming}.safetensors", naming, torch.float32)
        assert set(report.layers) == set(SHAPES) and not report.omitted and report.gate_loss is None
        assert report.rounding < 1e-6
    seen = as_kohya_reader(tmp_path / "kohya.safetensors")
    assert set(seen) == set(KOHYA.values())
    for name, update in expected.items():
        assert relative(seen[KOHYA[name]], update) < 1e-5
    for naming in ("kohya", "diffusers"):
        back = updates(import_lora(tmp_path / f"{naming}.safetensors"))
        for name, update in expected.items():
            assert relative(back[name], update) < 1e-5, name


@pytest.mark.parametrize(
    ("case", "alpha", "rows"),
    [("lora", 6, 3), ("foura-dct", 3, 3), ("foura-dft", 3, 6), ("foura-none", 3, 3), ("foura-frozen", 3, 3),
     ("foura-dft-frozen", 6, 6), ("spectral-a", 6, 6), ("spectral-r", 3, 3)],
)  # fmt: skip
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_alpha_rules(tmp_path: Path, case: str, alpha: float, rows: int, strength: float) -> None:
    """scale · rows at any strength: alpha; 2·alpha for dft (alpha 1.5); open rows of a frozen gate; 2r; r."""
    export_lora(trained(MERGEABLE[case], weights()).scaled(strength), tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for key in KOHYA.values():
        assert tensors[f"{key}.alpha"].item() == pytest.approx(alpha)
        assert tensors[f"{key}.lora_down.weight"].shape[0] == rows
    assert tensors[f"{KOHYA[CONV]}.lora_down.weight"].shape[2:] == (3, 3)
    assert tensors[f"{KOHYA[CONV]}.lora_up.weight"].shape == (9, rows, 1, 1)
    metadata = open_safely(tmp_path / "a.safetensors").metadata
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == str(rows)
    assert metadata["ss_network_alpha"] == f"{alpha:g}"


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float16, 1e-5, 6e-4), (torch.bfloat16, 1e-4, 6e-3)]
)
@pytest.mark.parametrize("case", MERGEABLE)
def test_rounding_is_measured(tmp_path: Path, case: str, dtype: torch.dtype, low: float, high: float) -> None:
    adapter = trained(MERGEABLE[case], weights(), size=1e-3 if case.startswith("spectral") else 0.3)
    report = export_lora(adapter, tmp_path / "a.safetensors", dtype=dtype)
    seen, expected = as_kohya_reader(tmp_path / "a.safetensors"), updates(adapter)
    for name, layer in report.layers.items():
        assert layer.rounding == pytest.approx(
            relative(seen[KOHYA[name]], expected[name]), rel=0.05, abs=2e-6
        )
    assert low < report.rounding < high


def test_tiny_updates_survive_float16(tmp_path: Path) -> None:
    """down of size 1, up of size 1e-7: as they are, up would lose all its digits."""
    layer = trained(LoRAConfig(2), {Q: torch.randn(8, 8)}).layers[Q]
    term = layer.terms[0]
    params = {"down": torch.randn(2, 8), "up": 1e-7 * torch.randn(8, 2)}
    adapter = Adapter({Q: replace(layer, terms=(replace(term, params=params),))})
    assert export_lora(adapter, tmp_path / "a.safetensors").rounding < 1e-3
    assert relative(updates(import_lora(tmp_path / "a.safetensors"))[Q], updates(adapter)[Q]) < 1e-3


@pytest.mark.parametrize("case", GATED)
def test_adaptive_gates_export_their_mask_and_say_what_is_lost(tmp_path: Path, case: str) -> None:
    mean_open = torch.tensor([0.95, 0.1, 0.6, 0.5])
    adapter = trained(GATED[case], {Q: torch.randn(13, 7, generator=Generator().manual_seed(0))})
    adapter = adapter.map_terms(lambda n, t: replace(t, params={**t.params, "gate.mean_open": mean_open}))
    report = export_lora(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    term = adapter.layers[Q].terms[0]
    pairs = 2 if "dft" in case else 1
    factors = term.factors(adapter.layers[Q].shape)

    def update(gates: Tensor) -> Tensor:
        return factors.scale * (factors.up * gates.repeat(pairs)) @ factors.down

    masked = update(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(
        updates(import_lora(tmp_path / "a.safetensors"))[Q], masked, atol=1e-5, rtol=1e-5
    )
    assert report.layers[Q].rank == 2 * pairs
    lost = total = 0.0
    for bits in range(16):  # every state of the four gates, weighted by its probability
        gates = torch.tensor([float(bits >> i & 1) for i in range(4)])
        probability = float(torch.where(gates > 0, mean_open, 1 - mean_open).prod())
        lost += probability * float((update(gates) - masked).square().sum())
        total += probability * float(update(gates).square().sum())
    assert report.gate_loss == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    assert "frozen mask" in str(report) and f"{report.gate_loss:.1%}" in str(report)


def test_closed_and_zero_layers_are_left_out_and_named(tmp_path: Path) -> None:
    adapter = trained(FouRAConfig(4, gate="frozen"), weights())

    def change(name: str, term: Term) -> Term:
        params = dict(term.params)
        if name == Q:
            params["gate.mask"] = torch.zeros(4)
        if name == FC:
            params["b"] = torch.zeros_like(params["b"])
        return replace(term, params=params)

    adapter = adapter.map_terms(change)
    report = export_lora(adapter, tmp_path / "a.safetensors")
    assert set(report.layers) == {CONV} and set(report.omitted) == {Q, FC}
    assert "rank 0" in report.omitted[Q] and "zero" in report.omitted[FC] and Q in str(report)
    with pytest.raises(SpectralAdapterError, match="nothing to export"):
        export_lora(adapter.only([Q, FC]), tmp_path / "b.safetensors")
    with pytest.raises(SpectralAdapterError, match="nothing to export"):
        export_lora(adapter.scaled(0.0), tmp_path / "b.safetensors")


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_several_terms_become_one(tmp_path: Path, naming: str) -> None:
    parts = [trained(MERGEABLE[c], weights()) for c in ("lora", "spectral-a", "foura-dft", "foura-frozen")]
    layers = {}
    for i, name in enumerate(SHAPES):
        terms = [replace(p.layers[name].terms[0], weight=0.5 + k) for k, p in enumerate(parts[: i + 2])]
        layers[name] = AdapterLayer(parts[0].layers[name].shape, tuple(terms))
    adapter = Adapter(layers, strength=0.8)
    report = export_lora(adapter, tmp_path / "a.safetensors", naming, torch.float32)
    assert len({layer.rank for layer in report.layers.values()}) == 3, "ranks differ"
    back = import_lora(tmp_path / "a.safetensors")
    for name, update in updates(adapter).items():
        assert relative(updates(back)[name], update) < 1e-5


def test_one_alpha_per_part_where_the_layers_own_differ(tmp_path: Path) -> None:
    """diffusers takes the most frequent alpha for all layers of a part; every reader must agree."""
    shapes = {f"unet.mid_block.resnets.{i}.conv1": (6, 5) for i in range(3)} | {FC: (6, 5)}
    adapter = trained(FouRAConfig(4, gate="frozen"), weights(shapes))
    masks = dict(zip(shapes, ([1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 0]), strict=True))
    adapter = adapter.map_terms(
        lambda n, t: replace(t, params={**t.params, "gate.mask": torch.tensor(masks[n], dtype=torch.float32)})
    )
    export_lora(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    alphas = {k: t.item() for k, t in tensors.items() if k.endswith(".alpha")}
    assert {a for k, a in alphas.items() if k.startswith("lora_unet")} == {2.0}
    assert {a for k, a in alphas.items() if k.startswith("lora_te")} == {3.0}
    back = updates(import_lora(tmp_path / "a.safetensors"))
    assert all(relative(back[name], update) < 1e-6 for name, update in updates(adapter).items())


def test_what_a_lora_file_cannot_hold(tmp_path: Path) -> None:
    adapter = trained(LoRAConfig(2), weights())
    path = tmp_path / "a.safetensors"
    with pytest.raises(SpectralAdapterError, match="scheduled over the denoising"):
        export_lora(adapter.with_schedule(Schedule.window(0, 0.5)), path)
    report = export_lora(adapter.with_schedule(Schedule.window(0, 0.5)), path, drop_schedule=True)
    assert "schedule was dropped" in str(report)
    with pytest.raises(SpectralAdapterError, match="exists already"):
        export_lora(adapter, path)
    tokens = replace(adapter, tokens={"<cat>": {"text_encoder": torch.zeros(1, 4)}})
    assert "<cat>" in str(export_lora(tokens, path, overwrite=True))
    assert not any("cat" in key for key in open_safely(path).entries), "nothing extra goes into the tensors"
    rows = trained(LoRAConfig(2), {"diffusion_model.qkv[0:6]": torch.zeros(6, 5)})
    for naming in ("kohya", "diffusers"):
        with pytest.raises(SpectralAdapterError, match=r"diffusion_model\.qkv\[0:6\]"):
            export_lora(rows, tmp_path / "b.safetensors", naming)
    with pytest.raises(SpectralAdapterError, match="naming 'a1111'"):
        export_lora(adapter, path, "a1111")
    big = trained(LoRAConfig(2), {Q: torch.zeros(6, 5)}).map_terms(
        lambda n, t: replace(t, params={k: v * 1e9 for k, v in t.params.items()})
    )
    with pytest.raises(SpectralAdapterError, match=r"to_q: values up to .* do not fit torch\.float16"):
        export_lora(big, tmp_path / "b.safetensors")
    rotation = trained(MERGEABLE["spectral-r-rotation"], weights())
    assert "at this strength only" in str(export_lora(rotation, tmp_path / "c.safetensors"))


def test_sdxl_names(tmp_path: Path) -> None:
    shapes = {FC: (6, 5), FC.replace("text_encoder.", "text_encoder_2."): (6, 5)}
    export_lora(trained(LoRAConfig(2), weights(shapes)), tmp_path / "a.safetensors")
    prefixes = {key.split("_text_model")[0] for key in open_safely(tmp_path / "a.safetensors").entries}
    assert prefixes == {"lora_te1", "lora_te2"}
    assert set(import_lora(tmp_path / "a.safetensors").layers) == set(shapes)


@pytest.mark.parametrize(
    ("family", "part", "spelling"), [("sdxl", "text_encoder_2", "te2"), ("sd2", "text_encoder", "te")]
)
def test_an_attention_of_open_clip_is_whole(tmp_path: Path, family: str, part: str, spelling: str) -> None:
    """Its reader applies four layers or none; where some are off, zeros stand for them."""
    there = f"{part}.text_model.encoder.layers.3.self_attn"
    adapter = trained(
        LoRAConfig(2), {f"{there}.q_proj": torch.randn(6, 6), f"{there}.out_proj": torch.randn(6, 6)}
    )
    adapter = replace(adapter, provenance=replace(adapter.provenance, family=family))
    report = export_lora(adapter, tmp_path / "lora.safetensors")
    assert set(report.layers) == set(adapter.layers)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        names = list(file.keys())
        keys = {name.split(".")[0]: name for name in names if name.endswith("lora_up.weight")}
        flat = f"lora_{spelling}_text_model_encoder_layers_3_self_attn"
        assert set(keys) == {f"{flat}_{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for leaf in ("k_proj", "v_proj"):
            assert not file.get_tensor(keys[f"{flat}_{leaf}"]).any()
        alphas = {float(file.get_tensor(name)) for name in names if name.endswith(".alpha")}
        ranks = {file.get_tensor(name).shape[1] for name in keys.values()}
    assert len(alphas) == len(ranks) == 1, "a reader that takes the most frequent one computes the same"
    assert read_lora(tmp_path / "lora.safetensors").adapter.layers


# --- import -----------------------------------------------------------------------------------------

DOWN, UP = (
    torch.randn(3, 7, generator=Generator().manual_seed(1)),
    torch.randn(13, 3, generator=Generator().manual_seed(2)),
)
FLAT = KOHYA[Q]
DEEP = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
DIALECTS: dict[
    str, tuple[str, str, str, str | None]
] = {  # down's key, up's key, alpha's key, layer (None: raw)
    "kohya": (f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight", f"{FLAT}.alpha", Q),
    "kohya-sdxl": (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_up.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha",
        f"unet.{DEEP}",
    ),
    "diffusers": (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.alpha", Q),
    "diffusers-older": (f"{Q}.lora.down.weight", f"{Q}.lora.up.weight", f"{Q}.alpha", Q),
    "diffusers-oldest": (
        f"{Q.replace('.to_q', '')}.processor.to_q_lora.down.weight",
        f"{Q.replace('.to_q', '')}.processor.to_q_lora.up.weight",
        f"{Q}.alpha",
        Q,
    ),
    "diffusers-oldest-out": (
        f"{Q.replace('unet.', '').replace('.to_q', '')}.processor.to_out_lora.down.weight",
        f"{Q.replace('unet.', '').replace('.to_q', '')}.processor.to_out_lora.up.weight",
        "",
        Q.replace("to_q", "to_out.0"),
    ),
    "old text encoder": (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
        "",
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    ),
    "linear layer": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
        "",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ),
    "peft": (
        f"base_model.model.{Q.removeprefix('unet.')}.lora_A.weight",
        f"base_model.model.{Q.removeprefix('unet.')}.lora_B.weight",
        "",
        Q,
    ),
    "peft-named": (
        "base_model.model.encoder.layers.0.mlp.fc1.lora_A.default.weight",
        "base_model.model.encoder.layers.0.mlp.fc1.lora_B.default.weight",
        "",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    "native": (
        "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q.lora_A.weight",
        "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q.lora_B.weight",
        "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q.alpha",
        f"unet.{DEEP}",
    ),
    "native flux": (
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight",
        "",
        "diffusion_model.double_blocks.0.img_attn.qkv",
    ),
    "native text encoder": (
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
        "",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ),
    "flux in diffusers": (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        "",
        "transformer.transformer_blocks.0.attn.to_q",
    ),
    "kohya flux": (
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.alpha",
        None,
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_import_of_every_dialect(tmp_path: Path, dialect: str) -> None:
    down, up, alpha, layer = DIALECTS[dialect]
    tensors = {down: DOWN, up: UP} | ({alpha: torch.tensor(1.5)} if alpha else {})
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors")
    name = layer or "kohya.lora_unet_double_blocks_0_img_attn_qkv"
    assert set(read.adapter.layers) == {name} and read.unmatched == ()
    scale = 0.5 if alpha else 1.0
    torch.testing.assert_close(delta(read.adapter.layers[name].factors()), scale * UP @ DOWN)
    assert read.raw_layers == (() if layer else (name,))
    assert layer is not None or any("model's own map" in note for note in read.notes)
    assert ("adapter_config.json" in " ".join(read.notes)) == dialect.startswith("peft")


def test_raw_names_export_as_they_came(tmp_path: Path) -> None:
    down, up, alpha, _ = DIALECTS["kohya flux"]
    safetensors.torch.save_file({down: DOWN, up: UP, alpha: torch.tensor(3.0)}, tmp_path / "a.safetensors")
    export_lora(import_lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", dtype=torch.float32)
    before, after = (safetensors.torch.load_file(tmp_path / f"{x}.safetensors") for x in "ab")
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)


def test_native_names_by_another_layout(tmp_path: Path) -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    safetensors.torch.save_file(
        {f"{key}.lora_down.weight": DOWN, f"{key}.lora_up.weight": UP}, tmp_path / "a.safetensors"
    )
    assert set(import_lora(tmp_path / "a.safetensors").layers) == {Q}, "SD 1's, as SDXL has no such block"
    assert set(import_lora(tmp_path / "a.safetensors", UNetLayout.sdxl()).layers) == {f"kohya.{key}"}


def test_block_numbers_of_another_unet_stay_as_they_are(tmp_path: Path) -> None:
    """Of KOALA, say: one block that SDXL and SD 1 have not, and none of the file's numbers is theirs."""
    flat = [f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_attn1_to_q" for block in ("3", "4")]
    dotted = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_k"
    pairs = {f"{k}.lora_down.weight": DOWN.clone() for k in (*flat, dotted)}
    pairs |= {f"{k}.lora_up.weight": UP.clone() for k in (*flat, dotted)}
    safetensors.torch.save_file(pairs, tmp_path / "a.safetensors")
    read = import_lora(tmp_path / "a.safetensors")
    assert set(read.layers) == {*(f"kohya.{key}" for key in flat), dotted}
    export_lora(read, tmp_path / "b.safetensors")
    assert {k.partition(".lora_")[0] for k in pairs} == {
        k.partition(".lora_")[0].removesuffix(".alpha")
        for k in open_safely(tmp_path / "b.safetensors").entries
    }


ALIASES = (
    *(
        "base_model.model.context_embedder",
        "base_model.model.layers.0.self_attn.q_proj",
    ),  # SD 3, ACE-Step 1.5
    *(
        "context_embedder",
        "model.layers.0.q",
        "transformer.norm_out.linear",
        "unet.base_model.model.proj_out",
    ),
    *("diffusion_model.all_final_layer.2-1.linear", "all_final_layer.2-1.linear"),  # Z-Image
    *("diffusion_model.single_blocks.0.linear1_qkv", "double_blocks.0.img_attn.qkv"),  # Flux
    *("lora_unet_single_blocks_0_linear1", "lora_transformer_x_embedder", "lycoris_context_embedder"),
    *("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoders.t5xxl.transformer.shared"),
    *("text_encoders.clip_h.transformer.text_model.embeddings.token_embedding", "lora_te1_text_projection"),
    *("lora_unet__blocks_0_self_attn_q", "lora_prior_unet_down_blocks_0_1_mapper", "blocks.0.self_attn.q"),
)


@pytest.mark.parametrize("module", ALIASES)
def test_a_name_that_only_a_hosts_map_knows_is_exported_as_it_came(tmp_path: Path, module: str) -> None:
    """Without the model nobody can tell what it is: any other spelling of it is read by none."""
    tensors = {
        f"{module}.lora_down.weight": DOWN,
        f"{module}.lora_up.weight": UP,
        f"{module}.diff_b": UP[:, 0].clone(),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    report = export_lora(import_lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    found = set(open_safely(tmp_path / "b.safetensors").entries)
    assert found == {*tensors, f"{module}.alpha"}
    assert ("written with dots" in str(report)) == (not module.startswith(("lora_", "lycoris_")))


def test_names_of_old_attention_processors(tmp_path: Path) -> None:
    for weight, ours in (("to_q", "to_q"), ("to_out", "to_out.0")):
        module = Q.replace("to_q", f"processor.{weight}")
        safetensors.torch.save_file(
            {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP}, tmp_path / "a.safetensors"
        )
        assert set(import_lora(tmp_path / "a.safetensors").layers) == {Q.replace("to_q", ours)}


def test_convolutions_and_their_cp_form(tmp_path: Path) -> None:
    down, up = torch.randn(3, 5, 3, 3), torch.randn(9, 3, 1, 1)
    base = KOHYA[CONV]
    safetensors.torch.save_file(
        {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    expected = torch.einsum("op,pihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(updates(import_lora(tmp_path / "a.safetensors"))[CONV], expected)
    mid, small = torch.randn(3, 3, 3, 3), torch.randn(3, 5, 1, 1)
    tensors = {
        f"{base}.lora_down.weight": small,
        f"{base}.lora_mid.weight": mid,
        f"{base}.lora_up.weight": up,
    }
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors")
    expected = torch.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0], mid, small[:, :, 0, 0])
    torch.testing.assert_close(updates(import_lora(tmp_path / "b.safetensors"))[CONV], expected)


@pytest.mark.parametrize(
    ("settings_", "alpha"),
    [
        ({"lora_alpha": 6}, 6.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 * math.sqrt(3)),
        ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 9}}, 9.0),
        ({"lora_alpha": 6, "alpha_pattern": {"attn2.to_q": 9}}, 6.0),
        ({"lora_alpha": 6, "alpha_pattern": {"^.*": 9}}, 6.0),
        ({}, 3.0),
    ],
)
def test_peft_configuration_beside_the_file(
    tmp_path: Path, settings_: dict[str, object], alpha: float
) -> None:
    down, up, _, layer = DIALECTS["peft"]
    assert layer is not None
    safetensors.torch.save_file({down: DOWN, up: UP}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings_}))
    read = read_lora(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(delta(read.adapter.layers[layer].factors()), alpha / 3 * UP @ DOWN)
    metadata = {
        "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings_.items()} | {"unet.r": 3})
    }
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "a.safetensors"
    safetensors.torch.save_file({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}, path, metadata)
    torch.testing.assert_close(updates(import_lora(path))[Q], alpha / 3 * UP @ DOWN)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "table of settings"), ('{"use_dora": true}', "use_dora"),
     ('{"peft_type": "LOHA"}', "LOHA"), ('{"lora_alpha": "x"}', "alpha 'x'"),
     ('{"alpha_pattern": 3}', "alpha_pattern")],
)  # fmt: skip
def test_bad_peft_configurations(tmp_path: Path, text: str, message: str) -> None:
    down, up, _, _ = DIALECTS["peft"]
    safetensors.torch.save_file({down: DOWN, up: UP}, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(SpectralAdapterError, match=rf"adapter_config\.json: .*{message}"):
        import_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("dora_scale", "DoRA"), ("lora_magnitude_vector.weight", "DoRA"),
        ("oft_blocks", "OFT"), ("oft_diag", "OFT"), ("a1.weight", "GLoRA"),
        ("on_input", "IA3"), ("set_weight", "full weights"),
        ("lora_B.bias", "bias"), ("lora_embedding_A", "embedding"), ("reshape_weight", "shape"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name_and_layer(tmp_path: Path, suffix: str, kind: str) -> None:
    tensors = {
        f"{FLAT}.lora_down.weight": DOWN,
        f"{FLAT}.lora_up.weight": UP,
        f"{FLAT}.{suffix}": torch.ones(13),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SpectralAdapterError, match=rf"{FLAT}\.{suffix}' belongs to a .*{kind}"):
        import_lora(tmp_path / "a.safetensors")


BAD: list[tuple[dict[str, Tensor], str]] = [
    ({f"{FLAT}.lora_down.weight": DOWN}, "up projection is missing"),
    ({f"{FLAT}.lora_up.weight": UP}, "down projection is missing"),
    (
        {f"{FLAT}.lora_down.weight": DOWN, f"{FLAT}.lora_up.weight": UP.mT.contiguous()},
        r"\(3, 7\) and up \(3, 13\)",
    ),
    ({f"{FLAT}.lora_down.weight": DOWN / 0, f"{FLAT}.lora_up.weight": UP}, "not finite"),
    (
        {f"{FLAT}.lora_down.weight": DOWN.to(torch.int8), f"{FLAT}.lora_up.weight": UP},
        r"down \(torch\.int8\)",
    ),
    (
        {f"{FLAT}.lora_down.weight": DOWN, f"{FLAT}.lora_up.weight": UP, f"{FLAT}.alpha": DOWN + 1},
        "expected one number",
    ),
    (
        {f"{FLAT}.lora_down.weight": DOWN, f"{Q}.lora_A.weight": DOWN + 1, f"{Q}.lora_B.weight": UP + 1},
        "several adapters",
    ),
    ({"a": DOWN}, "not known here; expected a LoRA file"),
    ({"model.diffusion_model.a.weight": DOWN}, "whole checkpoint"),
    ({"emb_params": DOWN}, "textual inversion"),
    ({"a[0.lora_A.weight": DOWN, "a[0.lora_B.weight": UP}, "layer name"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_damaged_lora_files(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SpectralAdapterError, match=rf"a\.safetensors: .*{message}"):
        import_lora(tmp_path / "a.safetensors")


def test_unmatched_tensors_are_reported_and_stay_on_the_adapter(tmp_path: Path) -> None:
    tensors = {
        f"{FLAT}.lora_down.weight": DOWN,
        f"{FLAT}.lora_up.weight": UP,
        "odd": DOWN + 1,
        "lone.alpha": torch.ones(1),
    }
    metadata = {"ss_output_name": "Cat", "modelspec.trigger_phrase": "cat, kitten"}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata)
    read = read_lora(tmp_path / "a.safetensors")
    assert set(read.unmatched) == {"odd", "lone.alpha"}
    assert set(read.adapter.provenance.training["unmatched_tensors"]) == {"odd", "lone.alpha"}
    assert read.adapter.provenance.name == "Cat" and read.adapter.provenance.trigger_words == (
        "cat",
        "kitten",
    )


def test_our_own_file_is_not_a_lora_file(tmp_path: Path) -> None:
    path = save(trained(LoRAConfig(2), weights()), tmp_path / "a.safetensors")
    with pytest.raises(SpectralAdapterError, match=r"load it with load\(\)"):
        import_lora(path)


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (64, "")])
def test_family_by_the_width_of_the_text(tmp_path: Path, width: int, family: str) -> None:
    key = FLAT.replace("attn1_to_q", "attn2_to_k")
    tensors = {f"{key}.lora_down.weight": torch.ones(1, width), f"{key}.lora_up.weight": torch.ones(4, 1)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    assert import_lora(tmp_path / "a.safetensors").provenance.family == family


words = st.text(st.sampled_from("abq01._[]:") | st.characters(codec="utf-8"), max_size=12)
endings = st.sampled_from(
    [
        *(f".lora_{role}.weight" for role in ("A", "B", "up", "down", "mid")),
        *(".alpha", "_lora.up.weight", ".lora.down.weight", ".weight", ""),
    ]
)
stems = (
    st.sampled_from([FLAT, Q, "base_model.model.x", "diffusion_model.a", "text_encoder.q", "unet"]) | words
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.builds(str.__add__, stems, endings), st.lists(st.integers(0, 3), max_size=5), max_size=6
    )
)
def test_any_names_and_shapes_are_imported_or_refused(tmp_path: Path, found: dict[str, list[int]]) -> None:
    path = tmp_path / "a.safetensors"
    found.pop("__metadata__", None)
    safetensors.torch.save_file({key: torch.ones(shape) for key, shape in found.items()}, path)
    try:
        read = read_lora(path)
    except SpectralAdapterError as error:
        assert str(path) in str(error)
        return
    for layer in read.adapter.layers.values():
        assert layer.factors().shape == layer.shape


def embedded() -> Adapter:
    """An adapter of the embedded model, with a word of its own."""
    path = ROOT / "example_workflows/adapters/examples/bot_spectral.safetensors"
    return load(path)


def test_the_embedded_models_blocks_are_named_by_number(tmp_path: Path) -> None:
    """Under diffusers' words Automatic1111 would find other layers of the same shape, those of SD 1.5."""
    adapter = embedded()
    config = json.loads((ROOT / "demo_model/unet/config.json").read_text(encoding="utf-8"))
    assert UNetLayout.from_config(config) == UNetLayout.mini() and adapter.provenance.family == "mini"
    report = export_lora(adapter, tmp_path / "a.safetensors", dtype=torch.float32, words=True)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        keys = set(file.keys())
    flat = {"lora_unet_" + native.replace(".", "_") for native in unet_table(UNetLayout.mini()).values()}
    assert {key.split(".")[0] for key in keys} - {"bundle_emb"} <= flat
    assert "bundle_emb.<bot>.string_to_param.*" in keys and "trained words in the file" in str(report)
    again = import_lora(tmp_path / "a.safetensors")
    assert again.layers.keys() == adapter.layers.keys()
    name = next(iter(adapter.layers))
    ours, theirs = (a.layers[name].factors(1.0) for a in (adapter, again))
    assert torch.allclose(
        ours.scaled_up() @ ours.down.flatten(1), theirs.scaled_up() @ theirs.down.flatten(1), atol=1e-6
    )


def test_a_block_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    stray = {"unet.down_blocks.3.resnets.0.conv1": next(iter(embedded().layers.values()))}
    adapter = replace(embedded(), layers=stray)
    with pytest.raises(SpectralAdapterError, match=r"no such block.*own model"):
        export_lora(adapter, tmp_path / "a.safetensors")
    assert export_lora(adapter, tmp_path / "b.safetensors", "diffusers").naming == "diffusers"
