"""Whatever is done with adapters in a real host, its base model answers the same afterwards, to the bit."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from spectral_core.attach.targets import find_targets
from spectral_core.files.adapter_file import save
from tests.core.adapter_cases import ALL, GATED, MERGEABLE, trained
from tests.host.booted import ROOT
from tests.host.inside import checkouts, run_inside

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

FILES = (
    "inside_apply_base.py",
    "inside_apply_models.py",
    "inside_apply_families.py",
    "inside_apply_files.py",
)


def checks_in(file: str) -> list[str]:
    """The names in the list CHECKS of a script that only a host's Python can import."""
    tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
    (found,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and "CHECKS" in ast.unparse(node)
    )
    assert isinstance(found, ast.List)
    return [ast.unparse(element) for element in found.elts]


CHECKS = [check for file in FILES for check in checks_in(file)]


@pytest.fixture(scope="module", params=checkouts())
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process per host version."""
    model = ROOT / "demo_model"
    load = {"torch_dtype": torch.float32}
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet", **load)
    text = transformers.CLIPTextModel.from_pretrained(model / "text_encoder", **load)
    attention, _ = find_targets(unet, "unet", "attention")
    words, _ = find_targets(text, "text_encoder", "attention")
    adapters = {
        name: trained(ALL[name], attention, size=0.15)
        for name in ("foura-adaptive", "foura-frozen", "spectral-a", "lora")
    }
    adapters["text-adaptive"] = trained(GATED["foura-adaptive"], words, size=0.15)
    adapters["text-lora"] = trained(MERGEABLE["lora"], words, size=0.15)
    folder: Path = tmp_path_factory.mktemp("apply_base")
    for name, adapter in adapters.items():
        save(adapter, folder / f"{name}.safetensors")
    run_inside(request.param, "inside_apply_checks.py", folder)
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


def test_every_check_ran(report: dict[str, str]) -> None:
    assert sorted(report) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_inside(report: dict[str, str], check: str) -> None:
    assert report[check] == ""
