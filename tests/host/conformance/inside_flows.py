"""Inside a host: whole ways of a user through the nodes on small models of today's families, and what is
refused on the way, each with its sentence."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.supported_models as models
import folder_paths
import torch
from inside_apply_lib import FOLDER, leftovers, pack, run_checks
from inside_catalogue import CATALOGUE
from inside_train_lib import refused, train

applying, fusion = pack("nodes.host.apply.adapters"), pack("spectral_core.fusion")
compat, text = pack("nodes.host.model.compat"), pack("nodes.host.training.text")
fuse_node, export_node = pack("nodes.fuse").FuseAdapters, pack("nodes.export").ExportAdapterAsLoRA
save_node, apply_node = pack("nodes.export").SaveAdapter, pack("nodes.apply").ApplyAdapter
CLOSE = 2e-3  # the exported file holds halves


def flow(name):
    """Two concepts trained on one small model, fused, saved, exported, and loaded by the host's own node."""
    import nodes  # the host's

    family = CATALOGUE[name]
    if not family.exists():
        return
    model = family.patcher()
    base = family.sampled(model)
    given = {"conditioning": [family.words(7)], "method": "spectral_a", "columns": "", "rank": 2}
    given |= {"targets": "attention+mlp", "steps": 6, "batch_size": 1, "learning_rate": 0.05}
    one, two = (
        train(model, run_name=f"{name} {i}", latents={"samples": family.noise(1, seed)}, **given)[0]
        for i, seed in enumerate((11, 12))
    )
    columns = [{c for layer in a.layers.values() for c in layer.terms[0].config.columns} for a in (one, two)]
    assert columns[0].isdisjoint(columns[1]), f"both concepts are in columns {columns[0] & columns[1]}"
    both = fuse_node().fuse(one, two, method="sum", weight_1=1.0, weight_2=1.0)["result"][0]
    save_node().save(both, f"{name}-both")
    file = export_node().export(both, f"loras/{name}", precision="fp32", model=model)["result"][0]
    folder_paths.add_model_folder_path("loras", str(Path(folder_paths.get_output_directory(), "loras")))
    (theirs,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, Path(file).name, 1.0)
    ours = apply_node().apply(both, model=model)["result"][0]
    chained = apply_node().apply(two, model=apply_node().apply(one, model=model)["result"][0])["result"][0]
    drawn, wanted, each = (family.sampled(m) for m in (theirs, ours, chained))
    size = wanted.abs().max()
    assert (drawn - wanted).abs().max() < CLOSE * size, "the host draws another picture with the export"
    assert (each - wanted).abs().max() < CLOSE * size, "the two chained draw another picture than fused"
    assert (wanted - base).abs().max() > 10 * CLOSE * size, "hardly anything was learned"
    assert torch.equal(family.sampled(model), base) and leftovers(model.model) == []


def flux2_trained_fused_exported_and_loaded():
    flow("flux2")


def qwen_image_trained_fused_exported_and_loaded():
    flow("qwen-image")


def z_image_trained_fused_exported_and_loaded():
    flow("z-image")


def a_kernel_without_a_derivative_is_told_before_the_first_step():
    """Where the host computes with one, and has no form of it that can train."""
    import comfy.ldm.flux.math as flux

    @torch.library.custom_op("spectral_tests::rope", mutates_args=())
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    family, own = CATALOGUE["flux"], flux.optimized_attention
    model = family.patcher()
    base = family.sampled(model)
    flux.optimized_attention = lambda q, *args, **kwargs: own(kernel(q), *args, **kwargs)
    given = {"latents": {"samples": family.noise(1, 5)}, "conditioning": [family.words(7)], "steps": 2}
    try:
        words = ("Flux cannot train on this ComfyUI", "without a derivative", "spectral_tests.rope", "0.28")
        refused(*words, model=model, run_name="kernel", targets="attention", **given)
    finally:
        flux.optimized_attention = own
    assert torch.equal(family.sampled(model), base) and leftovers(model.model) == []
    assert not getattr(compat.comfy.model_management, "in_training", False)


def clip_of(**encoders):
    """A CLIP of small text encoders, by the host's names of them."""
    root = torch.nn.Module()
    for name, tree in encoders.items():
        encoder = torch.nn.Module()
        encoder.transformer = tree
        setattr(root, name, encoder)
    return SimpleNamespace(patcher=SimpleNamespace(model=root))


def only_clips_own_text_encoders_train():
    def block():
        attention = torch.nn.ModuleDict({x: torch.nn.Linear(4, 4) for x in ("q", "k", "v", "o")})
        return torch.nn.ModuleDict({"SelfAttention": attention})

    errors = pack("spectral_core.errors")
    try:
        text.choose(clip_of(t5xxl=block(), qwen3_4b=block()), "attention")
    except errors.SpectralAdapterError as error:
        said = str(error)
        assert "only CLIP's own text encoders train" in said and "t5xxl, qwen3_4b" in said, said
    else:
        raise AssertionError("not refused")
    both = clip_of(clip_l=block(), t5xxl=block())
    assert len(text.choose(both, "attention")) == 4
    assert text.stay(both) == ["text encoders that stay as they are: t5xxl"]


def latents_of_several_parts_are_refused_by_name():
    family = CATALOGUE["minimax-h3"]
    if not hasattr(models, family.kind):
        return
    model = family.patcher()
    given = {"latents": {"samples": family.noise(1, 5)}, "conditioning": [family.words(7)], "steps": 2}
    refused("several latents in one", model=model, run_name="nested", targets="attention", **given)


FLOW_CHECKS = [
    flux2_trained_fused_exported_and_loaded,
    qwen_image_trained_fused_exported_and_loaded,
    z_image_trained_fused_exported_and_loaded,
    a_kernel_without_a_derivative_is_told_before_the_first_step,
    only_clips_own_text_encoders_train,
    latents_of_several_parts_are_refused_by_name,
]


if __name__ == "__main__":
    chosen = [check for check in FLOW_CHECKS if not sys.argv[3:] or check.__name__ in sys.argv[3:]]
    report = run_checks(chosen)
    (FOLDER / "flows.json").write_text(json.dumps(report), encoding="utf-8")
