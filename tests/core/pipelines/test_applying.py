"""Adapters on a diffusers pipeline: live = merged = reloaded, words, noise level, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectral_core.adapter.adapter import Adapter, create
from spectral_core.adapter.schedule import Schedule
from spectral_core.attach.merging import merge_into
from spectral_core.attach.targets import find_targets
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load, save
from spectral_core.gates.formula import GateRecorder
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig, SpectralRConfig
from spectral_core.pipelines import apply, generate, parts_of
from spectral_core.pipelines.job import Job
from spectral_core.pipelines.tokens import TokenRows, initial_rows
from spectral_core.pipelines.train import evaluate, train_adapter
from spectral_core.training.config.adapter import Method
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.named_run import START, Output

SIZE = (16, 16)
CONFIGS: list[MethodConfig] = [
    LoRAConfig(3, alpha=2.0),
    FouRAConfig(4, transform="dct", gate="frozen"),
    FouRAConfig(4, transform="dft", gate="none"),
    SpectralAConfig((0, 1, 2), train_scale=True),
    SpectralRConfig((0, 1, 2), train_scale=True),
]


def picture(pipe: Any, prompt: str = "ab", steps: int = 3) -> np.ndarray[Any, Any]:
    return np.asarray(generate(pipe, [prompt], [7], steps=steps, size=SIZE)[0])


def latents(pipe: Any, prompt: str = "ab") -> torch.Tensor:
    out: torch.Tensor = pipe(
        prompt,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        width=16,
        height=16,
        output_type="latent",
    ).images
    return out


def adapter_for(pipe: Any, config: MethodConfig, targets: str = "all", part: str = "unet") -> Adapter:
    """Random non-zero parameters everywhere."""
    weights, _ = find_targets(parts_of(pipe)[part], part, targets)
    adapter = create(weights, config, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)

    def shake(_: str, term: Any) -> Any:
        moved = {
            k: v
            if k in ("u", "v", "s") or k.startswith("gate.")
            else v + 0.05 * torch.randn(v.shape, generator=generator)
            for k, v in term.params.items()
        }
        return replace(term, params=moved)

    return adapter.map_terms(shake)


@pytest.fixture(autouse=True)
def untouched(pipe: Any) -> Iterator[None]:
    """Whatever a test does: afterwards the picture is bit-identical and no forward is replaced."""
    before = picture(pipe)
    own = {name: set(vars(m)) for p in parts_of(pipe).values() for name, m in p.named_modules()}
    words = len(pipe.tokenizer)
    yield
    assert np.array_equal(picture(pipe), before)
    assert {name: set(vars(m)) for p in parts_of(pipe).values() for name, m in p.named_modules()} == own
    assert len(pipe.tokenizer) == words


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_live_equals_merged_equals_reloaded(pipe: Any, config: MethodConfig, tmp_path: Path) -> None:
    adapter = adapter_for(pipe, config)
    base = latents(pipe)
    with apply(pipe, adapter):
        live = latents(pipe)
    with merge_into(pipe.unet, adapter, "unet"):
        merged = latents(pipe)
    with apply(pipe, load(save(adapter, tmp_path / "a.safetensors"))):
        reloaded = latents(pipe)
    assert (live - base).abs().max() > 1e-2, "the adapter must do something for this test to mean anything"
    assert torch.allclose(live, merged, atol=2e-4)
    assert torch.equal(live, reloaded)


def test_stacking_commutes_and_adds_text_encoder_parts(pipe: Any) -> None:
    a = adapter_for(pipe, FouRAConfig(4, gate="adaptive"))
    b = adapter_for(pipe, LoRAConfig(2), targets="attention", part="text_encoder")
    with apply(pipe, a, b):
        one = latents(pipe)
    with apply(pipe, b, a):
        other = latents(pipe)
    with apply(pipe, a):
        alone = latents(pipe)
    assert torch.equal(one, other) and not torch.allclose(one, alone, atol=1e-4)


def test_an_exception_in_the_model_leaves_nothing_behind(pipe: Any) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = pipe.unet.mid_block.register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt), apply(pipe, adapter_for(pipe, LoRAConfig(2))):
            picture(pipe)
    finally:
        handle.remove()


def test_the_schedule_follows_the_pipelines_noise(pipe: Any) -> None:
    adapter = adapter_for(pipe, LoRAConfig(2))
    base = latents(pipe)
    for schedule, same in (
        (Schedule(((0.0, 0.0),)), True),
        (Schedule.window(0.4, 0.6), True),  # three steps: progress 0.33, 0.67, 1.0
        (Schedule.window(0, 0.5), False),
    ):
        with apply(pipe, adapter.with_schedule(schedule)):
            assert torch.equal(latents(pipe), base) == same


def test_open_gates_are_recorded_per_layer_and_noise_level(pipe: Any) -> None:
    recorder = GateRecorder(bins=4)
    adapter = adapter_for(pipe, FouRAConfig(4, gate="adaptive"), targets="attention")
    with apply(pipe, adapter, recorder=recorder):
        picture(pipe, steps=8)
    summary = recorder.summary()
    assert set(summary["layers"]) == set(adapter.layers)
    assert all(value is not None and 0 <= value <= 4 for row in summary["effective_rank"] for value in row)


def test_new_words_exist_only_inside_and_use_their_rows(pipe: Any) -> None:
    rows = initial_rows(pipe, "a")
    with TokenRows(pipe, {"<new>": rows}):
        assert len(pipe.tokenizer("<new>", add_special_tokens=False).input_ids) == 1
        as_a = latents(pipe, "<new>")
    assert torch.equal(as_a, latents(pipe, "a")), "a word with the row of 'a' means 'a'"
    with TokenRows(pipe, {"<new>": {"text_encoder": -rows["text_encoder"]}}):
        assert not torch.allclose(latents(pipe, "<new>"), as_a, atol=1e-3)


def test_words_that_clash_are_refused(pipe: Any) -> None:
    rows = initial_rows(pipe, "a")
    with pytest.raises(SpectralAdapterError, match="already a word"), TokenRows(pipe, {"a</w>": rows}):
        pass
    with (
        pytest.raises(SpectralAdapterError, match=r"expected \(k, 32\)"),
        TokenRows(pipe, {"<n>": {"text_encoder": torch.zeros(1, 9)}}),
    ):
        pass
    first = replace(adapter_for(pipe, LoRAConfig(2)), tokens={"<n>": rows})
    second = replace(first, tokens={"<n>": {"text_encoder": rows["text_encoder"] + 1}})
    with pytest.raises(SpectralAdapterError, match="different meanings"), apply(pipe, first, second):
        pass


def test_an_adapter_for_another_part_is_refused_by_name(pipe: Any) -> None:
    adapter = adapter_for(pipe, LoRAConfig(2), targets="attention")
    moved = replace(
        adapter, layers={n.replace("unet.", "transformer.", 1): v for n, v in adapter.layers.items()}
    )
    with (
        pytest.raises(SpectralAdapterError, match=r"changes 'transformer'.*it has unet, text_encoder"),
        apply(pipe, moved),
    ):
        pass


@pytest.mark.parametrize(("method", "rate"), [("foura", 1e-2), ("spectral_a", 2e-2)])
def test_training_a_concept_learns_its_word_and_lowers_the_loss(
    pipe: Any, method: Method, rate: float, pictures: Path, tmp_path: Path
) -> None:
    job = Job(str(pictures), "<tok>", size=SIZE, method=method, rank=2, targets="all", init_words="a")
    config = TrainConfig(steps=30, batch_size=3, learning_rate=rate, target_open=0)
    done = train_adapter(pipe, job, config, Output(tmp_path, "tok", cache_folder=tmp_path))
    before = evaluate(pipe, job, load(done.place.folder / START))
    assert evaluate(pipe, job, done.adapter) < 0.97 * before
    rows = done.adapter.tokens["<tok>"]["text_encoder"]
    assert not torch.equal(rows, initial_rows(pipe, "a")["text_encoder"])
    assert done.adapter.provenance.trigger_words == ("<tok>",)
    assert done.adapter.provenance.training["images"] == 3
    with apply(pipe, done.adapter):
        assert len(pipe.tokenizer("<tok>", add_special_tokens=False).input_ids) == 1


def test_a_picture_depends_on_its_own_seed_only(pipe: Any) -> None:
    both = generate(pipe, ["ab", "cd"], [7, 8], steps=3, size=SIZE)
    assert np.abs(np.asarray(both[0], np.int16) - picture(pipe).astype(np.int16)).max() <= 1
    assert not np.array_equal(both[0], both[1])
    with pytest.raises(SpectralAdapterError, match="2 prompts and 1 seeds"):
        generate(pipe, ["a", "b"], [1])


def test_text_encoder_names_do_not_depend_on_the_transformers_release(pipe: Any) -> None:
    """Releases differ in the level ``text_model.``; files always have it, and either spelling finds its
    module."""
    weights, _ = find_targets(
        pipe.text_encoder, "text_encoder", "text_encoder.text_model.encoder.layers.1.*q_proj"
    )
    assert list(weights) == ["text_encoder.text_model.encoder.layers.1.self_attn.q_proj"]
    adapter = adapter_for(pipe, LoRAConfig(2), part="text_encoder")
    bare = replace(adapter, layers={n.replace("text_model.", ""): v for n, v in adapter.layers.items()})
    with apply(pipe, adapter):
        one = latents(pipe)
    with apply(pipe, bare):
        assert torch.allclose(latents(pipe), one, atol=1e-5)
