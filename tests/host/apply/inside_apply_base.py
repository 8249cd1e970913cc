"""Inside a host: whatever is done with adapters, the base model's pictures stay the same to the bit.

Every check is a function; ``inside_apply_checks.py`` runs them.
"""

import comfy.model_management as management
import comfy.model_sampling as model_sampling
import comfy.sd
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from inside_apply_lib import adapter, condition, leftovers, pack, predict, sample

applying = pack("nodes.host.apply.adapters")
compat = pack("nodes.host.model.compat")
noise = pack("nodes.host.model.noise")
records = pack("nodes.host.apply.gate_records")
live = pack("nodes.host.apply.stack")
errors = pack("spectral_core.errors")
schedule = pack("spectral_core.adapter.schedule")

with torch.inference_mode():
    model, clip = pack("nodes.host.demo.model").load_model(), pack("nodes.host.demo.model").load_clip()
    positive, negative = condition(1), condition(2)
    BASE = sample(model, positive, negative)
    names = ("foura-adaptive", "foura-frozen", "spectral-a", "lora", "text-adaptive", "text-lora")
    ADAPTERS = {name: adapter(name) for name in names}
ADAPTIVE = ADAPTERS["foura-adaptive"]


def put(name, on=None, mode="auto", strength=1.0, given=None):
    return applying.apply(ADAPTERS.get(name, given), on or model, None, strength, strength, mode).model


def assert_base_untouched():
    assert torch.equal(sample(model, positive, negative), BASE)
    assert leftovers(model.model) == [], leftovers(model.model)


def differs(latents, other=None):
    return not torch.equal(latents, BASE if other is None else other)


def chain_of_three():
    modes = ("live", "merged", "live")
    chained = model
    for name, mode in zip(("foura-adaptive", "foura-frozen", "lora"), modes, strict=True):
        chained = put(name, chained, mode)
    first = sample(chained, positive, negative)
    assert differs(first)
    without_one = put("lora", put("foura-frozen", mode="merged"), "live")
    assert differs(sample(without_one, positive, negative), first), "the first of two live ones is lost"
    assert_base_untouched()
    assert torch.equal(sample(chained, positive, negative), first)
    assert_base_untouched()


def two_samplers_with_different_adapters():
    one, two = put("foura-adaptive"), put("spectral-a")
    a, b = sample(one, positive, negative), sample(two, positive, negative)
    assert differs(a) and differs(b) and differs(a, b)
    assert torch.equal(sample(one, positive, negative), a)
    assert torch.equal(sample(two, positive, negative), b)
    assert_base_untouched()


def unload_and_reload():
    both = put("spectral-a", put("foura-adaptive"))
    before = sample(both, positive, negative)
    management.unload_all_models()
    assert_base_untouched()
    management.unload_all_models()
    assert torch.equal(sample(both, positive, negative), before)
    management.unload_all_models()
    assert_base_untouched()


def an_exception_inside_the_model():
    both = put("spectral-a", put("foura-adaptive"))
    block = model.model.diffusion_model.middle_block[1]
    for kind in (RuntimeError, KeyboardInterrupt):

        def fail(*args, kind=kind):
            raise kind("in the middle")

        hook = block.register_forward_pre_hook(fail)
        try:
            sample(both, positive, negative)
        except kind:
            pass
        else:
            raise AssertionError("the failure was swallowed")
        finally:
            hook.remove()
        assert leftovers(model.model) == []
    assert_base_untouched()


def an_interrupt_at_any_step():
    for step in range(3):
        adapted = put("foura-adaptive")

        def interrupt(i, *args, at=step):
            if i == at:
                management.interrupt_current_processing()
                management.throw_exception_if_processing_interrupted()

        try:
            sample(adapted, positive, negative, callback=interrupt)
        except management.InterruptProcessingException:
            pass
        else:
            raise AssertionError("the interrupt was swallowed")
        assert leftovers(model.model) == []
    assert_base_untouched()


def a_new_strength_reloads_nothing():
    one = put("foura-adaptive", strength=1.0)
    first = sample(one, positive, negative)
    loads, load = [], type(model).load
    weights = {id(p): p._version if not p.is_inference() else 0 for p in model.model.parameters()}
    folds, fold = [], pack("nodes.host.apply.folded_cache")._fold
    type(model).load = lambda self, *args, **kwargs: loads.append(1) or load(self, *args, **kwargs)
    pack("nodes.host.apply.folded_cache")._fold = lambda *args: folds.append(1) or fold(*args)
    try:
        second = sample(put("foura-adaptive", strength=0.5), positive, negative)
        assert torch.equal(sample(one, positive, negative), first)
    finally:
        type(model).load = load
        pack("nodes.host.apply.folded_cache")._fold = fold
    assert not loads and not folds
    assert weights.keys() == {id(p) for p in model.model.parameters()}
    assert differs(second, first) and differs(second)
    assert_base_untouched()


def strength_zero_is_off():
    for name, mode in (("foura-adaptive", "live"), ("spectral-a", "merged")):
        off = put(name, mode=mode, strength=0.0)
        assert torch.equal(sample(off, positive, negative), BASE)
    off = applying.apply(ADAPTIVE.scaled(0.0), model, None, 1.0, 1.0)
    assert off.mode == "off" and "off" in off.report
    window = ADAPTIVE.with_schedule(schedule.Schedule(((0.0, 0.0), (1.0, 0.0))))
    assert torch.equal(sample(put("", given=window), positive, negative), BASE)


def the_hosts_own_lora_around_ours():
    up = _lora_file()
    before = put("spectral-a", put("foura-adaptive", comfy.sd.load_lora_for_models(model, None, up, 1, 0)[0]))
    after = comfy.sd.load_lora_for_models(put("foura-adaptive", put("spectral-a")), None, up, 1, 0)[0]
    plain = comfy.sd.load_lora_for_models(model, None, up, 1, 0)[0]
    one, two, three = (sample(m, positive, negative) for m in (before, after, plain))
    assert (one - two).abs().max() <= 1e-4 * one.abs().max(), (one - two).abs().max()
    assert differs(one, three) and differs(three)
    assert_base_untouched()


def the_hosts_bypass_lora_around_ours():
    load = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if load is None:
        return
    up = _lora_file()
    before = put("foura-adaptive", load(model, None, up, 1, 0)[0])
    after = load(put("foura-adaptive"), None, up, 1, 0)[0]
    one, two = sample(before, positive, negative), sample(after, positive, negative)
    assert (one - two).abs().max() <= 1e-4 * one.abs().max(), (one - two).abs().max()
    assert differs(one, sample(put("foura-adaptive"), positive, negative))
    management.unload_all_models()
    assert torch.equal(sample(model, positive, negative), BASE)


def _lora_file():
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for key, weight in model.model.diffusion_model.state_dict().items():
        if key.endswith(("to_q.weight", "to_v.weight")):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_up.weight"] = 0.1 * torch.randn(weight.shape[0], 2, generator=generator)
            tensors[f"{name}.lora_down.weight"] = 0.1 * torch.randn(2, weight.shape[1], generator=generator)
    return tensors


def torch_compile_around_it():
    """One transformer block (the whole model takes minutes), before and after ours, and by inductor."""
    expected = predictions(put("foura-adaptive", put("spectral-a")))
    for order, backend in (("last", "eager"), ("first", "eager"), ("last", "inductor")):
        torch._dynamo.reset()
        if order == "last":
            compiled = with_compile(put("foura-adaptive", put("spectral-a")), backend)
        else:
            compiled = put("foura-adaptive", with_compile(put("spectral-a"), backend))
        stats = torch._dynamo.utils.counters["stats"]
        stats.clear()
        found = predictions(compiled)
        graphs = stats["unique_graphs"]
        again = predictions(compiled)
        assert graphs > 0 and stats["unique_graphs"] == graphs, f"compiled {dict(stats)}, first {graphs}"
        for one, two, three in zip(expected, found, again, strict=True):
            assert (one - two).abs().max() <= 1e-4 * one.abs().max(), (order, backend)
            assert torch.equal(two, three)
        assert_base_untouched()


def predictions(patcher):
    """At two noise levels, in two runs."""
    x = 5 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return [predict(patcher, x, torch.tensor([sigma]), positive[0][0])[2] for sigma in (6.0, 2.0)]


BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"


def with_compile(patcher, backend, keys=(BLOCK,)):
    patched = patcher.clone()
    set_torch_compile_wrapper(model=patched, backend=backend, keys=list(keys))
    return patched


def text_encoder_adapters():
    tokens = clip.tokenize("a large red star")
    base = clip.encode_from_tokens(tokens)
    one = applying.apply(ADAPTERS["text-adaptive"], None, clip, 1.0, 1.0).clip
    two = applying.apply(ADAPTERS["text-lora"], None, one, 1.0, 0.5).clip
    turned = applying.apply(ADAPTERS["text-lora"], None, clip, 1.0, 0.5, "live").clip
    turned = applying.apply(ADAPTERS["text-adaptive"], None, turned, 1.0, 1.0).clip
    all_live = applying.apply(ADAPTERS["text-lora"], None, one, 1.0, 0.5, "live").clip
    first = one.encode_from_tokens(tokens)
    assert differs(first, base)
    both = two.encode_from_tokens(tokens)
    assert differs(both, first)
    assert torch.equal(clip.encode_from_tokens(tokens), base)
    assert torch.equal(one.encode_from_tokens(tokens), first)
    assert torch.equal(all_live.encode_from_tokens(tokens), turned.encode_from_tokens(tokens))
    assert (turned.encode_from_tokens(tokens) - both).abs().max() <= 1e-4 * both.abs().max()
    assert torch.equal(clip.encode_from_tokens(tokens), base)
    assert leftovers(clip.cond_stage_model) == []
    off = applying.apply(ADAPTERS["text-adaptive"], None, clip, 1.0, 0.0).clip
    assert torch.equal(off.encode_from_tokens(tokens), base)


def guided_rows_gate_themselves():
    """Both conditions in one batch give what each gives alone."""
    adapted = put("foura-adaptive")
    x = 5 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    context = torch.cat([positive[0][0], 3 * negative[0][0]])
    sigma = torch.tensor([3.0, 3.0])
    both = predict(adapted, x, sigma, context)[2]
    for row in range(2):
        alone = predict(adapted, x[row : row + 1], sigma[:1], context[row : row + 1])[2]
        assert (alone - both[row : row + 1]).abs().max() <= 1e-4 * both.abs().max()


def progress_for_every_kind_of_noise():
    kinds = [
        model_sampling.ModelSamplingDiscrete,
        model_sampling.ModelSamplingDiscreteFlow,
        model_sampling.ModelSamplingFlux,
        model_sampling.ModelSamplingContinuousEDM,
    ]
    for kind in kinds:
        levels = kind()
        for percent in (0.0, 0.001, 0.2, 0.25, 0.5, 0.75, 0.999, 1.0):
            sigma = torch.tensor([float(levels.percent_to_sigma(percent))])
            found = noise.progress_of(levels, sigma)
            assert abs(found - percent) <= 1e-4, (kind.__name__, percent, found)
    rows = noise.progress_of(levels, torch.tensor([levels.percent_to_sigma(p) for p in (0.2, 0.8)]))
    assert torch.allclose(rows, torch.tensor([0.2, 0.8]), atol=1e-4)


def records_of_the_last_run():
    adapted = put("foura-adaptive")
    sample(adapted, positive, negative, steps=4)
    first = records.of(ADAPTIVE).summary()
    assert set(first["layers"]) == set(ADAPTIVE.layers)
    assert set(first["passes"]) == {8}, first["passes"]  # four steps, two rows
    assert any(
        0 < mean < rank for mean, rank in zip(first["mean_effective_rank"], first["ranks"], strict=True)
    )
    assert all(value is None for value in first["effective_rank"][0][3:4])  # no step of four is in 0.3 to 0.4
    sample(put("foura-adaptive", strength=0.3), positive, negative, steps=2)
    assert set(records.of(ADAPTIVE.scaled(2.0)).summary()["passes"]) == {4}
    assert records.of(ADAPTERS["spectral-a"]) is None


def warnings_and_reports():
    once = applying.apply(ADAPTIVE, model, clip, 1.0, 1.0)
    assert "WARNING" not in once.report and "CLIP: the adapter has no layers for it" in once.report
    twice = applying.apply(ADAPTIVE.scaled(0.5), once.model, clip, 1.0, 1.0)
    assert "WARNING" in twice.report and "adaptive gates" in twice.report
    text = applying.apply(ADAPTERS["text-lora"], model, None, 1.0, 1.0)
    assert text.model is model and "not connected" in text.report


def refusals():
    for adapter_, mode, words in (
        (ADAPTIVE, "merged", ("freeze", "gate", "unet.")),
        (ADAPTERS["lora"].with_schedule(schedule.Schedule.window(0, 0.5)), "merged", ("schedule", "live")),
        (_renamed(ADAPTERS["lora"], "unet.down_blocks.7.attn{}.to_q"), "auto", ("none of its", "MODEL")),
        (_reshaped(ADAPTERS["lora"]), "auto", ("expected", "found", "unet.", "another base")),
    ):
        try:
            applying.apply(adapter_, model, clip, 1.0, 1.0, mode)
        except errors.SpectralAdapterError as error:
            assert all(word in str(error) for word in words), str(error)
        else:
            raise AssertionError(f"not refused: {words}")
    some = _with_a_stranger(ADAPTERS["lora"])
    report = applying.apply(some, model, clip, 1.0, 1.0).report
    assert "unet.down_blocks.7.attn1.to_q" in report and "1 layers have no place" in report, report


def _changed(adapter_, layers):
    from dataclasses import replace

    return replace(adapter_, layers=layers)


def _renamed(adapter_, name):
    return _changed(adapter_, {name.format(i): layer for i, layer in enumerate(adapter_.layers.values())})


def _with_a_stranger(adapter_):
    layer = next(iter(adapter_.layers.values()))
    return _changed(adapter_, {**adapter_.layers, "unet.down_blocks.7.attn1.to_q": layer})


def _reshaped(adapter_):
    from dataclasses import replace

    def wider(layer):
        return replace(layer, shape=replace(layer.shape, in_features=layer.shape.in_features + 1))

    return _changed(adapter_, {name: wider(layer) for name, layer in adapter_.layers.items()})


def memory_is_announced_and_given_back():
    asked, free = [], compat.free_memory
    compat.free_memory = lambda needed, device: asked.append((needed, device))
    try:
        adapted = put("foura-adaptive")
        sample(adapted, positive, negative)
    finally:
        compat.free_memory = free
    factors = sum(
        layer.terms[0].config.rank * (layer.shape.in_features + layer.shape.out_features)
        for layer in ADAPTIVE.layers.values()
    )
    assert len(asked) == 1 and 4 * factors <= asked[0][0] <= 4 * 1.3 * factors, (asked, 4 * factors)
    stack = live.stack_of(adapted)
    assert not any(piece._cache for layers in stack._pieces for layer in layers for piece in layer)


CHECKS = [
    chain_of_three,
    two_samplers_with_different_adapters,
    unload_and_reload,
    an_exception_inside_the_model,
    an_interrupt_at_any_step,
    a_new_strength_reloads_nothing,
    strength_zero_is_off,
    the_hosts_own_lora_around_ours,
    the_hosts_bypass_lora_around_ours,
    torch_compile_around_it,
    text_encoder_adapters,
    guided_rows_gate_themselves,
    progress_for_every_kind_of_noise,
    records_of_the_last_run,
    warnings_and_reports,
    refusals,
    memory_is_announced_and_given_back,
]
