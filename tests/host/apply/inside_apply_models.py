"""Inside a host: adapters on other kinds of models and weights; ``inside_apply_checks.py`` runs the checks.

Fused q, k and v (SD3), SDXL's names, weights in float8, partly offloaded or quantised by others, and bases
that are not the adapter's.
"""

import gc
from dataclasses import replace

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models
import torch
from inside_apply_lib import adapter, condition, leftovers, pack, predict, prepared, sample

applying = pack("nodes.host.apply.adapters")
demo = pack("nodes.host.demo.model")
keys = pack("nodes.host.model.places")
originals = pack("nodes.host.apply.rebase")
records = pack("nodes.host.apply.gate_records")
base_weights = pack("nodes.host.model.base_weights")
errors = pack("spectral_core.errors")
adapters = pack("spectral_core.adapter.adapter")
methods = pack("spectral_core.methods")
fingerprint = pack("spectral_core.adapter.fingerprint")
cpu = torch.device("cpu")


def new(weights, config, seed=1, size=0.1):
    """An adapter for these weights (name -> weight), moved off its start."""
    generator = torch.Generator().manual_seed(seed)

    def basis(name, weight):
        u, s, vh = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        columns = list(config.columns)
        return u[:, columns].float(), s[columns].float(), vh.mT[:, columns].float()

    def move(name, term):
        learns = methods.method_of(term.config).trainable(term.config)
        moved = {
            k: v + size * torch.randn(v.shape, generator=generator)
            for k, v in term.params.items()
            if k in learns
        }
        return replace(term, params={**term.params, **moved})

    return adapters.create(weights, config, basis, generator).map_terms(move)


LORA, ADAPTIVE = methods.LoRAConfig(3), methods.FouRAConfig(4)


def close(one, two, what="", tolerance=1e-5):
    difference = ((one - two).abs().max() / two.abs().max()).item()
    assert difference <= tolerance, f"{what}: {difference:.1e}"


def sd3():
    """A two-layer SD3: its q, k and v are rows of one weight."""
    config = comfy.supported_models.SD3(
        {
            "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "num_patches": 64,
            "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128},
            },
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=cpu)
    generator = torch.Generator().manual_seed(2)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and name.startswith("diffusion_model"):
            value.data = torch.randn(value.shape, generator=generator) * (
                value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1
            )
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def fused_weights_of_sd3():
    patcher = sd3()
    generator = torch.Generator().manual_seed(3)
    x, sigma = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.5, 0.5])
    context, y = torch.randn(2, 7, 48, generator=generator), torch.randn(2, 32, generator=generator)

    def output(p):
        seen = []
        options, done = prepared(p)
        hook = p.model.diffusion_model.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
        try:
            p.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options, y=y)
        finally:
            hook.remove()
            done()
        return seen[0]

    base = output(patcher)
    state = patcher.model.state_dict()
    qkv = state["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].clone()
    assert qkv.shape == (384, 128)
    by_slices = {
        f"transformer.transformer_blocks.0.attn.to_{p}": qkv[128 * i : 128 * (i + 1)]
        for i, p in enumerate("qkv")
    }
    names = {
        "diffusers": by_slices,
        "native rows": {
            "diffusion_model.joint_blocks.0.x_block.attn.qkv[128:256]": qkv[128:256],
            "diffusion_model.joint_blocks.1.x_block.mlp.fc1": state[
                "diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"
            ],
            "diffusion_model.x_embedder.proj": state["diffusion_model.x_embedder.proj.weight"],
        },
        "native whole": {"diffusion_model.joint_blocks.0.context_block.attn.qkv": qkv},
    }
    for what, weights in names.items():
        ours = new(weights, LORA)
        merged, live = (
            applying.apply(ours, patcher, None, 0.7, 1.0, mode).model for mode in ("merged", "live")
        )
        one, two = output(merged), output(live)
        close(one, two, what)
        assert (one - base).abs().max() > 1e-3 * base.abs().max(), what
        gated = applying.apply(new(weights, ADAPTIVE), patcher, None, 1.0, 1.0).model
        assert not torch.equal(output(gated), base)
    ours = new(by_slices, LORA)
    delta = torch.cat([_delta(ours, name) for name in by_slices])
    state["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].add_(delta)
    expected = output(patcher)
    state["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].copy_(qkv)
    close(output(applying.apply(ours, patcher, None, 1.0, 1.0, "live").model), expected, "explicit")
    row = "diffusion_model.joint_blocks.0.x_block.attn.qkv[128:256]"  # merged and live share its place
    ours = new({row: qkv[128:256]}, LORA)
    state["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"][128:256].add_(_delta(ours, row))
    expected = output(patcher)
    state["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].copy_(qkv)
    close(output(applying.apply(ours, patcher, None, 1.0, 1.0).model), expected, "explicit rows")
    assert torch.equal(output(patcher), base) and leftovers(patcher.model) == []


def _delta(ours, name):
    factors = ours.layers[name].factors(1.0)
    return factors.scale * factors.up @ factors.down


def names_of_sdxl():
    """Every layer of an SDXL UNet by our names is the host's weight of the same shape (no numbers needed)."""
    config = comfy.supported_models.SDXL(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
            "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4],
            "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64,
            "num_classes": "sequential", "adm_in_channels": 2816,
            "use_spatial_transformer": True, "legacy": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("meta"))
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    layouts = pack("spectral_core.names.unet_blocks")
    table = layouts.unet_table(layouts.UNetLayout.sdxl())
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layer_shape = pack("spectral_core.maths.layers").LayerShape
    layers, expected = {}, {}
    for ours, native in table.items():
        shape = shapes.get(f"diffusion_model.{native}.weight", ())
        if len(shape) >= 2:
            expected[f"unet.{ours}"] = f"diffusion_model.{native}.weight"
            layers[f"unet.{ours}"] = adapters.AdapterLayer(layer_shape(shape[0], shape[1], shape[2:]), ())
    found = keys.place(adapters.Adapter(layers), patcher, None)
    assert found.unmatched == {} and len(layers) > 700, len(layers)
    assert {place.name: place.key for place in found.model} == expected


MODEL = None


def demo_model():
    global MODEL
    MODEL = MODEL or demo.load_model()
    return MODEL


def inputs():
    generator = torch.Generator().manual_seed(1)
    x = 5 * torch.randn(2, 4, 16, 16, generator=generator)
    return x, torch.tensor([3.0, 3.0]), torch.randn(2, 77, 128, generator=generator)


def partial_loading():
    """Most weights stay offloaded and are patched as they are used; nothing else changes."""
    model, load = demo_model(), management.LoadedModel.model_load
    both = applying.apply(adapter("foura-adaptive"), model, None, 1.0, 1.0).model
    both = applying.apply(adapter("spectral-a"), both, None, 1.0, 1.0).model
    whole, base = predict(both, *inputs())[2], predict(model, *inputs())[2]
    management.unload_all_models()
    management.LoadedModel.model_load = lambda self, memory=0, force_patch_weights=False: load(
        self, 200_000, force_patch_weights
    )
    try:
        partly = predict(both, *inputs())[2]
        assert model.model.model_lowvram and model.model.lowvram_patch_counter > 0
        close(partly, whole, "partly loaded")
        assert torch.equal(predict(model, *inputs())[2], base)
    finally:
        management.LoadedModel.model_load = load
        management.unload_all_models()
    assert torch.equal(predict(model, *inputs())[2], base)
    assert leftovers(model.model) == []


def with_dtype(dtype, compute):
    config = demo.demo.read_config("unet")
    settings = demo._ModelConfig(demo.demo.unet_config(config))
    settings.set_inference_dtype(dtype, compute)
    model = settings.get_model({}, device=cpu)
    weights = demo.demo.native_unet(demo.demo.read_weights("unet"), config)
    model.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def weights_in_float8():
    """Live, the adapter acts in full precision on the rounded base: as on that base stored in float32."""
    small = with_dtype(torch.float8_e4m3fn, torch.float32)
    wide = with_dtype(torch.float32, None)
    for name, value in wide.model.diffusion_model.state_dict().items():
        rounded = small.model.diffusion_model.state_dict()[name]
        assert rounded.dtype == torch.float8_e4m3fn
        value.copy_(rounded.float())
    base = predict(small, *inputs())[2]
    for name in ("foura-adaptive", "spectral-a"):
        one, two = (
            predict(applying.apply(adapter(name), on, None, 1.0, 1.0, "live").model, *inputs())[2]
            for on in (small, wide)
        )
        close(one, two, name)
        assert (one - base).abs().max() > 1e-2 * base.abs().max()
    merged = applying.apply(adapter("spectral-a"), small, None, 1.0, 1.0, "merged").model
    close(predict(merged, *inputs())[2], one, "rounded after merging", 0.2)
    assert torch.equal(predict(small, *inputs())[2], base)
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    original = pack("nodes.host.model.compat").original_weight(merged, key, cpu)
    assert torch.equal(original, small.model.state_dict()[key].float())


def gates_in_half_precision():
    """Live on a model that computes in bfloat16: as on its weights in float32 but for rounding, every factor
    cast once."""
    small, wide = with_dtype(torch.bfloat16, None), with_dtype(torch.float32, None)
    for name, value in wide.model.diffusion_model.state_dict().items():
        value.copy_(small.model.diffusion_model.state_dict()[name].float())
    given, held = adapter("foura-adaptive"), []
    shapes = [f for x in given.layers.values() for f in factor_shapes(x)]
    found = {}
    for on in (small, wide):
        adapted = applying.apply(given, on, None, 1.0, 1.0, "live").model
        hook = adapted.model.diffusion_model.out[0].register_forward_hook(
            lambda *_: held.append(bytes_of(torch.bfloat16, set(shapes)))
        )
        found[on] = predict(adapted, *inputs())[2].float(), predict(on, *inputs())[2].float()
        hook.remove()
        opened = records.of(given).summary()["mean_effective_rank"]
        assert 0 < sum(opened) < 4 * len(opened), opened
    difference = (found[small][0] - found[wide][0]).norm()
    effect = (found[wide][0] - found[wide][1]).norm()
    assert difference <= 0.4 * effect, (difference, effect)  # a gate near its threshold may fall either way
    expected = sum(2 * rows * columns for rows, columns in shapes)
    assert held[0] == expected, (held, expected)
    assert bytes_of(torch.bfloat16, set(shapes)) == 0, "held after the run"


def factor_shapes(layer):
    rank = layer.terms[0].config.rank
    return [(rank, layer.shape.in_features), (layer.shape.out_features, rank)]


def bytes_of(dtype, shapes):
    """Of all tensors of a type and such shapes in the process, each piece of memory once."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == dtype]
    stored = [x.untyped_storage() for x in found if tuple(x.shape) in shapes]
    return sum({x.data_ptr(): x.nbytes() for x in stored}.values())


class Quantised(torch.nn.Module):
    """A linear layer as quantising packs bring them: not nn.Linear, its weight two halves of a byte."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer(
            "weight", torch.zeros(linear.out_features, linear.in_features // 2, dtype=torch.uint8)
        )
        self.hidden, self.bias = [linear], None

    def forward(self, x):
        return self.hidden[0](x)


def layers_quantised_by_others():
    model = demo.load_model()
    plain = predict(applying.apply(adapter("spectral-a"), model, None, 1.0, 1.0, "live").model, *inputs())[2]
    adaptive = predict(applying.apply(adapter("foura-adaptive"), model, None, 1.0, 1.0).model, *inputs())[2]
    management.unload_all_models()
    block = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    block.to_q = Quantised(block.to_q)
    auto = applying.apply(adapter("spectral-a"), model, None, 1.0, 1.0)
    assert auto.mode == "live" and "quantised" in auto.report, auto.report
    close(predict(auto.model, *inputs())[2], plain)
    block.to_q = Quantised(block.to_q.hidden[0])  # another module in the same place, after a run
    close(predict(auto.model, *inputs())[2], plain, "replaced")
    close(
        predict(applying.apply(adapter("foura-adaptive"), model, None, 1.0, 1.0).model, *inputs())[2],
        adaptive,
    )
    try:
        applying.apply(adapter("spectral-a"), model, None, 1.0, 1.0, "merged")
    except errors.SpectralAdapterError as error:
        assert "quantised" in str(error) and "live" in str(error), str(error)
    else:
        raise AssertionError("merged into bytes")


def bases_that_are_not_the_adapters():
    model = demo.load_model()
    names = [n for n in adapter("spectral-a").layers if ".attn1." in n][:6]
    shapes = {n: adapter("spectral-a").layers[n].shape for n in names}
    weight = base_weights.source(shapes, model, None)
    weights = {name: weight(name) for name in names}
    ours = new(weights, methods.SpectralAConfig((0, 1, 2)), size=0.05)
    marked = ours.with_provenance(base=fingerprint.fingerprint(weights))
    same = applying.apply(ours, model, None, 1.0, 1.0, "auto", "rebase")
    assert "0 singular bases" in same.report
    expected = predict(applying.apply(ours, model, None, 1.0, 1.0).model, *inputs())[2]
    assert torch.equal(predict(same.model, *inputs())[2], expected)
    for adapter_ in (ours, marked):
        assert "same base" in applying.apply(adapter_, model, None, 1.0, 1.0, "auto", "strict").report
    other = demo.load_model()
    generator = torch.Generator().manual_seed(8)
    for value in other.model.state_dict().values():
        if value.dim() >= 2:
            value.add_(0.4 * value.std() * torch.randn(value.shape, generator=generator))
    # a patched clone is loaded: the weights that count are the original ones below it
    predict(applying.apply(adapter("spectral-a"), other, None, 3.0, 1.0, "merged").model, *inputs())
    for adapter_ in (ours, marked):
        try:
            applying.apply(adapter_, other, None, 1.0, 1.0, "auto", "strict")
        except errors.SpectralAdapterError as error:
            assert "not the base" in str(error), str(error)
        else:
            raise AssertionError("another base passed as the same")
    fitted, notes = originals.for_base(ours, other, None, "rebase")
    assert f"{len(names)} singular bases" in notes[0], notes
    theirs = base_weights.available(ours, other)
    for name in names:
        w, (term,) = theirs[name], fitted.layers[name].terms
        u, v = (term.params[k] for k in "uv")
        # orthonormal, made of the first singular columns of this model (those asked for and 8 more)
        left, _, right = torch.linalg.svd(w, full_matrices=False)
        for found, columns in ((u, left), (v, right.mT)):
            close(columns[:, :11] @ (columns[:, :11].mT @ found), found, name, 1e-3)
            close(found.mT @ found, torch.eye(3), name, 1e-4)
        close(term.params["s"], ((u.mT @ w) * v.mT).sum(1), name, 1e-4)
        old = ours.layers[name].terms[0].params["u"]
        assert ((u * old).sum(0) > 0.5).all(), (u * old).sum(0)
        assert not torch.equal(u, old)
    again, _ = originals.for_base(ours.scaled(0.5), other, None, "rebase")
    assert again.layers[names[0]] is fitted.layers[names[0]] and again.strength == 0.5
    strange = new(
        {names[0]: torch.randn(weights[names[0]].shape, generator=generator)},
        methods.SpectralAConfig((0, 1, 2)),
    )
    try:
        originals.for_base(strange, model, None, "rebase")
    except errors.SpectralAdapterError as error:
        assert "another kind of model" in str(error), str(error)
    else:
        raise AssertionError("an unrelated base was taken")


def sampling_with_everything_partly_loaded():
    model = demo_model()
    base = sample(model, condition(1), condition(2))
    live = applying.apply(adapter("foura-adaptive"), model, None, 1.0, 1.0).model
    load = management.LoadedModel.model_load
    expected = sample(live, condition(1), condition(2))
    management.unload_all_models()
    management.LoadedModel.model_load = lambda self, memory=0, force_patch_weights=False: load(
        self, 200_000, force_patch_weights
    )
    try:
        close(sample(live, condition(1), condition(2)), expected, "partly", 1e-4)
    finally:
        management.LoadedModel.model_load = load
        management.unload_all_models()
    assert torch.equal(sample(model, condition(1), condition(2)), base)


CHECKS = [
    fused_weights_of_sd3,
    names_of_sdxl,
    partial_loading,
    sampling_with_everything_partly_loaded,
    weights_in_float8,
    gates_in_half_precision,
    layers_quantised_by_others,
    bases_that_are_not_the_adapters,
]
