"""Adapters on the demo model in a real host: merged = live = the core's attach on diffusers' own classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_core.adapter.adapter import Adapter
from spectral_core.adapter.schedule import Schedule
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.files.adapter_file import save
from spectral_core.methods import FouRAConfig
from tests.core.adapter_cases import ALL, GATED, MERGEABLE, trained
from tests.host.booted import ROOT
from tests.host.inside import checkouts, run_inside

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

STRENGTH = 0.7
TOLERANCE = 1e-5  # of the largest value; measured 1e-6
TEXT = ("text-lora", "text-adaptive")
TOGETHER = ("foura-adaptive", "lora", "spectral-a")
PERCENTS = (0.1, 0.25, 0.3, 0.499, 0.5, 0.9)
SCHEDULE = Schedule(((0.25, 0.0), (0.25, 1.0), (0.5, 0.4), (0.5, 0.0)))
PROMPT = "a large red striped star on a blue background, on the left"


@dataclass(frozen=True)
class Given:
    unet: Any
    text: Any
    tokenizer: Any
    adapters: dict[str, Adapter]
    inputs: dict[str, Tensor]


@pytest.fixture(scope="module")
def given() -> Given:
    model = ROOT / "demo_model"
    load = {"torch_dtype": torch.float32}
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet", **load).eval()
    text = transformers.CLIPTextModel.from_pretrained(model / "text_encoder", **load).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(model / "tokenizer")
    attention, _ = find_targets(unet, "unet", "attention")
    everything, _ = find_targets(unet, "unet", "all")
    adapters = {name: trained(config, attention, size=0.15) for name, config in ALL.items()}
    adapters["foura-all"] = trained(FouRAConfig(4), everything, size=0.05)
    adapters["scheduled"] = adapters["foura-adaptive"].with_schedule(SCHEDULE)
    words, _ = find_targets(text, "text_encoder", "attention+mlp")
    adapters["text-lora"] = trained(MERGEABLE["lora"], words, size=0.05)
    adapters["text-adaptive"] = trained(GATED["foura-adaptive"], words, size=0.05)
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "x": 5 * torch.randn(2, 4, 16, 16, generator=generator),
        "sigma": torch.tensor([3.0, 3.0]),
        "context": torch.randn(2, 77, 128, generator=generator),
    }
    return Given(unet, text, tokenizer, adapters, inputs)


@dataclass(frozen=True)
class Answer:
    outputs: dict[str, Tensor]
    report: dict[str, list[str]]


@pytest.fixture(scope="module", params=checkouts())
def answer(request: pytest.FixtureRequest, given: Given, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("apply")
    for name, adapter in given.adapters.items():
        save(adapter, folder / f"{name}.safetensors")
    unet = {n: a.mergeable for n, a in given.adapters.items() if n not in (*TEXT, "scheduled")}
    text = {n: given.adapters[n].mergeable for n in TEXT}
    cases = {"unet": unet, "text": text, "strength": STRENGTH, "together": TOGETHER, "percents": PERCENTS}
    (folder / "cases.json").write_text(json.dumps({**cases, "prompt": PROMPT}), encoding="utf-8")
    save_file(given.inputs, folder / "inputs.safetensors")
    run_inside(request.param, "inside_apply.py", folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Answer(load_file(folder / "outputs.safetensors"), report)


def reference(given: Given, answer: Answer, name: str, *adapters: Adapter, progress: float = 0.0) -> Tensor:
    """diffusers' UNet on the same input as the host's, with the core's attach."""
    call = [answer.outputs[f"{name}.{kind}"] for kind in ("input", "timesteps")]
    scaled = [adapter.scaled(STRENGTH) for adapter in adapters]
    with torch.inference_mode(), attach(given.unet, scaled) as attachment:
        attachment.set_progress(progress)
        output: Tensor = given.unet(*call, given.inputs["context"]).sample
    return output


def assert_close(what: str, host: Tensor, ours: Tensor, base: Tensor | None = None) -> None:
    difference = ((host - ours).abs().max() / ours.abs().max()).item()
    print(f"{what}: {difference:.1e}")
    assert difference <= TOLERANCE, what
    if base is not None:
        moved = ((ours - base).abs().max() / ours.abs().max()).item()
        assert moved > 1000 * TOLERANCE, f"{what}: the adapter hardly does anything ({moved:.1e})"


@pytest.mark.parametrize("name", [*ALL, "foura-all"])
def test_live_and_merged_are_the_cores_attach(answer: Answer, given: Given, name: str) -> None:
    modes = ["live", "merged"] if given.adapters[name].mergeable else ["live"]
    for mode in modes:
        ours = reference(given, answer, f"{name}.{mode}", given.adapters[name])
        base = answer.outputs["base.output"]
        assert_close(f"{name} {mode}", answer.outputs[f"{name}.{mode}.output"], ours, base)
        assert answer.report[f"{name}.{mode}"][0] == mode


def test_base_is_untouched(answer: Answer) -> None:
    for kind in ("input", "output"):
        assert torch.equal(answer.outputs[f"base.{kind}"], answer.outputs[f"after.{kind}"])
    assert torch.equal(answer.outputs["text base.states"], answer.outputs["text after.states"])


def test_live_adapters_add_up_in_any_order(answer: Answer, given: Given) -> None:
    ours = reference(given, answer, "together", *(given.adapters[name] for name in TOGETHER))
    assert_close("together", answer.outputs["together.output"], ours)
    assert torch.equal(answer.outputs["together.output"], answer.outputs["together reversed.output"])


@pytest.mark.parametrize("percent", PERCENTS)
def test_schedule_follows_the_hosts_percent(answer: Answer, given: Given, percent: float) -> None:
    name = f"scheduled.{percent}"
    ours = reference(given, answer, name, given.adapters["scheduled"], progress=percent)
    assert_close(name, answer.outputs[f"{name}.output"], ours)
    off = reference(given, answer, name, given.adapters["scheduled"].scaled(0.0), progress=percent)
    assert ((ours - off).abs().max() > 0) == (SCHEDULE.at(percent) > 0)
    assert answer.report["scheduled.auto"][0] == "live"


@pytest.mark.parametrize("name", TEXT)
def test_text_encoder(answer: Answer, given: Given, name: str) -> None:
    ids = given.tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    adapter = given.adapters[name]
    with torch.inference_mode(), attach(given.text, adapter.scaled(STRENGTH)):
        ours = given.text(ids)
    for mode in ("live", "merged") if adapter.mergeable else ("live",):
        base = answer.outputs["text base.states"]
        assert_close(f"{name} {mode}", answer.outputs[f"{name}.{mode}.states"], ours.last_hidden_state, base)
        assert_close(f"{name} {mode} pooled", answer.outputs[f"{name}.{mode}.pooled"], ours.pooler_output)
