"""Inside a host: the node Train Adapter on the demo model, in inference mode as the executor has it.

Finds ``input/concept`` (pictures with captions) and writes ``report.json``.
"""

import json
import sys

import comfy.model_management as management
import torch
from inside_apply_lib import FOLDER, condition, interrupted, pack, run_checks, sample
from inside_train_families import FAMILY_CHECKS
from inside_train_lib import RUNS, SAVED, Untouched, at_step, call, refused, train
from inside_train_models import MODEL_CHECKS
from inside_train_text import TEXT_CHECKS

demo = pack("nodes.host.demo.model")
applying = pack("nodes.host.apply.adapters")
fileformat = pack("spectral_core.files.adapter_file")
paths = pack("nodes.host.files.paths")
identity = pack("nodes.host.training.identity")
with torch.inference_mode():
    MODEL, CLIP, VAE = demo.load()
    BASE = Untouched(MODEL)
FOLDER_RUN = {"images": "concept", "vae": VAE, "clip": CLIP, "trigger_word": "<house>"}


def pixels(index):
    import numpy as np
    from PIL import Image

    found = sorted((FOLDER / "input/concept").glob("*.png"))[index]
    return torch.from_numpy(np.asarray(Image.open(found).convert("RGB"), dtype=np.float32) / 255)[None]


def latent(*indices):
    return {"samples": torch.cat([VAE.encode(pixels(i)) for i in indices])}


def text(words):
    return CLIP.encode_from_tokens_scheduled(CLIP.tokenize(words))


def denoising_error(patcher, words):
    """Mean square of the host's own estimate against the pictures, at fixed noise."""
    x0 = patcher.model.process_latent_in(latent(0, 1, 2)["samples"])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    seen = []

    def look(executor, x, t, *args, **kwargs):
        answer = executor(x, t, *args, **kwargs)
        seen.append(answer)
        return answer

    import comfy.patcher_extension as extension
    import comfy.sample
    import comfy.samplers

    watched = patcher.clone()
    watched.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "look", look)
    total = 0.0
    for sigma in (0.5, 1.0, 3.0):
        comfy.sample.sample_custom(
            watched, noise, 1.0, comfy.samplers.sampler_object("euler"), torch.tensor([sigma, sigma / 2]),
            words, words, latent(0, 1, 2)["samples"], disable_pbar=True, seed=1,
        )  # fmt: skip
        total += float((seen[-1][:3] - x0).square().mean())
    return total


def a_folder_is_learned_and_used_at_once():
    words = text("a <house> on a blue background")
    before = denoising_error(MODEL, words)
    adapter, curve, report = train(
        MODEL, run_name="house", method="foura", targets="attention", steps=12, learning_rate=0.01,
        **FOLDER_RUN,
    )  # fmt: skip
    print(report)
    applied = applying.apply(adapter, MODEL, None, 1.0, 1.0).model
    after = denoising_error(applied, words)
    print(f"  error {before:.4f} to {after:.4f}")
    assert after < 0.98 * before
    assert not torch.equal(sample(applied, condition(), steps=2), BASE.picture)
    assert curve.shape[0] == 1 and curve.shape[3] == 3 and "12 steps" in report
    assert "house.safetensors" in paths.listing() and not any("start" in n for n in paths.listing())
    saved = fileformat.load(SAVED / "house.safetensors")
    assert saved.content_hash == adapter.content_hash
    assert all(name.startswith("unet.down_blocks") for name in list(saved.layers)[:3])
    assert saved.provenance.family == "mini" and saved.provenance.trigger_words == ("<house>",)
    BASE.check()


def the_same_again_returns_the_file_and_other_settings_begin_a_second_run():
    first = train(MODEL, run_name="twice", method="lora", steps=2, **FOLDER_RUN)
    undo = at_step(1, lambda: (_ for _ in ()).throw(AssertionError("trained again")))
    try:
        other_model, other_clip, other_vae = demo.load()  # as after a restart
        given = {**FOLDER_RUN, "vae": other_vae, "clip": other_clip}
        again = call(other_model, run_name="twice", method="lora", steps=2, **given)
    finally:
        undo()
    assert "nothing was trained" in again[2] and again[0].content_hash == first[0].content_hash
    assert torch.equal(again[1], first[1])
    other = train(MODEL, run_name="twice", method="lora", steps=2, ema=0.5, **FOLDER_RUN)
    assert "run twice-2" in other[2] and (SAVED / "twice-2.safetensors").is_file()
    BASE.check()


def more_steps_alone_extend_a_run():
    first = train(MODEL, run_name="longer", method="lora", steps=2, **FOLDER_RUN)
    more = train(MODEL, run_name="longer", method="lora", steps=5, **FOLDER_RUN)
    assert "resumed at step 2" in more[2] and "run longer:" in more[2], more[2]
    assert more[0].content_hash != first[0].content_hash and not (SAVED / "longer-2.safetensors").exists()
    again = call(MODEL, run_name="longer", method="lora", steps=5, **FOLDER_RUN)
    assert "nothing was trained" in again[2] and again[0].content_hash == more[0].content_hash
    undo = at_step(3, management.interrupt_current_processing)
    try:
        with interrupted():
            train(MODEL, run_name="cut longer", method="lora", steps=6, **FOLDER_RUN)
    finally:
        undo()
    cut = train(MODEL, run_name="cut longer", method="lora", steps=8, **FOLDER_RUN)[2]
    assert "run cut longer: 8 steps" in cut and "resumed at step" in cut, cut
    BASE.check()


def what_is_left_open_follows_the_model():
    """Size and rate of the demo model; and what does not suit it is said."""
    given = {**FOLDER_RUN, "method": "lora"}
    open_ones = {"resolution": 0, "learning_rate": 0.0}
    _, _, report = train(MODEL, run_name="open", steps=20, **{**given, **open_ones})
    run = json.loads((RUNS / "open/run.json").read_text())
    assert run["config"]["learning_rate"] == 3e-3 and run["job"]["resolution"] == 128
    assert "moves next to nothing" not in report and "the model's own is" not in report
    wrong = {"resolution": 512, "learning_rate": 1e-5, "steps": 2, "batch_size": 1}
    report = train(MODEL, run_name="wrong", **{**given, **wrong})[2]
    assert "resolution 512: the model's own is 128" in report and "moves next to nothing" in report, report
    BASE.check()


def the_same_seed_begins_alike_in_every_process():
    """The host's own map of names comes in an order that depends on the process."""
    layers, compat = pack("nodes.host.training.layers"), pack("nodes.host.model.compat")
    before, own = list(layers.chosen(MODEL, "all")[0]), compat.model_keys
    compat.model_keys = lambda patcher: dict(reversed(own(patcher).items()))
    try:
        assert list(layers.chosen(MODEL, "all")[0]) == before
    finally:
        compat.model_keys = own


def what_a_model_carries_tells_runs_apart():
    """Patches of another node, a live adapter and its strength, another sampling: by content, so that what is
    equal after a restart is found."""

    def patched(number, strength=0.5):
        model = MODEL.clone()
        key = next(name for name in model.model.state_dict() if name.endswith("attn1.to_q.weight"))
        weight = torch.full_like(model.model.state_dict()[key], number)
        model.add_patches({key: ("diff", (weight,))}, strength)
        return model

    def resampled(shift):
        import comfy_extras.nodes_model_advanced as advanced

        return advanced.ModelSamplingDiscrete().patch(MODEL, "v_prediction", shift)[0]

    adapter = fileformat.load(SAVED / "house.safetensors")
    live = [applying.apply(adapter, MODEL, None, strength, 1.0).model for strength in (1.0, 1.0, 0.5)]
    seen = [identity.digest_of_patches(m) for m in (MODEL, patched(1.0), patched(2.0), patched(1.0, 0.7))]
    seen += [identity.digest_of_patches(m) for m in (live[0], live[2], resampled(False), resampled(True))]
    assert seen[0] == "" and len(set(seen)) == len(seen), seen
    assert identity.digest_of_patches(patched(1.0)) == seen[1]
    assert identity.digest_of_patches(live[1]) == seen[4]
    assert identity.patches_of(MODEL, None) == identity.patches_of(MODEL, CLIP) == {}
    assert identity.patches_of(live[0], CLIP) == {"model": seen[4]}
    given = {"method": "lora", "steps": 1, **FOLDER_RUN, "images": "one"}
    train(MODEL, run_name="carried", **given)
    report = call(live[0], run_name="carried", **given)[2]
    assert "run carried-2" in report
    again = call(live[1], run_name="carried", **given)[2]
    assert "run carried-2" in again and "nothing was trained" in again
    management.unload_all_models()
    BASE.check()


def lists_of_latents_and_conditionings():
    words = [text("<house>"), text("a house")]
    adapter, _, report = train(
        MODEL, run_name="lists", method="spectral_a", latents=[latent(0), latent(1)], conditioning=words,
        steps=2, columns="",
    )  # fmt: skip
    assert "no captions are dropped" in report
    columns = {t.config.columns for layer in adapter.layers.values() for t in layer.terms}
    assert columns == {(0, 1, 2, 3)}
    batch = {"samples": torch.cat([latent(0)["samples"], latent(1)["samples"]])}
    second, _, report = train(
        MODEL, run_name="batch", method="spectral_r", latents=batch, conditioning=[text("<house>")], steps=2,
        clip=CLIP,
    )  # fmt: skip
    columns = {t.config.columns for layer in second.layers.values() for t in layer.terms}
    assert columns == {(4, 5, 6, 7)}, columns  # the lowest that the first one has left
    third, _, report = train(
        MODEL, run_name="on", latents=batch, conditioning=[text("<house>")], steps=2, adapter=adapter
    )
    assert third.methods == ("spectral_a",) and third.content_hash != adapter.content_hash
    assert "those of the connected adapter" in report
    BASE.check()


def prior_pictures_keep_the_model_drawing_them():
    """Pictures under words that the run teaches something else: as the prior they are kept; beside latents,
    beside a folder, and with a new word."""
    words = text("a plain house")
    given = {"method": "foura", "targets": "attention", "steps": 10, "vae": VAE, "clip": CLIP}
    changed = {"samples": -2.0 * latent(0)["samples"]}
    other = {"latents": [changed], "conditioning": [words]}

    def error(run_name, **more):
        adapter = train(MODEL, run_name=run_name, **given, **more)[0]
        assert adapter.provenance.training["images"] == 1
        return denoising_error(applying.apply(adapter, MODEL, None, 1.0, 1.0).model, words)

    without = error("spoiled", **other)
    kept = error("kept", **other, prior_images="prior")
    more = error("kept", **other, prior_images="prior", prior_weight=2.0)
    print(f"  error {without:.4f} without, {kept:.4f} with, {more:.4f} weighing twice")
    assert max(kept, more) < 0.95 * without and kept != more
    assert (SAVED / "kept-2.safetensors").is_file(), "another weight is another run"
    again = call(MODEL, run_name="kept", **given, **other, prior_images="prior")[2]
    assert "nothing was trained" in again
    new_word = {**FOLDER_RUN, "images": "one", "init_words": "house", "prior_images": "prior"}
    adapter, _, _ = train(MODEL, run_name="kept_word", method="lora", steps=2, **new_word)
    assert set(adapter.tokens) == {"<house>"}
    bad = {"model": MODEL, "run_name": "bad", "clip": CLIP, **other}
    refused("prior_images", "vae", **bad, prior_images="prior")
    refused("nowhere", **bad, vae=VAE, prior_images="nowhere")
    BASE.check()


def a_stopped_run_goes_on_and_ends_like_one_that_was_not_stopped():
    given = {"method": "foura", "steps": 6, "schedule": "cosine", **FOLDER_RUN}
    whole = train(MODEL, run_name="whole", **given)[0]
    undo = at_step(4, management.interrupt_current_processing)
    try:
        with interrupted():
            train(MODEL, run_name="stopped", **given)
    finally:
        undo()
    assert not management.processing_interrupted()
    (kept,) = (RUNS / "stopped").glob("checkpoint*")
    done = int(kept.stem[-2:])
    assert done in (3, 4), "some hosts' models stop in the midst of the step"
    assert not (SAVED / "stopped.safetensors").exists()
    BASE.check()
    adapter, _, report = train(MODEL, run_name="stopped", **given)
    assert f"resumed at step {done}" in report
    assert adapter.content_hash == whole.content_hash
    BASE.check()


def the_bars_own_interrupt_is_no_error():
    """The host raises its interrupt from the progress bar's hook."""
    import comfy.utils

    def hook(value, total, preview, **_):
        if value == 1:  # of the steps between, some hosts tell few
            raise management.InterruptProcessingException

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with interrupted():
            train(MODEL, run_name="bar", method="lora", steps=6, **FOLDER_RUN)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    kept = [p.name for p in (RUNS / "bar").glob("checkpoint*")]
    assert kept == ["checkpoint-00000001.safetensors"], kept
    BASE.check()


def errors_leave_the_model_and_a_checkpoint():
    for name, error in (("broken", RuntimeError("by the test")), ("memory", torch.cuda.OutOfMemoryError())):

        def throw(error=error):
            raise error

        # a step without memory is made again with less of the model on the device
        undo = at_step(3, throw, and_later=True)
        try:
            train(MODEL, run_name=name, method="lora", steps=6, **FOLDER_RUN)
        except type(error) as told:
            said = str(told)
        else:
            raise AssertionError("the error was lost")
        finally:
            undo()
        assert (RUNS / name / "checkpoint-00000002.safetensors").is_file()
        if name == "memory":
            assert "the checkpoint of step 2 is kept" in said and "checkpointing" in said, said
        BASE.check()


def what_cannot_work_is_said_before_the_first_step():
    undo = at_step(1, lambda: (_ for _ in ()).throw(RuntimeError("a step was made")))
    common = {"model": MODEL, "run_name": "bad", "method": "lora"}
    folder = {**common, **FOLDER_RUN}
    try:
        refused("no pictures", **{**folder, "images": "empty"})
        refused("broken", "cannot be read", **{**folder, "images": "broken"})
        refused("caption", **{**folder, "images": "uncaptioned", "trigger_word": ""})
        refused("nowhere", **{**folder, "images": "nowhere"})
        refused("..", **{**folder, "images": "../output"})
        refused("clip", **{**folder, "clip": None})
        refused("2 latents and 3", **common, latents=latent(0, 1), conditioning=[text("a")] * 3)
        refused("nothing to train on", **common)
        wrong = {"samples": torch.zeros(1, 16, 8, 8)}
        refused("16 channels", **common, latents=wrong, conditioning=[text("a")])
        refused("every layer is smaller", **{**folder, "method": "spectral_a", "rank": 2000})
        refused("steps", **{**folder, "steps": -1})
        refused("run_name", **{**folder, "run_name": "../x"})
        refused("min-snr", **{**folder, "weighting": "nonsense"})
        refused("columns", **{**folder, "method": "spectral_a", "columns": "3-1"})
    finally:
        undo()
    assert not (SAVED / "bad.safetensors").exists()
    report = train(
        MODEL,
        run_name="taken",
        method="spectral_a",
        columns="0-3",
        steps=1,
        **{**FOLDER_RUN, "images": "one"},
    )[2]
    assert "columns 0–3 are taken by" in report
    report = train(
        MODEL, run_name="odd", method="lora", learning_rate=10.0, steps=1, rank=100,
        targets="attention",
        **{**FOLDER_RUN, "images": "uncaptioned"},
    )[2]  # fmt: skip
    assert "rank 100 is above the size of" in report
    assert "learning_rate 10 is 100000 times the default of lora" in report
    assert "1 of 1 pictures have no caption file" in report
    BASE.check()


CHECKS = [
    a_folder_is_learned_and_used_at_once,
    the_same_again_returns_the_file_and_other_settings_begin_a_second_run,
    more_steps_alone_extend_a_run,
    what_is_left_open_follows_the_model,
    the_same_seed_begins_alike_in_every_process,
    what_a_model_carries_tells_runs_apart,
    lists_of_latents_and_conditionings,
    prior_pictures_keep_the_model_drawing_them,
    a_stopped_run_goes_on_and_ends_like_one_that_was_not_stopped,
    the_bars_own_interrupt_is_no_error,
    errors_leave_the_model_and_a_checkpoint,
    what_cannot_work_is_said_before_the_first_step,
]
if __name__ == "__main__":
    only = sys.argv[3:]
    checks = [*CHECKS, *MODEL_CHECKS, *TEXT_CHECKS, *FAMILY_CHECKS]
    outcome = run_checks([c for c in checks if not only or c.__name__ in only])
    (FOLDER / "report.json").write_text(json.dumps(outcome), encoding="utf-8")
    for name, text_ in outcome.items():
        print(name, text_ or "ok")
