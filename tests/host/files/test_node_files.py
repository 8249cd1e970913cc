"""What the nodes write, read and say on a real host: saving, exporting, reports after a run, lost inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from spectral_core.adapter.adapter import create
from spectral_core.files import adapter_file as fileformat
from spectral_core.methods import FouRAConfig
from tests.host.booted import ROOT, Host
from tests.host.graphs import Graph, demo_graph, node, view
from tests.host.watching import run, succeed

GATED = "gated.safetensors"


def ours(name: str, **inputs: object) -> Graph:
    return node(f"SpectralAdapters_{name}", **inputs)


@pytest.fixture(scope="module")
def gated(host: Host) -> str:
    """A FouRA with adaptive gates on the demo model's attention, in the host's folder."""
    weights = load_file(ROOT / "demo_model/unet/diffusion_pytorch_model.safetensors")
    names = [key for key in weights if key.endswith(("attn1.to_q.weight", "attn2.to_v.weight"))]
    generator = torch.Generator().manual_seed(0)
    adapter = create(
        {f"unet.{key.removesuffix('.weight')}": weights[key].float() for key in names},
        FouRAConfig(4),
        generator=generator,
    )
    folder = host.folder / "models" / "spectral_adapters"
    folder.mkdir(parents=True, exist_ok=True)
    fileformat.save(adapter.with_provenance(name="gated"), folder / GATED, overwrite=True)
    return GATED


def load(name: str, **inputs: object) -> Graph:
    return ours("LoadFouRA", adapter_name=name, strength_model=1.0, strength_clip=1.0, **inputs)


def test_report_after_the_sampler_shows_the_run(host: Host, gated: str) -> None:
    graph = demo_graph(steps=3, a=load(gated, model=["demo", 0], clip=["demo", 1]))
    graph["sampler"]["inputs"]["model"] = ["a", 0]
    graph["r"] = ours("AdapterReport", adapter=["a", 2], model=["demo", 0], samples=["sampler", 0])
    graph["decode"]["inputs"]["samples"] = ["r", 2]
    done = succeed(host, graph)
    (report,) = done.entry["outputs"]["r"]["text"]
    assert "gates open in the last run" in report and "size of the change of the weight" in report
    (file,) = done.entry["outputs"]["r"]["images"]
    assert view(host, file).startswith(b"\x89PNG")
    (loaded,) = done.entry["outputs"]["a"]["text"]
    assert "live" in loaded and GATED in loaded
    assert done.entry["outputs"]["save"]["images"]


def test_saved_and_exported_files_are_offered_and_load(host: Host, gated: str) -> None:
    graph = {
        "a": load(gated),
        "s": ours("AdapterStrength", adapter=["a", 2], strength_model=0.5, strength_clip=1.0,
                  start_percent=0.0, end_percent=1.0, curve="constant", custom_curve="", block_weights=""),
        "f": ours("FuseAdapters", adapter_1=["a", 2], adapter_2=["s", 0], method="sum", weight_1=1.0,
                  weight_2=1.0, target_rank=0, freeze_gates=True),
        "w": ours("SaveAdapter", adapter=["f", 0], filename_prefix="made/fused", precision="as is",
                  compact=False, trigger_words="one, two"),
        "p": node("PreviewImage", images=["f", 2]),
    }  # fmt: skip
    done = succeed(host, graph)
    assert "made/fused_00001_.safetensors" in done.entry["outputs"]["w"]["text"][0]
    again = succeed(host, {**graph, "w": {**graph["w"], "inputs": {**graph["w"]["inputs"], "compact": True}}})
    assert "made/fused_00002_.safetensors" in again.entry["outputs"]["w"]["text"][0]
    offered = host.get("/object_info/SpectralAdapters_LoadFouRA")["SpectralAdapters_LoadFouRA"]
    names = offered["input"]["required"]["adapter_name"][0]
    assert {"made/fused_00001_.safetensors", "made/fused_00002_.safetensors", GATED} <= set(names)
    picture = demo_graph(steps=2, a=load("made\\fused_00001_.safetensors", model=["demo", 0]))
    picture["sampler"]["inputs"]["model"] = ["a", 0]
    workflow = {"nodes": [], "links": [], "version": 0.4}
    done = succeed(host, picture, workflow)
    info = Image.open(_output(host, done.entry["outputs"]["save"]["images"][0])).info
    entry = json.loads(info["spectral_adapters"])["adapters"][0]
    assert entry["name"] == "made/fused_00001_.safetensors" and len(entry["sha256"]) == 64
    noted = json.loads(info["workflow"])["extra"]["spectral_adapters"]
    assert noted == {entry["name"]: entry["sha256"]}


def _output(host: Host, file: dict[str, str]) -> Path:
    return host.folder / "output" / file["subfolder"] / file["filename"]


def test_an_output_without_its_input_says_what_to_connect(host: Host, gated: str) -> None:
    graph = demo_graph(steps=2, a=load(gated, model=["demo", 0]))
    graph["positive"]["inputs"]["clip"] = ["a", 1]
    done = run(host, graph)
    assert done.status == "error"
    assert "positive: Load FouRA has no CLIP output: connect its input 'clip'" in done.error


def test_a_renamed_file_is_found_by_what_the_picture_says(host: Host, gated: str) -> None:
    folder = host.folder / "models" / "spectral_adapters"
    workflow = {"nodes": [], "links": [], "version": 0.4, "extra": {}}
    graph = {"a": load(gated), "r": ours("AdapterReport", adapter=["a", 2])}
    digest = fileformat_digest(folder / gated)
    (folder / gated).rename(folder / "other name.safetensors")
    try:
        workflow["extra"] = {"spectral_adapters": {gated: digest}}
        done = succeed(host, graph, workflow)
        assert "other name.safetensors has the content" in done.entry["outputs"]["a"]["text"][0]
    finally:
        (folder / "other name.safetensors").rename(folder / gated)


def fileformat_digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
