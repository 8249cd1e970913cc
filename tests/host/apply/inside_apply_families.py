"""Inside a host: small random models of other families, sampled by the host with adapters merged and live.

Sizes are small and weights random; classes, names, fused weights and sampling are the host's own.
``inside_apply_checks.py`` runs the checks.
"""

import comfy.sample
import comfy.supported_models as models
import torch
from inside_apply_base import with_compile
from inside_apply_lib import leftovers, pack
from inside_apply_models import ADAPTIVE, LORA, close, new
from inside_models import FAMILIES, FLUX, LUMINA, QWEN, WAN, Z_IMAGE, patcher_of
from inside_unets import SD15

applying = pack("nodes.host.apply.adapters")
compat = pack("nodes.host.model.compat")
keys = pack("nodes.host.model.places")
cpu = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest value, after two steps; measured 1e-6 to 1e-5


def sampled(patcher, latent, width, pooled=None, masked=False):
    """Latents after two steps with guidance; contexts are 7 words of this width."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(latent, generator=generator)

    def condition():
        context = torch.randn(1, 7, width, generator=generator)
        extra = {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}
        return [[context, extra | ({"attention_mask": torch.ones(1, 7, dtype=torch.long)} if masked else {})]]

    return comfy.sample.sample(
        patcher, noise, 2, 3.0, "euler", "simple", condition(), condition(), torch.zeros(latent),
        disable_pbar=True, seed=1,
    )  # fmt: skip


def linears(patcher, among, count):
    """Some of the model's own linear weights, by their native names, spread over the model."""
    found = {
        key.removesuffix(".weight"): value.clone()
        for key, value in patcher.model.state_dict().items()
        if key.endswith(".weight") and value.dim() == 2 and any(word in key for word in among)
    }
    names = sorted(found)
    assert len(names) >= count, sorted(patcher.model.state_dict())
    return {name: found[name] for name in names[:: max(1, len(names) // count)]}


def rows(patcher):
    """The host's own names for rows of fused weights, as files of that family have them."""
    state, found = patcher.model.state_dict(), {}
    for name, value in compat.model_keys(patcher).items():
        if name.startswith("transformer.") and not isinstance(value, str) and len(value) == 2:
            key, offset = value
            found.setdefault((key, offset), (name, state[key].narrow(*offset).clone()))
    return dict(list(found.values())[:6])


def check(patcher, adapters_of, *inputs):
    """Merged is live and acts; an adaptive gate acts; the base is the same to the bit afterwards."""
    base = sampled(patcher, *inputs)
    assert torch.isfinite(base).all()
    for what, weights in adapters_of.items():
        if not weights:
            continue
        ours = new(weights, LORA, size=0.2)
        one, two = (
            sampled(applying.apply(ours, patcher, None, 0.7, 1.0, mode).model, *inputs)
            for mode in ("merged", "live")
        )
        close(one, two, what, TOLERANCE)
        assert (one - base).abs().max() > 10 * TOLERANCE * base.abs().max(), f"{what}: hardly anything"
        gated = applying.apply(new(weights, ADAPTIVE, size=0.2), patcher, None, 1.0, 1.0)
        assert gated.mode == "live" and not torch.equal(sampled(gated.model, *inputs), base), what
    assert torch.equal(sampled(patcher, *inputs), base)
    assert leftovers(patcher.model) == []


def names_in_one_order():
    """The host's own map has another order in every process; ours must not, nor what follows from it."""
    patcher = patcher_of(models.SD15, SD15)
    names, layers = list(compat.model_keys(patcher)), list(unet_layers(patcher))
    assert len(layers) > 20 and names == sorted(names)
    assert layers == sorted(layers)


def unet_layers(patcher):
    """Layers by this pack's names, as its files have them."""
    named = keys.unet_names(compat.model_keys(patcher))
    state = patcher.model.state_dict()
    there = {name: state[key] for key, name in named.items() if key in state}  # maps name some that are not
    return {name: weight.clone() for name, weight in there.items() if weight.dim() in (2, 4)}


def sampling_sd2():
    patcher = FAMILIES["sd2"].patcher()
    check(patcher, {"unet": unet_layers(patcher)}, (1, 4, 16, 16), 64)


def sampling_sdxl():
    patcher = FAMILIES["sdxl"].patcher()
    layers = unet_layers(patcher)
    assert sum(".attn" in name for name in layers) > 60, sorted(layers)
    check(patcher, {"unet": layers}, (1, 4, 16, 16), 64, 1280)


def sampling_flux():
    patcher = patcher_of(models.Flux, FLUX)
    sliced = rows(patcher)
    assert len(sliced) == 6, sliced.keys()
    native = linears(patcher, ("attn", "mlp", ".linear1", ".linear2"), 8)
    check(patcher, {"native": native, "rows": sliced}, (1, 16, 8, 8), 48, 32)


def sampling_wan():
    patcher = patcher_of(models.WAN21_T2V, WAN)
    check(patcher, {"native": linears(patcher, ("attn", "ffn"), 8)}, (1, 16, 2, 8, 8), 48)


def sampling_qwen_image():
    patcher = patcher_of(models.QwenImage, QWEN)
    check(patcher, {"native": linears(patcher, ("attn", "mlp"), 8)}, (1, 16, 1, 8, 8), 48)


def sampling_lumina():
    patcher = patcher_of(models.Lumina2, LUMINA)
    native = linears(patcher, ("attention", "feed_forward"), 8)
    check(patcher, {"native": native}, (1, 16, 8, 8), 48, None, True)


def sampling_z_image():
    """Only newer hosts have it."""
    kind = getattr(models, "ZImage", None)
    if kind is None:
        return
    patcher = patcher_of(kind, Z_IMAGE)
    sliced = rows(patcher)
    assert sliced
    native = linears(patcher, ("attention", "feed_forward"), 8)
    check(patcher, {"native": native, "rows": sliced}, (1, 16, 8, 8), 48, None, True)


def torch_compile_around_the_whole_model():
    """By the eager backend (inductor takes minutes: one block, in another check, in either order)."""
    inputs = ((1, 4, 8, 8), 64)
    one = {"transformer_depth": [0], "transformer_depth_output": [0, 0]}  # tracing more takes minutes
    patcher = patcher_of(models.SD15, SD15 | one)
    layers = {name: w for name, w in unet_layers(patcher).items() if ".attn" in name}
    base = sampled(patcher, *inputs)

    def adapted(on):
        on = applying.apply(new(layers, ADAPTIVE, size=0.2), on, None, 1.0, 1.0).model
        return applying.apply(new(layers, LORA, seed=2, size=0.2), on, None, 1.0, 1.0, "live").model

    expected = sampled(adapted(patcher), *inputs)
    assert torch.isfinite(base).all()
    assert (expected - base).abs().max() > 1e-2 * base.abs().max()
    torch._dynamo.reset()
    compiled = with_compile(adapted(patcher), "eager", ["diffusion_model"])
    close(sampled(compiled, *inputs), expected, "compiled", TOLERANCE)
    assert torch.equal(sampled(patcher, *inputs), base)
    assert leftovers(patcher.model) == []
    torch._dynamo.reset()


CHECKS = [
    sampling_sd2,
    sampling_sdxl,
    sampling_flux,
    sampling_wan,
    sampling_qwen_image,
    sampling_lumina,
    sampling_z_image,
    names_in_one_order,
    torch_compile_around_the_whole_model,
]
