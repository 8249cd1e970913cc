"""One .safetensors checkpoint in its original (LDM) layout becomes a diffusers pipeline, offline.

Full checkpoints have 2 to 7 GB: the families are told on headers, the shipped configurations are counted on
the meta device, and the whole way is walked with small models of the same layouts.
"""

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import transformers

from spectral_core.errors import SpectralAdapterError
from spectral_core.pipelines import single_file
from spectral_core.pipelines.clip_bpe import build_vocabulary, clip_tokenizer, read_merges
from spectral_core.pipelines.loading import load_pipeline

FAMILY_NAMES = ("sd1", "sd2", "sdxl")
LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"

# --- the shipped files ----------------------------------------------------------------------------------

PUBLISHED_COUNTS = {
    ("sd1", "unet"): 859_520_964,
    ("sd2", "unet"): 865_910_724,
    ("sdxl", "unet"): 2_567_463_684,
    **{(family, "vae"): 83_653_863 for family in FAMILY_NAMES},
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


def build(configs, part):
    """One part of a pipeline, randomly initialised, from a folder of configurations."""
    library, name = json.loads((configs / "model_index.json").read_text())[part]
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    if library == "diffusers":
        return kind.from_config(kind.load_config(configs, subfolder=part))
    return kind(kind.config_class.from_pretrained(configs, subfolder=part))


@pytest.mark.parametrize("family, part", PUBLISHED_COUNTS)
def test_shipped_configurations_have_the_published_sizes(family, part):
    with torch.device("meta"):
        module = build(single_file.CONFIGS / family, part)
    assert sum(p.numel() for p in module.parameters()) == PUBLISHED_COUNTS[family, part]


@pytest.mark.parametrize("family, scale", [("sd1", 0.18215), ("sd2", 0.18215), ("sdxl", 0.13025)])
def test_shipped_configurations_have_the_published_constants(family, scale):
    configs = single_file.CONFIGS / family
    assert json.loads((configs / "vae" / "config.json").read_text())["scaling_factor"] == scale
    schedule = json.loads((configs / "scheduler" / "scheduler_config.json").read_text())
    assert (schedule["beta_start"], schedule["beta_end"]) == (0.00085, 0.012)
    assert schedule["beta_schedule"] == "scaled_linear"


def test_vocabulary_is_clips():
    vocabulary = build_vocabulary(read_merges())
    assert len(read_merges()) == 48_894
    assert sorted(vocabulary.values()) == list(range(49_408))
    known = {"!": 0, "Ġ": 220, "!</w>": 256, "in": 512, "a</w>": 320, "cat</w>": 2368, "jekyll</w>": 49_405}
    assert {token: vocabulary[token] for token in known} == known
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49_406, 49_407)


TOKENIZERS = [("sd1", "", 49_407), ("sd2", "", 0), ("sdxl", "", 49_407), ("sdxl", "_2", 0)]


@pytest.mark.parametrize("family, which, pad", TOKENIZERS)
def test_tokenizer_gives_clips_ids(family, which, pad):
    file = single_file.CONFIGS / family / f"tokenizer{which}" / "tokenizer_config.json"
    tokenizer = clip_tokenizer(file)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello  world").input_ids == [49406, 3306, 1002, 49407]
    padded = tokenizer("a cat!", padding="max_length", max_length=77, truncation=True).input_ids
    # "!" stays the word "!</w>", also where the symbol "!" is the padding
    assert padded == [49406, 320, 2368, 256, 49407] + [pad] * 72
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("cat " * 100, truncation=True).input_ids) == 77


# --- which family a header shows -------------------------------------------------------------------------


def header(family):
    """The telling names of a family's checkpoint, and one tensor in place of all others of the UNet."""
    known = single_file.FAMILIES[family]
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (
            640,
            known.text_width,
        ),
    }
    rest = known.unet_parameters - 320 * 4 * 9 - 640 * known.text_width
    shapes["model.diffusion_model.rest"] = (rest,)
    return {**shapes, **{f"{prefix}all": (size,) for prefix, size in known.parts.values()}}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_family_is_found(family):
    assert single_file.find_family(header(family), "x") == family


def with_input(channels):
    return {"model.diffusion_model.input_blocks.0.0.weight": (320, channels, 3, 3)}


REFUSED = [
    ({"lora_unet_mid_block.lora_down.weight": (4, 8)}, "LoRA"),
    ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 8)}, "LoRA"),
    ({"lora_unet_mid_block.hada_w1_a": (4, 8)}, "similar adapter"),
    ({"control_model.time_embed.0.weight": (4, 8)}, "ControlNet"),
    ({"double_blocks.0.img_attn.qkv.weight": (4, 8)}, "Flux"),
    ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 8)}, "Flux"),
    ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 8)}, "SD 3"),
    ({**header("sd2"), "model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.bias": (4,)}, "video"),
    ({**header("sdxl"), "edm_mean": (4,)}, "EDM"),
    ({**header("sdxl"), "conditioner.embedders.0.model.ln_final.weight": (1280,)}, "refiner"),
    ({"emb_params": (4, 768)}, "textual-inversion"),
    ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "textual-inversion"),
    ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "model_index.json"),
    ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "UNet alone"),
    ({"decoder.conv_in.weight": (4, 4, 3, 3)}, "VAE"),
    ({"something.else": (3,)}, "something.else"),
    ({}, "0 tensors"),
    ({**header("sd1"), **with_input(9)}, "inpainting"),
    ({**header("sd1"), **with_input(8)}, "image-editing"),
    ({**header("sd2"), **with_input(5)}, "depth"),
    ({**header("sd2"), **with_input(7)}, "upscaler"),
    ({**header("sd1"), **with_input(6)}, "6 input channels"),
    ({**header("sd1"), "model.diffusion_model.x.attn2.to_k.weight": (4, 1280)}, "width"),
    ({**header("sdxl"), "model.diffusion_model.rest": (1000,)}, "distilled"),
]


@pytest.mark.parametrize(
    "shapes, found", REFUSED, ids=[f"{i}-{found}" for i, (_, found) in enumerate(REFUSED)]
)
def test_other_files_are_refused_by_name(shapes, found):
    with pytest.raises(SpectralAdapterError, match=re.escape(found)) as caught:
        single_file.find_family(shapes, "some file")
    assert "some file" in str(caught.value)
    assert "SD 1.x, SD 2.x or SDXL" in str(caught.value)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_missing_part_is_named(family):
    for part, (prefix, size) in single_file.FAMILIES[family].parts.items():
        shapes = header(family)
        shapes[f"{prefix}all"] = (size - 1,)
        with pytest.raises(SpectralAdapterError, match=f"only {size - 1:,} of .* of its {part} "):
            single_file.find_family(shapes, "x")
        del shapes[f"{prefix}all"]
        with pytest.raises(SpectralAdapterError, match=f"nothing of its {part} "):
            single_file.find_family(shapes, "x")
        shapes[f"{prefix}all"] = (size + 77,)
        assert single_file.find_family(shapes, "x") == family


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.SAFETENSORS", "model"])
def test_only_safetensors_is_opened(tmp_path, name):
    # diffusers would hand each of these to the unpickler
    torch.save({"state_dict": {}}, tmp_path / name)
    with pytest.raises(SpectralAdapterError, match=r"only \.safetensors is read"):
        single_file.load_single_file(tmp_path / name)


def test_a_renamed_or_cut_file_is_refused(tmp_path):
    pickled, cut = tmp_path / "pickled.safetensors", tmp_path / "cut.safetensors"
    torch.save({"state_dict": {}}, pickled)
    save_file({"x": torch.ones(100)}, cut)
    cut.write_bytes(cut.read_bytes()[:-10])
    for path, found in (
        (pickled, "pickles"),
        (cut, "truncated"),
        (tmp_path / "absent.safetensors", "no such"),
    ):
        with pytest.raises(SpectralAdapterError, match=found):
            single_file.read_header(path)


# --- what the UNet predicts ------------------------------------------------------------------------------

WIDE, NARROW = torch.linspace(-1, 1, 32), torch.linspace(-0.1, 0.1, 32)
PREDICTIONS = [
    ("sd1", {}, {}, "epsilon"),
    ("sd1", {LAST_NORM: WIDE}, {}, "epsilon"),
    ("sd1", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ("sd2", {LAST_NORM: NARROW}, {}, "epsilon"),
    ("sd2", {LAST_NORM: WIDE}, {}, "v_prediction"),
    ("sd2", {LAST_NORM: WIDE}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ("sd2", {LAST_NORM: NARROW}, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ("sd2", {LAST_NORM: NARROW}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
    ("sd2", {}, {"modelspec.prediction_type": "something"}, "epsilon"),
    ("sdxl", {}, {}, "epsilon"),
    ("sdxl", {"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
]


@pytest.mark.parametrize("family, tensors, metadata, expected", PREDICTIONS)
def test_prediction_type_follows_the_rules(tmp_path, family, tensors, metadata, expected):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1), **tensors}, path, metadata or None)
    shapes, found_metadata = single_file.read_header(path)
    assert single_file.find_prediction_type(path, family, found_metadata, shapes) == expected


# --- the whole way, with small models ----------------------------------------------------------------------

SMALL = {
    "sd1": {
        "unet": dict(block_out_channels=[32, 64, 64, 64], attention_head_dim=4, cross_attention_dim=24),
        "text_encoder": dict(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
        ),
    },
    "sd2": {
        "unet": dict(
            block_out_channels=[32, 64, 64, 64], attention_head_dim=[2, 4, 4, 4], cross_attention_dim=48
        ),
        "text_encoder": dict(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
        ),
    },
    "sdxl": {
        "unet": dict(
            block_out_channels=[32, 64, 64],
            attention_head_dim=[2, 4, 4],
            transformer_layers_per_block=[1, 1, 2],
            cross_attention_dim=72,
            projection_class_embeddings_input_dim=48 + 6 * 256,
        ),
        "text_encoder": dict(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
        ),
        "text_encoder_2": dict(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=40,
            projection_dim=48,
        ),
    },
}
SMALL_VAE = dict(block_out_channels=[32, 32, 32, 32])


def small_configs(family, folder):
    """The shipped configurations with smaller sizes."""
    shutil.copytree(single_file.CONFIGS / family, folder / family)
    for part, sizes in {**SMALL[family], "vae": SMALL_VAE}.items():
        path = folder / family / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    return folder / family


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def original_unet(state, layers=2):
    """A diffusers UNet's tensors under their names in the original layout."""
    attended = {int(n.split(".")[1]) for n in state if re.match(r"up_blocks\.\d+\.attentions", n)}
    renamed = {}
    for name, value in state.items():
        words = name.split(".")
        if words[0] == "mid_block":
            place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(words[1:3])]
            kind, prefix, leaf = words[1], f"middle_block.{place}", words[3:]
        elif words[0] in ("down_blocks", "up_blocks"):
            block, kind, index, leaf = int(words[1]), words[2], int(words[3]), words[4:]
            down = words[0] == "down_blocks"
            number = block * (layers + 1) + (index + 1 if down else index)
            place = {"resnets": 0, "attentions": 1}.get(kind)
            if kind == "downsamplers":
                number, place, leaf = block * (layers + 1) + layers + 1, 0, ["op", leaf[-1]]
            if kind == "upsamplers":
                number, place = block * (layers + 1) + layers, 2 if block in attended else 1
            prefix = f"{'input' if down else 'output'}_blocks.{number}.{place}"
        else:
            renamed[f"{UNET_ENDS['.'.join(words[:-1])]}.{words[-1]}"] = value
            continue
        if kind == "resnets":
            leaf = [RESNET[leaf[0]], *leaf[1:]]
        renamed[".".join([prefix, *leaf])] = value
    return {f"model.diffusion_model.{n}": v for n, v in renamed.items()}


def original_vae(state, levels=4):
    """A diffusers autoencoder's tensors under their names, and with the shapes, of the original layout."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = name.replace("resnets", "block").replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for new, old in attention.items():
            if f"mid_block.attentions.0.{new}." in name:
                name = name.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
                if old != "norm" and name.endswith("weight"):
                    value = value[:, :, None, None]  # 1x1 convolutions there
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        renamed[f"first_stage_model.{name}"] = value
    return renamed


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn",
}  # fmt: skip


def original_open_clip(state, prefix):
    """A transformers CLIP text encoder's tensors in OpenCLIP's layout: q, k and v in one tensor."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            renamed[f"{prefix}text_projection"] = value.T.contiguous()
            continue
        for new, old in OPEN_CLIP.items():
            name = name.replace(new, old)
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            rows = [state[n] for n in _three(state, value)]
            name, value = name.replace("q_proj.", "in_proj_"), torch.cat(rows)
        renamed[prefix + name] = value
    return renamed


def _three(state, value):
    query = next(name for name, other in state.items() if other is value)
    return [query.replace("q_proj", f"{letter}_proj") for letter in "qkv"]


def original_checkpoint(family, parts):
    """One checkpoint in the original layout from a pipeline's modules."""
    state = {part: dict(module.state_dict()) for part, module in parts.items()}
    clip = "cond_stage_model.transformer." if family == "sd1" else "conditioner.embedders.0.transformer."
    tensors = {**original_unet(state["unet"]), **original_vae(state["vae"])}
    if family == "sd2":
        prefix = "cond_stage_model.model."
        tensors |= original_open_clip(state["text_encoder"], prefix)
        width = parts["text_encoder"].config.hidden_size
        # what the files hold beyond what diffusers uses: the 24th layer and the projection
        tensors[f"{prefix}transformer.resblocks.23.ln_1.bias"] = torch.zeros(width)
        tensors[f"{prefix}text_projection"] = torch.zeros(width, width)
    else:
        for name, value in state["text_encoder"].items():
            tensors[f"{clip}text_model.{name.removeprefix('text_model.')}"] = value
        tensors[f"{clip}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sdxl":
        tensors |= original_open_clip(state["text_encoder_2"], "conditioner.embedders.1.model.")
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    return {name: value.contiguous() for name, value in tensors.items()}


@pytest.fixture
def small(request, tmp_path, monkeypatch):
    """Family, modules and checkpoint tensors of a small model; the loader knows its sizes and no network."""
    family = request.param
    configs = small_configs(family, tmp_path / "configs")
    torch.manual_seed(0)
    parts = {part: build(configs, part) for part in ("unet", "vae", *SMALL[family]) if part != "scheduler"}
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    known = single_file.FAMILIES[family]
    encoders = [part for part in parts if part.startswith("text")]
    sizes = zip(known.parts.items(), ["vae", *encoders], strict=True)
    known = replace(
        known,
        text_width=parts["unet"].config.cross_attention_dim,
        unet_parameters=counts["unet"],
        parts={title: (prefix, counts[part]) for (title, (prefix, _)), part in sizes},
    )
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(single_file, "FAMILIES", {family: known})

    def refuse(*args):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return family, parts, original_checkpoint(family, parts)


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipe(
        "a red cat", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt"
    )
    return result.images


@pytest.mark.parametrize("small", FAMILY_NAMES, indirect=True)
def test_every_weight_arrives_and_the_pipeline_draws(small, tmp_path):
    family, parts, tensors = small
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    pipe = load_pipeline(path)
    assert type(pipe).__name__ == {"sdxl": "StableDiffusionXLPipeline"}.get(family, "StableDiffusionPipeline")
    for part, module in parts.items():
        expected, loaded = module.state_dict(), getattr(pipe, part).state_dict()
        assert expected.keys() == loaded.keys()
        for name, value in expected.items():
            assert torch.equal(loaded[name], value), f"{part}.{name}"
    assert getattr(pipe, "safety_checker", None) is None
    assert pipe.scheduler.config.prediction_type == "epsilon"
    image = picture(pipe)
    assert image.shape == (1, 3, 32, 32)
    assert image.isfinite().all() and image.std() > 0.01
    if family != "sdxl":
        return
    pipe.save_pretrained(tmp_path / "folder")  # and the folder opens as any other
    assert torch.allclose(picture(load_pipeline(tmp_path / "folder")), image, atol=1e-3)


@pytest.mark.parametrize("small", ["sd1", "sd2"], indirect=True)
def test_dtype_and_prediction_type_can_be_chosen(small, tmp_path):
    family, _, tensors = small
    path = tmp_path / "model.safetensors"
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}, path
    )
    pipe = single_file.load_single_file(path, torch.bfloat16, prediction_type="v_prediction")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.bfloat16}
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.config.sample_size == {"sd1": 64, "sd2": 96}[family]
    with pytest.raises(SpectralAdapterError, match="'sample'"):
        single_file.load_single_file(path, prediction_type="sample")


@pytest.mark.parametrize("small", ["sdxl"], indirect=True)
def test_marks_in_the_file_set_the_schedule(small, tmp_path):
    _, _, tensors = small
    path = tmp_path / "model.safetensors"
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    scheduler = single_file.load_single_file(path).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] < 1e-6  # the last step is pure noise
    scheduler.set_timesteps(4)
    assert torch.as_tensor(scheduler.sigmas).isfinite().all()


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
def test_a_missing_weight_is_refused(small, tmp_path):
    _, _, tensors = small
    path = tmp_path / "model.safetensors"
    moved = "first_stage_model.decoder.mid.block_2.norm1.weight"
    save_file({name: value for name, value in tensors.items() if name != moved}, path)
    with pytest.raises(SpectralAdapterError, match="of its VAE"):
        single_file.load_single_file(path)
    # the counts are right, a name is not
    save_file({f"{name}_" if name == moved else name: value for name, value in tensors.items()}, path)
    with pytest.raises(SpectralAdapterError, match="lacks weights"):
        single_file.load_single_file(path)


@pytest.mark.parametrize("small", ["sd1"], indirect=True)
def test_a_wrong_shape_is_refused(small, tmp_path):
    _, _, tensors = small
    path = tmp_path / "model.safetensors"
    tensors["first_stage_model.decoder.conv_in.bias"] = torch.zeros(99)
    save_file(tensors, path)
    with pytest.raises(SpectralAdapterError, match="cannot convert"):
        single_file.load_single_file(path)


def copy_of_the_demo_model(folder: Path) -> Path:
    source = Path(__file__).resolve().parents[3] / "demo_model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", "classifier*"))
    return folder


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("model_index.json", "[" * 9000, "not valid JSON"),
        ("model_index.json", "[]", "_class_name"),
        ("model_index.json", '{"_class_name": ["custom", "Pipe"]}', "_class_name"),
        ("model_index.json", '{"_class_name": "X", "unet": ["os", "system"]}', "expected a class of"),
        ("model_index.json", '{"_class_name": "NoSuchPipeline"}', "diffusers cannot open it"),
        ("unet/config.json", "{", "diffusers cannot open it"),
        ("unet/config.json", '{"sample_size": "a", "block_out_channels": 3}', "diffusers cannot open it"),
        ("text_encoder/config.json", '{"hidden_size": "a"}', "diffusers cannot open it"),
        ("scheduler/scheduler_config.json", "[1]", "diffusers cannot open it"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, file: str, text: str, found: str) -> None:
    folder = copy_of_the_demo_model(tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(SpectralAdapterError, match=found):
        load_pipeline(folder)


def test_a_folder_with_pickled_weights_is_refused_unread(tmp_path: Path) -> None:
    """diffusers would take the pickle where there is no safetensors file beside it."""
    folder = copy_of_the_demo_model(tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(SpectralAdapterError, match="diffusers cannot open it"):
        load_pipeline(folder)


def test_a_folder_of_an_inpainting_model_is_refused(tmp_path: Path) -> None:
    """As its single file is: nine input channels would end in torch's own words at the first step."""
    folder = copy_of_the_demo_model(tmp_path / "model")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(len(first), 5, *first.shape[2:])], 1)
    save_file(weights, file)
    with pytest.raises(SpectralAdapterError, match=r"an inpainting model \(9 input channels\)"):
        load_pipeline(folder)
