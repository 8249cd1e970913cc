"""Inside a host: Fuse Adapters with statistics that the node collects itself, on the demo model.

Every check is a function; writes ``report.json``.
"""

import json
import sys

import comfy.model_management as management
import folder_paths
import torch
from inside_apply_lib import FOLDER, adapter, condition, interrupted, leftovers, pack, run_checks, sample

folder_paths.set_output_directory(str(FOLDER / "output"))
errors = pack("spectral_core.errors")
statistics = pack("nodes.host.fusing.statistics")
statistics_file = pack("spectral_core.statistics.file")
fuse_node = pack("nodes.fuse").FuseAdapters
WORDS = {"prompts": "a red star | a star\na blue ring", "sample_steps": 1, "sample_rounds": 1}

with torch.inference_mode():
    model, clip = pack("nodes.host.demo.model").load_model(), pack("nodes.host.demo.model").load_clip()
    SEEN = condition(1)
    BASE = sample(model, SEEN)
    WEIGHTS = {k: v.clone() for k, v in model.model.state_dict().items()}
    LORA, GATED, TEXT = (adapter(name) for name in ("lora", "gated", "text"))


def fuse(*given, method="closed-form", **more):
    values = {"model": model, "clip": clip, **WORDS, **more}
    return fuse_node().fuse(*given, method=method, **values)["result"]


def assert_base_untouched():
    assert torch.equal(sample(model, SEEN), BASE)
    assert all(torch.equal(v, WEIGHTS[k]) for k, v in model.model.state_dict().items())
    assert leftovers(model.model) == []
    assert not any(m._forward_pre_hooks for m in model.model.modules())


def every_method_with_statistics():
    """Retention is told, nothing but weights changes the result's place, and the model is as it was."""
    for method in ("closed-form", "closed-form-rank", "gradient"):
        fused, report, picture = fuse(LORA, GATED, method=method)
        assert "retention on its own inputs" in report and "3 runs of 1 steps" in report, report
        assert fused.mergeable and fused.layers.keys() == LORA.layers.keys() | GATED.layers.keys()
        assert picture.shape[3] == 3
    print(report)
    assert_base_untouched()


def statistics_are_those_of_the_core():
    """The same numbers as a collection by hand under the first concept, in the same calls."""
    comfy_sample, core = sys.modules["comfy.sample"], pack("spectral_core.statistics.collect")
    request = statistics.Request(model, clip, [("a red star",), ("a blue ring",)], [], [1, -1], None, 1)
    found = statistics.collected([LORA, GATED], request).statistics
    modules, _ = statistics._modules([LORA, GATED], request)
    applied = pack("nodes.host.apply.adapters").apply(LORA, model, clip, 1.0, 1.0)
    words = statistics.encoded(applied.clip, "a red star")
    latent = torch.zeros(1, 4, 16, 16)
    with core.collect(modules, [LORA, GATED], dtype=torch.float64) as seen:
        comfy_sample.sample(
            applied.model, comfy_sample.prepare_noise(latent, 0), 1, 4.0, "euler", "simple", words,
            statistics.encoded(clip, ""), latent, disable_pbar=True, seed=0,
        )  # fmt: skip
    for name, expected in seen.statistics().items():
        assert found[0][name].count == expected.count
        ours, theirs = found[0][name].second_moment.double(), expected.second_moment
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name
        assert ours.device.type == "cpu" and not found[0][name].second_moment.is_inference()
    deep = next(name for name in found[0] if "up_blocks" in name)
    one, two = (statistics_.second_moment for statistics_ in (found[0][deep], found[1][deep]))
    assert (one - two).norm() > 1e-3 * one.norm()  # the other concept has seen something else


def the_fused_concepts_keep_more_than_their_average():
    kept = {}
    for method in ("average", "closed-form"):
        given = [a.with_provenance(name=n) for a, n in ((LORA, "one"), (GATED, "two"))]
        looked = statistics.collected(
            given, statistics.Request(model, clip, [("a red star",), ("a blue ring",)], [], [1, 1], None, 1)
        ).statistics
        with torch.inference_mode(False), torch.no_grad():
            report = pack("spectral_core.fusion").fuse(given, method, statistics=looked).report
        kept[method] = [concept.retention for concept in report.concepts]
    print(kept)
    assert all(a < b for a, b in zip(*kept.values(), strict=True)), kept


def other_weights_sample_nothing():
    calls = []
    own = statistics._collect
    statistics._collect = lambda a, r, u=None: ((u or calls.append(1)) and None) or own(a, r, u)
    try:
        before = fuse(LORA, GATED, sample_seed=7)[0]
        again, report, _ = fuse(LORA, GATED, sample_seed=7, weight_1=0.5, target_rank=2)
        assert len(calls) == 1 and "nothing was drawn again" in report, (calls, report)
        assert again.content_hash != before.content_hash
        fuse(LORA, GATED, sample_seed=7, weight_1=-1.0)  # its concept drawn the other way round
        fuse(LORA, GATED, sample_seed=8)
        fuse(LORA.scaled(0.5), GATED, sample_seed=8)
        fuse(LORA, GATED, sample_seed=8, prompts="a red star\na green ring")
        changed = model.clone()
        changed.add_patches({}, 1.0)
        fuse(LORA, GATED, sample_seed=8, model=changed)
        assert len(calls) == 5, calls
    finally:
        statistics._collect = own


def later_rounds_look_at_what_was_fused():
    """Drawn with the fused adapter and never kept; the first look is."""
    under = []
    own = statistics._collect
    statistics._collect = lambda a, r, u=None: under.append(u) or own(a, r, u)
    try:
        once, report, _ = fuse(LORA, GATED, sample_seed=21, sample_rounds=1)
        assert "under what was fused" not in report
        twice, report, _ = fuse(LORA, GATED, sample_seed=21, sample_rounds=2)
        assert "statistics under what was fused: 3 runs of 1 steps" in report, report
        assert [u and u.content_hash for u in under] == [None, None, once.content_hash], under
        assert twice.content_hash != once.content_hash
        fuse(LORA, GATED, sample_seed=21, sample_rounds=3)
        assert len(under) == 5 and under[3].content_hash == once.content_hash
        assert under[4].content_hash == twice.content_hash
    finally:
        statistics._collect = own
    assert_base_untouched()


def conditioning_instead_of_clip():
    words = [*condition(1), *condition(2)]
    _, report, _ = fuse(LORA, GATED, clip=None, prompts="", conditioning=words)
    assert "2 runs of 1 steps" in report, report
    latent = {"samples": torch.zeros(1, 4, 8, 24)}
    _, report, _ = fuse(LORA, GATED, clip=None, prompts="", conditioning=words, latent=latent)
    assert "8 × 24 latent cells" in report
    refused("2 adapters", conditioning=condition(1), clip=None)


def text_encoder_layers_are_watched():
    text, _, _ = fuse(TEXT, LORA)
    first = next(iter(TEXT.layers))
    assert text.layers[first].terms[0].params["down"].shape[0] == TEXT.layers[first].factors().rank
    request = statistics.Request(model, clip, [("a star",), ("a ring",)], [], [1, 1], None, 1)
    found = statistics.collected([TEXT, LORA], request).statistics
    assert found[0][first].count == 77, found[0][first].count  # the prompt, and not the empty one


def a_weight_of_zero_is_left_out():
    fused, report, _ = fuse(LORA, GATED, weight_2=0.0)
    assert "2 runs of 1 steps" in report
    assert fused.layers.keys() == LORA.layers.keys()


def files_are_written_when_asked():
    assert not (FOLDER / "output/spectral_statistics").exists()
    _, report, _ = fuse(LORA, GATED, save_statistics="mine")
    files = sorted((FOLDER / "output/spectral_statistics").iterdir())
    assert [f.name for f in files] == ["mine_00001_.safetensors", "mine_00002_.safetensors"], files
    assert files[0].name in report
    assert statistics_file.load(files[0]).keys() == LORA.layers.keys() | GATED.layers.keys()


def refused(*parts, **more):
    try:
        fuse(LORA, GATED, **more)
    except errors.SpectralAdapterError as error:
        print("  refused:", error)
        assert all(part in str(error) for part in parts), str(error)
        return
    raise AssertionError(f"not refused: {more}")


def what_is_missing_is_named():
    refused("connect a MODEL to 'model'", "average", model=None)
    refused("the CLIP to 'clip'", clip=None)
    refused("names no trigger word", "line 1", prompts="")
    refused("3 lines of prompts for 2 adapters", prompts="a\nb\nc")


def an_interrupt_and_an_exception():
    """Neither hooks nor patches are left, and nothing half seen is kept."""
    for kind in (management.InterruptProcessingException, RuntimeError):

        def fail(*_, kind=kind):
            raise kind()

        hook = model.model.diffusion_model.middle_block[1].register_forward_hook(fail)
        try:
            fuse(LORA, GATED, sample_seed=99)
        except kind:
            pass
        else:
            raise AssertionError(f"{kind} was lost")
        finally:
            hook.remove()
        assert_base_untouched()
    _, report, _ = fuse(LORA, GATED, sample_seed=99)
    assert "nothing was drawn again" not in report


def the_stop_button_works_between_two_runs():
    management.interrupt_current_processing()
    with interrupted():
        fuse(LORA, GATED, sample_seed=98)
    assert not management.processing_interrupted()
    assert_base_untouched()


CHECKS = [
    every_method_with_statistics,
    statistics_are_those_of_the_core,
    the_fused_concepts_keep_more_than_their_average,
    other_weights_sample_nothing,
    later_rounds_look_at_what_was_fused,
    conditioning_instead_of_clip,
    text_encoder_layers_are_watched,
    a_weight_of_zero_is_left_out,
    files_are_written_when_asked,
    what_is_missing_is_named,
    an_interrupt_and_an_exception,
    the_stop_button_works_between_two_runs,
]

if __name__ == "__main__":
    (FOLDER / "report.json").write_text(json.dumps(run_checks(CHECKS)), encoding="utf-8")
