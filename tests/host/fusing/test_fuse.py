"""The nodes Fuse Adapters, with statistics, and Distil Adapters in a real host; the base model stays as it
was."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_core.attach.targets import find_targets
from spectral_core.files.adapter_file import save
from tests.core.adapter_cases import GATED, MERGEABLE, trained
from tests.host.booted import ROOT
from tests.host.inside import checkouts, run_inside

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

FUSE, DISTIL = "inside_fuse.py", "inside_distil.py"


def checks(script: str) -> list[str]:
    """The names in the list CHECKS of a script that only a host's Python can import."""
    tree = ast.parse(Path(__file__).with_name(script).read_text(encoding="utf-8"))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    (found,) = (n.value for n in assigned if ast.unparse(n.targets[0]) == "CHECKS")
    assert isinstance(found, ast.List)
    return [ast.unparse(element) for element in found.elts]


def files_for(folder: Path) -> Path:
    """Adapters of the demo model, and the folders that a host wants."""
    load = {"torch_dtype": torch.float32}
    unet = diffusers.UNet2DConditionModel.from_pretrained(ROOT / "demo_model/unet", **load)
    text = transformers.CLIPTextModel.from_pretrained(ROOT / "demo_model/text_encoder", **load)
    attention, _ = find_targets(unet, "unet", "attention")
    convolution, _ = find_targets(unet, "unet", "conv_in")
    words, _ = find_targets(text, "text_encoder", "attention")
    adapters = {
        "lora": trained(MERGEABLE["lora"], attention | convolution, size=0.15),
        "gated": trained(GATED["foura-adaptive"], attention, size=0.15),
        "text": trained(MERGEABLE["lora"], words, size=0.15),
    }
    for name, adapter in adapters.items():
        save(adapter, folder / f"{name}.safetensors")
    for name in ("output", "input"):
        (folder / name).mkdir()
    return folder


def report_of(script: str, checkout: Any, folder: Path) -> dict[str, str]:
    """What the script's checks say, in a process of that host version."""
    run_inside(checkout, script, files_for(folder))
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module", params=checkouts())
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return report_of(FUSE, request.param, tmp_path_factory.mktemp("fuse"))


@pytest.fixture(scope="module", params=checkouts())
def distilled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return report_of(DISTIL, request.param, tmp_path_factory.mktemp("distil"))


@pytest.mark.parametrize("check", checks(FUSE))
def test_fuse(fused: dict[str, str], check: str) -> None:
    assert fused[check] == "", fused[check]


@pytest.mark.parametrize("check", checks(DISTIL))
def test_distil(distilled: dict[str, str], check: str) -> None:
    assert distilled[check] == "", distilled[check]
