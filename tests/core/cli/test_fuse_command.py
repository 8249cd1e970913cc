"""The command ``fuse`` with statistics: drawn by itself, saved, read again; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spectral_core.adapter.adapter import create
from spectral_core.attach.targets import find_targets
from spectral_core.cli.main import main
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load, save
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.pipelines import apply
from spectral_core.pipelines.statistics import Looking, concept_statistics
from spectral_core.statistics.collect import collect, exact_bytes, modules_of
from spectral_core.statistics.file import load as load_statistics

DRAW = ["--sample-steps", "2", "--size", "16", "--device", "cpu"]
PROMPTS = [("a b", "b"), ("a c",)]


def concept(pipe: Any, config: Any, seed: int, word: str) -> Any:
    """An adapter of the attention layers and of the text encoder's, off zero."""
    weights, _ = find_targets(pipe.unet, "unet", "attention")
    if seed == 1:
        weights |= find_targets(pipe.text_encoder, "text_encoder", "attention")[0]
    generator = torch.Generator().manual_seed(seed)
    made = create(weights, config, generator=generator)

    def moved(_: str, term: Any) -> Any:
        return type(term)(
            term.config,
            {
                k: v if k.startswith("gate.") else 0.5 * torch.randn(v.shape, generator=generator)
                for k, v in term.params.items()
            },
        )

    return made.map_terms(moved).with_provenance(name=word, trigger_words=(word,))


@pytest.fixture(scope="module")
def adapters(pipe: Any) -> list[Any]:
    return [concept(pipe, LoRAConfig(2), 1, "b"), concept(pipe, FouRAConfig(2), 2, "c")]


@pytest.fixture
def files(adapters: list[Any], tmp_path: Path) -> list[str]:
    return [str(save(a, tmp_path / f"{a.provenance.name}.safetensors")) for a in adapters]


def test_statistics_are_those_of_the_concepts_own_runs(pipe: Any, adapters: list[Any]) -> None:
    looking = Looking(2, 3.0, (16, 16), seed=5)
    scaled = [adapters[0].scaled(0.3), adapters[1]]  # strengths do not matter
    found = concept_statistics(pipe, scaled, PROMPTS, looking)
    modules = modules_of(pipe.unet, adapters, "unet")
    modules |= modules_of(pipe.text_encoder, adapters, "text_encoder")
    with apply(pipe, adapters[0]), collect(modules, adapters) as seen:
        for i, prompt in enumerate(PROMPTS[0]):
            pipe(
                prompt, num_inference_steps=2, guidance_scale=3.0, width=16, height=16,
                generator=torch.Generator().manual_seed(5 + i),
            )  # fmt: skip
    expected = seen.statistics()
    assert found[0].keys() == expected.keys() == adapters[0].layers.keys()
    for name, statistics in expected.items():
        assert found[0][name].count == statistics.count
        assert torch.allclose(found[0][name].second_moment, statistics.second_moment, rtol=1e-4, atol=1e-6)
    turned = concept_statistics(pipe, adapters, PROMPTS, looking, [-1, 0])
    name = next(n for n in found[0] if n.endswith("to_out.0"))
    assert not torch.allclose(turned[0][name].second_moment, found[0][name].second_moment)
    assert turned[1] == {}
    small = concept_statistics(pipe, adapters, PROMPTS, Looking(1, 1.0, (16, 16), limit_bytes=1))
    assert all(s.basis is not None for s in small[0].values())
    with pytest.raises(SpectralAdapterError, match="prompts of 1 concepts"):
        concept_statistics(pipe, adapters, PROMPTS[:1])


def test_closed_form_draws_saves_and_reads_again(
    pipe: Any, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    kept, report, sheet = tmp_path / "kept", tmp_path / "report.json", tmp_path / "sheet.png"
    command = ["fuse", *files, "--method", "closed-form", "-o", str(tmp_path / "one.safetensors")]
    drawing = [*command, "--model", str(tmp_path / "model"), *DRAW, "--prompts", "a b|b"]
    drawing += ["--save-statistics", str(kept), "--report", str(report), "--picture", str(sheet)]
    assert main(drawing) == 0
    said = capsys.readouterr().out
    assert "b as: a b, b" in said and "c as: a c, a picture of a c" in said
    assert "retention on its own inputs: b " in said
    fused = load(tmp_path / "one.safetensors")
    assert fused.mergeable and fused.provenance.trigger_words == ("b", "c")
    stored = [kept / "01-b.safetensors", kept / "02-c.safetensors"]
    assert load_statistics(stored[0]).keys() == fused.layers.keys()
    found = json.loads(report.read_text())
    assert found["fusion"]["concepts"][0]["retention"] > 0.3 and found["before"]["crosstalk"] is not None
    assert Image.open(sheet).width > 400
    again = ["fuse", *files, "--method", "closed-form", "-o", str(tmp_path / "two.safetensors")]
    assert main([*again, "--statistics", *map(str, stored)]) == 0
    assert load(tmp_path / "two.safetensors").content_hash == fused.content_hash
    assert main([*again, "--overwrite", "--statistics", *map(str, stored), "--weights", "1", "-0.5"]) == 0
    assert load(tmp_path / "two.safetensors").content_hash != fused.content_hash


def test_rounds_look_at_what_was_fused(
    pipe: Any, adapters: list[Any], files: list[str], tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    command = ["fuse", *files, "--method", "closed-form", "--model", str(tmp_path / "model"), *DRAW]
    for rounds in ("1", "2"):
        out = ["--rounds", rounds, "-o", str(tmp_path / f"{rounds}.safetensors")]
        assert main([*command, *out, "--save-statistics", str(tmp_path / rounds)]) == 0
    one, two = (load(tmp_path / f"{rounds}.safetensors") for rounds in (1, 2))
    assert one.content_hash != two.content_hash
    usual = [*command, "-o", str(tmp_path / "usual.safetensors")]
    assert main(usual) == 0
    assert load(tmp_path / "usual.safetensors").content_hash == two.content_hash
    seen = [load_statistics(tmp_path / rounds / "01-b.safetensors") for rounds in ("1", "2")]
    name = next(n for n in seen[0] if n.endswith("to_out.0"))
    assert seen[1][name].count == 2 * seen[0][name].count
    assert main([*command, "--rounds", "0", "-o", str(tmp_path / "none.safetensors")]) == 1
    drawn = concept_statistics(pipe, adapters, PROMPTS, Looking(2, 3.0, (16, 16)), under=adapters[0])
    own = concept_statistics(pipe, adapters, PROMPTS, Looking(2, 3.0, (16, 16)))
    assert torch.equal(drawn[0][name].second_moment, own[0][name].second_moment)
    assert not torch.allclose(drawn[1][name].second_moment, own[1][name].second_moment, rtol=1e-3)


def test_several_rounds_count_for_memory(pipe: Any, adapters: list[Any]) -> None:
    modules = modules_of(pipe.unet, adapters, "unet") | modules_of(
        pipe.text_encoder, adapters, "text_encoder"
    )
    widths = {n: a.layers[n].shape.fan_in for a in adapters for n in modules if n in a.layers}
    limit = exact_bytes(modules, widths) * 3
    for rounds, in_full in ((1, True), (2, False)):
        looking = Looking(1, 1.0, (16, 16), limit_bytes=limit, rounds=rounds)
        found = concept_statistics(pipe, adapters, PROMPTS, looking)
        assert all((s.basis is None) == in_full for s in found[0].values())


def test_average_with_a_model_says_what_is_kept(
    pipe: Any, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    command = ["fuse", *files, "--method", "average", "-o", str(tmp_path / "one.safetensors"), *DRAW]
    assert main([*command, "--model", str(tmp_path / "model"), "--space", "rank"]) == 0
    assert "retention on its own inputs" in capsys.readouterr().out


def test_what_is_missing_is_named(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "x.safetensors")]
    assert main(["fuse", *files, "--method", "closed-form", *out]) == 1
    assert "give the --model" in capsys.readouterr().err
    assert main(["fuse", *files, "--weights", "1", *out]) == 1
    assert "1 --weights for 2 files" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_taken_name_is_said_before_anything_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "x.safetensors"
    taken.write_bytes(b"somebody's")
    assert main(["fuse", "missing.safetensors", "-o", str(taken)]) == 1
    assert "exists already; save as x-2.safetensors" in capsys.readouterr().err
