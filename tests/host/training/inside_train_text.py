"""Inside a host: Train Adapter with text encoders, new words, samples; what it leaves in memory."""

import gc

import comfy.model_management as management
import torch
from inside_apply_lib import condition, interrupted, leftovers, pack, sample
from inside_train_lib import RUNS, SAVED, Untouched, at_step, call, refused, train

demo = pack("nodes.host.demo.model")
applying = pack("nodes.host.apply.adapters")
fileformat = pack("spectral_core.files.adapter_file")
progress = pack("nodes.host.training.progress")
with torch.inference_mode():
    MODEL, CLIP, VAE = demo.load()
WORD = "<house>"
FOLDER_RUN = {"images": "concept", "vae": VAE, "clip": CLIP, "trigger_word": WORD, "steps": 4}
TEXT = {**FOLDER_RUN, "init_words": "star", "text_targets": "attention", "method": "foura"}


def text_numbers():
    """The CLIP's weights, without those whose memory the host leaves as it finds it."""
    state = CLIP.cond_stage_model.state_dict()
    return {k: v.detach().clone() for k, v in state.items() if "logit_scale" not in k}


def states(clip, words):
    return clip.encode_from_tokens(clip.tokenize(words))


def differ(one, two):
    return any(not torch.equal(value, two[name]) for name, value in one.items())


def a_new_word_and_text_layers_are_learned_and_used_at_once():
    before, text, base = Untouched(MODEL), text_numbers(), states(CLIP, "a house")
    flags = [p.requires_grad for p in CLIP.cond_stage_model.parameters()]
    adapter = train(MODEL, run_name="words", **TEXT)[0]
    assert {name.split(".")[0] for name in adapter.layers} == {"unet", "text_encoder"}
    assert set(adapter.tokens) == {WORD} and adapter.tokens[WORD]["text_encoder"].shape[0] == 1
    start = fileformat.load(RUNS / "words/start.safetensors").layers
    moved = [n for n, v in adapter.layers.items() if differ(v.terms[0].params, start[n].terms[0].params)]
    assert {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}, moved
    star = CLIP.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    (known,) = CLIP.tokenizer.clip_l.tokenizer("star")["input_ids"][1:-1]
    row = adapter.tokens[WORD]["text_encoder"][0]
    first = pack("nodes.host.training.text").initial_rows(CLIP, WORD, "star")["text_encoder"][0]
    assert torch.equal(first, star[known].float()) and not torch.equal(row, first)
    applied = applying.apply(adapter, MODEL, CLIP, 1.0, 1.0)
    assert "new words <house>" in applied.report, applied.report
    assert not torch.equal(states(applied.clip, "a <house>"), states(CLIP, "a <house>"))
    saved = fileformat.load(SAVED / "words.safetensors")
    assert saved.content_hash == adapter.content_hash and set(saved.tokens) == {WORD}
    before.check()
    after = text_numbers()
    assert all(torch.equal(after[k], v) for k, v in text.items())
    assert torch.equal(states(CLIP, "a house"), base)
    assert not leftovers(CLIP.cond_stage_model)
    assert [p.requires_grad for p in CLIP.cond_stage_model.parameters()] == flags


def its_gradients_are_those_of_the_trainers_own_text_path():
    """The states that the trainer computes are those of the host's node, and the loss falls with the rows."""
    training_model, training_text = pack("nodes.host.training.model"), pack("nodes.host.training.text")
    rows = training_text.initial_rows(CLIP, WORD, "red star")
    expected = states(CLIP, "a house (on a blue):1.2 background")
    with (
        training_model.ready(MODEL, "auto", (1, 4, 16, 16)) as ready,
        training_text.ready(CLIP, {WORD: rows}, ready.patcher) as text,
    ):
        with torch.no_grad():
            found, options = text.encode("a house (on a blue):1.2 background")
        assert torch.equal(found, expected) and set(options) == {"pooled_output"}
        (row,) = text.parameters
        found, _ = text.encode(f"a {WORD} on a star")
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        (found * weight).sum().backward()
        step = 1e-3 * row.grad / row.grad.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                row += sign * step
                values.append(float((text.encode(f"a {WORD} on a star")[0] * weight).sum()))
                row -= sign * step
        slope = (values[0] - values[1]) / 2
        assert abs(slope - float((row.grad * step).sum())) < 0.02 * abs(slope), (slope, row.grad.norm())


def words_stopped_and_resumed_end_like_uninterrupted():
    whole = train(MODEL, run_name="words whole", **TEXT)[0]
    undo = at_step(3, management.interrupt_current_processing)
    try:
        with interrupted():
            train(MODEL, run_name="words halves", **TEXT)
    finally:
        undo()
    assert not leftovers(CLIP.cond_stage_model)
    adapter, _, report = train(MODEL, run_name="words halves", **TEXT)
    assert "resumed at step" in report
    assert adapter.content_hash == whole.content_hash


def samples_change_nothing_but_the_picture_shown():
    shown = []
    own = progress.comfy.utils.ProgressBar.update_absolute

    def watch(self, value, total=None, preview=None):
        shown.append(preview)
        return own(self, value, total, preview)

    plain = train(MODEL, run_name="plain", method="foura", **FOLDER_RUN)[0]
    progress.comfy.utils.ProgressBar.update_absolute = watch
    try:
        given = {"method": "foura", "sample_every": 2, **FOLDER_RUN}
        drawn = train(MODEL, run_name="drawn", sample_prompt="a <TOK> on a red background", **given)[0]
    finally:
        progress.comfy.utils.ProgressBar.update_absolute = own
    assert drawn.content_hash == plain.content_hash
    names = sorted(p.name for p in (RUNS / "drawn/samples").iterdir())
    assert names == ["step-00000002-0.png", "step-00000004-0.png"], names
    from PIL import Image

    first, second = (Image.open(RUNS / "drawn/samples" / name) for name in names)
    assert first.size == (128, 128) and first.tobytes() != second.tobytes()
    assert shown and not any(shown), "curve and samples stand on the node's panel, and nowhere a second time"
    latents = {"samples": torch.randn(2, 4, 16, 16)}
    train(  # without VAE and CLIP: the colours of the latents
        MODEL, run_name="rough", method="lora", latents=latents, conditioning=[condition()], steps=1,
        sample_every=1, sample_prompt="not shown",
    )  # fmt: skip
    rough = Image.open(RUNS / "rough/samples/step-00000001-0.png")
    assert min(rough.size) >= 200 and len(set(rough.getdata())) > 100


def the_sampler_is_the_hosts():
    """The same latents as the host's own Euler sampler with the same noise and guidance."""
    training_model, samples = pack("nodes.host.training.model"), pack("nodes.host.training.samples")
    words, empty = condition(seed=5), condition(seed=6)
    expected = sample(MODEL, words, empty, steps=samples.MOST_STEPS, cfg=4.0, seed=7)
    shape = (4, 16, 16)
    with training_model.ready(MODEL, "auto", (1, *shape)) as ready, torch.no_grad():
        given = training_model.Conditions(ready.patcher, {0: words[0], None: empty[0]}, [torch.zeros(shape)])
        denoiser = training_model.Denoiser(ready, given)
        drawn = samples.Sampler(denoiser, [], shape, 7, 0, True, None, lambda: False).latents()
        found = MODEL.get_model_object("latent_format").process_out(drawn)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def alive():
    """Bytes and count of all tensors alive, each piece of memory once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def nothing_stays_in_memory():
    """After a run, after a stopped one and after an error: the same tensors as before, but for the result."""
    given = {**TEXT, "sample_every": 2}
    call(MODEL, run_name="warm", **given)  # what the host and the libraries keep from the first time on
    runs = {"finished": None, "stopped": management.interrupt_current_processing, "failed": fail}
    for name, trouble in runs.items():
        before = alive()
        undo = at_step(3, trouble) if trouble else lambda: None
        try:
            call(MODEL, run_name=f"memory {name}", **given)
        except (management.InterruptProcessingException, RuntimeError):
            assert trouble is not None
        finally:
            undo()
        after = alive()
        left = {at: size for at, size in after.items() if at not in before}
        # the model is unloaded: its weights may lie elsewhere, but there are not more of them
        more = sum(after.values()) - sum(before.values())
        print(
            f"  {name}: {len(after) - len(before)} more tensors, {more} bytes of {sum(before.values())}",
            len(left),
        )
        assert len(after) <= len(before) + 8 and more < 20_000, (name, more)


def fail():
    raise RuntimeError("by the test")


def two_text_encoders():
    """SDXL's kind: both learn, each with its own rows; both of the host's encoders train."""

    training_text = pack("nodes.host.training.text")
    clip = tiny_sdxl_clip()
    before = {k: v.detach().clone() for k, v in clip.cond_stage_model.state_dict().items()}
    shapes = training_text.choose(clip, "*layers.0.self_attn.q_proj")
    assert {name.split(".")[0] for name in shapes} == {"text_encoder", "text_encoder_2"}, shapes
    rows = training_text.initial_rows(clip, WORD, "red star")
    assert {part: tuple(row.shape) for part, row in rows.items()} == {
        "text_encoder": (1, 768), "text_encoder_2": (1, 1280)
    }  # fmt: skip
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        training_text.ready(clip, {WORD: rows}, MODEL) as text,
    ):
        states_, options = text.encode(f"a {WORD}")
        assert states_.shape == (1, 77, 2048)
        (states_.square().sum() + options["pooled_output"].square().sum()).backward()
        assert all(bool((p.grad != 0).any()) for p in text.parameters)
    after = clip.cond_stage_model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if "logit_scale" not in k)
    assert not leftovers(clip.cond_stage_model)


def tiny_sdxl_clip():
    """The host's SDXL text encoders with three layers each."""
    import comfy.sdxl_clip
    import comfy.supported_models_base

    cut = {"num_hidden_layers": 3}
    options = {"clip_l_model_config": cut, "clip_g_model_config": cut, "dtype": torch.float32}
    target = comfy.supported_models_base.ClipTarget(
        comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel
    )
    clip = comfy.sd.CLIP(target, model_options={**options, "initial_device": torch.device("cpu")})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in clip.cond_stage_model.named_parameters():
            if value.dim() > 1:
                value.normal_(0, 0.02, generator=draw)
            else:
                value.fill_(float(name.endswith("weight")))
    return clip


def what_text_cannot_do_is_said_first():
    undo = at_step(1, lambda: (_ for _ in ()).throw(RuntimeError("a step was made")))
    try:
        folder = {"model": MODEL, "run_name": "bad words", **TEXT}
        refused("captions of a folder", **{**folder, "images": "none"})
        refused("without spaces", **{**folder, "trigger_word": "two words"})
        refused("that this CLIP knows", **{**folder, "trigger_word": "star"})
        refused("no layer matches", **{**folder, "text_targets": "nothing"})
        adapter = fileformat.load(SAVED / "words.safetensors")
        refused("a connected adapter", **folder, adapter=adapter)
    finally:
        undo()


TEXT_CHECKS = [
    a_new_word_and_text_layers_are_learned_and_used_at_once,
    its_gradients_are_those_of_the_trainers_own_text_path,
    words_stopped_and_resumed_end_like_uninterrupted,
    samples_change_nothing_but_the_picture_shown,
    the_sampler_is_the_hosts,
    nothing_stays_in_memory,
    two_text_encoders,
    what_text_cannot_do_is_said_first,
]
