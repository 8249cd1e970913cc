"""Inside a host: Distil Adapters on the demo model.

Every check is a function; writes ``report.json``.
"""

import json

import comfy.model_management as management
import torch
from inside_apply_lib import FOLDER, adapter, interrupted, pack, run_checks
from inside_apply_models import sd3
from inside_train_lib import RUNS, SAVED, Untouched, at_step, errors, train

distil_node = pack("nodes.distil").DistilAdapters
fileformat = pack("spectral_core.files.adapter_file")
events = pack("spectral_core.training.runs.events")
FEW = {
    "samples": 2,
    "sample_steps": 2,
    "batch_size": 2,
    "prompts": "a red star\na blue ring",
    "preserve": "a heart",
}

with torch.inference_mode():
    MODEL, CLIP = pack("nodes.host.demo.model").load_model(), pack("nodes.host.demo.model").load_clip()
    BASE = Untouched(MODEL)
    LORA, GATED, TEXT = (adapter(name) for name in ("lora", "gated", "text"))
    TEXT = TEXT.with_provenance(name="text")


def distil(*given, run_name, **more):
    values = {"model": MODEL, "clip": CLIP, "steps": 4, **FEW, **more}
    return distil_node().distil(adapter_1=given[0], adapter_2=given[1], run_name=run_name, **values)["result"]


def losses(name):
    found = events.read_events(RUNS / name / events.FILE)
    return [event["loss"] for event in found if event["event"] == "step"]


def two_adapters_become_one_that_is_saved():
    made, curve, report = distil(LORA, GATED, run_name="both", steps=20, learning_rate=0.002)
    assert made.mergeable and made.layers.keys() == LORA.layers.keys() | GATED.layers.keys()
    assert curve.shape[3] == 3 and "20 steps" in report and "saved as" in report, report
    stored = fileformat.load(SAVED / "both.safetensors")
    assert stored.content_hash == made.content_hash and stored.provenance.name == "both"
    assert stored.provenance.training["distilled"]["preserve"] == ["a heart"]
    assert len(stored.provenance.parents) == 2
    distil(LORA, GATED, run_name="still", steps=20, learning_rate=1e-9)  # the same batches and noise
    learned, still = (sum(losses(name)[-10:]) for name in ("both", "still"))
    print(f"   {still:.4f} to {learned:.4f}")
    assert learned < 0.985 * still, (learned, still)
    BASE.check(flags=False)
    again, _, report = distil(LORA, GATED, run_name="both", steps=20, learning_rate=0.002)
    assert "nothing was trained" in report and again.content_hash == made.content_hash
    _, _, report = distil(LORA, GATED, run_name="both", steps=2)
    assert (SAVED / "both-2.safetensors").is_file() and "learning rate" in report, report


def a_student_that_is_its_teacher_has_nothing_to_learn():
    """Teacher and student take the same way through model and CLIP, each with its own adapter on both."""
    for name, one in (("lora", LORA), ("text", TEXT)):
        with torch.inference_mode(False), torch.no_grad():
            both = (
                pack("spectral_core.fusion")
                .fuse([one, LORA], "sum", [1.0, 1.0 if one is TEXT else 0.0])
                .adapter
            )
        whole = both if one is TEXT else one
        given = {"fused": whole, "preserve": "-", "steps": 1, "prompts": "a red star\na red star"}
        distil(whole, GATED, weight_2=0.0, run_name=f"same {name}", **given)
        distil(whole, GATED, weight_2=0.0, run_name=f"other {name}", **{**given, "fused": whole.scaled(0.5)})
        same, other = losses(f"same {name}")[0], losses(f"other {name}")[0]
        assert same < 1e-7 and other > 1e3 * same, (name, same, other)
    BASE.check(flags=False)


class OtherWords:
    """The demo model's CLIP, but for what it makes of a text: states for a model of another width."""

    def __init__(self, clip):
        self._clip = clip

    def __getattr__(self, name):
        return getattr(self._clip, name)

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(len(text))
        pooled = torch.randn(1, 32, generator=generator)
        return [[torch.randn(1, 7, 48, generator=generator), {"pooled_output": pooled}]]


def a_flow_model_with_fused_layers():
    """Layers with the host's own names, of which some are rows of one weight."""
    model, clip = sd3(), OtherWords(CLIP)
    latent = {"samples": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))}
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    words = clip.encode_from_tokens_scheduled("a star")
    made = [
        train(
            model, run_name=f"flow {seed}", method="lora", targets="attention", latents=latent, seed=seed,
            conditioning=[words], steps=2, learning_rate=0.1, batch_size=1,
        )[0]
        for seed in (1, 2)
    ]  # fmt: skip
    given = {"model": model, "clip": clip, "latent": latent, "sample_cfg": 1.0}
    one = {**given, "weight_2": 0.0, "preserve": "-", "steps": 1}
    distil(*made, run_name="flow same", fused=made[0], **one)
    distil(*made, run_name="flow other", fused=made[0].scaled(0.5), **one)
    same, other = losses("flow same")[0], losses("flow other")[0]
    assert same < 1e-6 * other, (same, other)
    both, _, report = distil(*made, run_name="flow both", **given)
    assert set(both.layers) == set(made[0].layers) and "4 steps" in report, report
    assert all(torch.equal(before[k], v) for k, v in model.model.state_dict().items())


def a_concept_of_the_text_encoder_alone():
    made, _, report = distil(TEXT, LORA, run_name="words", steps=1, learning_rate=1e-3)
    assert set(made.layers) == set(TEXT.layers) | set(LORA.layers), report
    BASE.check(flags=False)


def a_weight_counts():
    """The teacher of half the strength is the student of half the strength."""
    given = {"preserve": "-", "steps": 1, "weight_2": 0.0}
    distil(LORA, GATED, weight_1=0.5, fused=LORA.scaled(0.5), run_name="half", **given)
    assert losses("half")[0] < 1e-7


def preserved_prompts_are_the_models_own():
    """Without adapters nothing is missing, with one there is."""
    with torch.inference_mode(False):
        quiet = LORA.scaled(1e-6)
    given = {"steps": 1, "weight_2": 0.0, "samples": 1, "batch_size": 1}
    for name, start in (("quiet", quiet), ("loud", LORA)):
        seen = []
        own = pack("nodes.host.fusing.distil").examples

        def only_base(*args, own=own):
            found, places = own(*args)
            kept = [(e, p) for e, p in zip(found, places, strict=True) if e.concept == -1]
            return [e for e, _ in kept], [p - kept[0][1] for _, p in kept]

        pack("nodes.host.fusing.distil").examples = only_base
        try:
            distil(LORA, GATED, fused=start, run_name=name, **given)
        finally:
            pack("nodes.host.fusing.distil").examples = own
        seen.append(losses(name)[0])
    assert losses("quiet")[0] < 1e-7 < losses("loud")[0], (losses("quiet"), losses("loud"))


def a_stopped_run_goes_on_and_ends_like_one_that_was_not_stopped():
    whole, _, _ = distil(LORA, GATED, run_name="whole")
    undo = at_step(7, management.interrupt_current_processing)  # teachers and the student call it
    try:
        with interrupted():
            distil(LORA, GATED, run_name="stopped")
    finally:
        undo()
    assert not management.processing_interrupted()
    assert list((RUNS / "stopped").glob("checkpoint*")) and not (SAVED / "stopped.safetensors").exists()
    BASE.check(flags=False)
    made, _, report = distil(LORA, GATED, run_name="stopped")
    assert "resumed at step" in report, report
    assert made.content_hash == whole.content_hash
    BASE.check(flags=False)


def the_stop_button_works_while_samples_are_drawn():
    management.interrupt_current_processing()
    with interrupted():
        distil(LORA, GATED, run_name="early", fused=LORA)
    assert not management.processing_interrupted()
    BASE.check(flags=False)


def errors_leave_the_model_as_it_was():
    for error in (RuntimeError("by the test"), torch.cuda.OutOfMemoryError()):

        def throw(error=error):
            raise error

        undo = at_step(4, throw, and_later=True)
        try:
            distil(LORA, GATED, run_name=f"broken {type(error).__name__}")
        except type(error) as told:
            said = str(told)
        else:
            raise AssertionError("the error was lost")
        finally:
            undo()
        assert "by the test" in said or "checkpointing" in said, said
        BASE.check(flags=False)


def refused(*parts, **given):
    try:
        distil(given.pop("one", LORA), GATED, run_name=given.pop("run_name", "no"), **given)
    except errors.SpectralAdapterError as error:
        print("  refused:", error)
        assert all(part in str(error) for part in parts), str(error)
        return
    raise AssertionError(f"not refused: {given}")


def what_cannot_work_is_said():
    refused("every strength is 0", weight_1=0.0, weight_2=0.0)
    refused("names no trigger word", "line 2 of prompts", prompts="a red star")
    refused("adaptive gate", fused=GATED)
    refused("fused and target_rank", fused=LORA, target_rank=2)
    refused("expected an ADAPTER", one="x")
    refused("plain name", run_name="../x")


CHECKS = [
    two_adapters_become_one_that_is_saved,
    a_student_that_is_its_teacher_has_nothing_to_learn,
    a_flow_model_with_fused_layers,
    a_concept_of_the_text_encoder_alone,
    a_weight_counts,
    preserved_prompts_are_the_models_own,
    a_stopped_run_goes_on_and_ends_like_one_that_was_not_stopped,
    the_stop_button_works_while_samples_are_drawn,
    errors_leave_the_model_as_it_was,
    what_cannot_work_is_said,
]

if __name__ == "__main__":
    (FOLDER / "report.json").write_text(json.dumps(run_checks(CHECKS)), encoding="utf-8")
