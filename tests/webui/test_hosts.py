"""The extension in real webuis: one boot each, a dozen small pictures of the demo model in Automatic1111.

A1111_PATH, FORGE_PATH: checkouts, with all that they need beside them; A1111_PYTHON, FORGE_PYTHON: theirs.
Models, settings and the extension lie in a temporary data folder, so that the checkouts stay as they are.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.webui.demo_checkpoint import ROOT, write

BOOT_SECONDS = 300
FLAGS = ["--skip-torch-cuda-test", "--skip-prepare-environment", "--api", "--server-name", "127.0.0.1"]
OWN_FLAGS = {
    "A1111": ["--no-half", "--use-cpu", "all", "--no-download-sd-model", "--do-not-download-clip"],
    "FORGE": ["--always-cpu"],
}
PICTURE = {"negative_prompt": "", "seed": 7, "steps": 8, "cfg_scale": 4, "width": 128, "height": 128}
PICTURE |= {"sampler_name": "DDIM", "do_not_save_samples": True, "do_not_save_grid": True}


@dataclass(frozen=True)
class Webui:
    address: str
    data: Path

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def draw(self, prompt: str, **changes: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
        answer = self.call("/sdapi/v1/txt2img", PICTURE | {"prompt": prompt} | changes)
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in answer["images"]]
        return [np.asarray(picture.convert("RGB"), int) for picture in pictures], json.loads(answer["info"])

    def picture(self, prompt: str, **changes: Any) -> np.ndarray:
        return self.draw(prompt, **changes)[0][-1]


def boot(kind: str, data: Path) -> Iterator[Webui]:
    path, python = os.environ.get(f"{kind}_PATH"), os.environ.get(f"{kind}_PYTHON")
    if not path or not python:
        pytest.skip(f"set {kind}_PATH and {kind}_PYTHON to try the extension there")
    (data / "extensions").mkdir(parents=True)
    (data / "extensions" / "spectral-adapters").symlink_to(ROOT, target_is_directory=True)
    shutil.copytree(ROOT / "example_workflows/adapters/examples", data / "models/spectral_adapters")
    write(data / "models" / "Stable-diffusion")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Absolute, but not resolved: an environment's Python is a link.
    command = [os.path.abspath(python), "launch.py", *FLAGS, *OWN_FLAGS[kind], "--port", str(port)]
    with open(data / "log.txt", "w") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(data)],
            cwd=path,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
        webui = Webui(f"http://127.0.0.1:{port}", data)
        try:
            _wait(webui, process)
            yield webui
        finally:
            process.kill()
            process.wait()


def _wait(webui: Webui, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            webui.call("/spectral/v1/adapters")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    pytest.fail("the webui did not start:\n" + (webui.data / "log.txt").read_text()[-3000:])


@pytest.fixture(scope="module")
def a1111(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    yield from boot("A1111", tmp_path_factory.mktemp("a1111") / "data")


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    yield from boot("FORGE", tmp_path_factory.mktemp("forge") / "data")


def served(webui: Webui) -> None:
    """Routes, tab, page of cards and field are there, and nothing of ours was complained about."""
    names = [adapter["name"] for adapter in webui.call("/spectral/v1/adapters")]
    assert names == ["bot_foura", "bot_spectral", "fish_spectral", "house_spectral"]
    with urllib.request.urlopen(webui.address + "/", timeout=60) as answer:
        page = answer.read().decode()
    for part in ("spectral_fuse_run", "txt2img_spectral_cards", "spectral_adapters_txt2img"):
        assert part in page
    assert "Error loading script" not in (webui.data / "log.txt").read_text()


def test_automatic1111_serves_it(a1111: Webui) -> None:
    served(a1111)


def test_forge_serves_it(forge: Webui) -> None:
    served(forge)


def test_pictures(a1111: Webui) -> None:
    prompt = "a photo of <bot>"
    base = a1111.picture(prompt)
    live = a1111.picture(f"{prompt} <spectral:bot_foura:1>")
    assert np.abs(live - base).max() > 50
    assert np.array_equal(
        live, a1111.picture(prompt, alwayson_scripts={"spectral adapters": {"args": ["bot_foura:1"]}})
    )
    early = a1111.picture(f"{prompt} <spectral:bot_foura:1:stop=0.5>")
    late = a1111.picture(f"{prompt} <spectral:bot_foura:1:start=0.5>")
    assert not np.array_equal(early, live) and not np.array_equal(late, live)
    assert not np.array_equal(early, late)
    whole = a1111.picture(f"{prompt} <spectral:bot_spectral:1>")
    halves = a1111.picture(f"{prompt} <spectral:bot_spectral:0.5> <spectral:bot_spectral:0.5>")
    assert np.abs(whole - halves).max() <= 1
    pictures, _ = a1111.draw(f"{prompt} <spectral:bot_foura:1>", n_iter=2)
    assert np.array_equal(pictures[-2], live)
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    larger = a1111.picture(f"{prompt} <spectral:bot_foura:1>", **hires)
    assert larger.shape[0] == 96 and not np.array_equal(larger, a1111.picture(prompt, **hires))
    assert np.array_equal(a1111.picture(prompt), base)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M", "UniPC", "Heun", "PLMS"])
def test_samplers_of_both_kinds(a1111: Webui, sampler: str) -> None:
    """Those that give σ and those that give the timestep itself."""
    prompt = "a photo of a boat"
    base = a1111.picture(prompt, sampler_name=sampler)
    off = a1111.picture(f"{prompt} <spectral:bot_foura:1:0>", sampler_name=sampler)
    on = a1111.picture(f"{prompt} <spectral:bot_foura:1:stop=0.6>", sampler_name=sampler)
    assert np.array_equal(off, base) and not np.array_equal(on, base)


def test_mistakes_are_in_the_answer(a1111: Webui) -> None:
    prompt = "a photo of <bot>"
    pictures, info = a1111.draw(f"{prompt} <spectral:bot_fuora:1>")
    assert "did you mean bot_foura" in info["infotexts"][0]
    assert str(a1111.data) not in info["infotexts"][0]
    assert np.array_equal(pictures[0], a1111.picture(prompt))


def test_an_exported_lora_draws_the_same(a1111: Webui) -> None:
    prompt = "a photo of <bot>"
    file = a1111.call("/spectral/v1/export", {"name": "bot_spectral", "precision": "fp32"})["file"]
    a1111.call("/sdapi/v1/refresh-loras", {})
    name = file.removesuffix(".safetensors")
    live = a1111.picture(f"{prompt} <spectral:bot_spectral:1>")
    assert np.abs(a1111.picture(f"{prompt} <lora:{name}:1>") - live).max() <= 1
    both = a1111.picture(f"{prompt} <lora:{name}:0.5> <spectral:bot_spectral:0.5>")
    assert np.abs(both - live).max() <= 1
