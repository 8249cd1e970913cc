"""A real webui, started once for all tests of it, with the extension in a data folder of its own.

$A1111_PATH, $FORGE_PATH, $NEO_PATH: checkouts with all that they need beside them; $A1111_PYTHON and so on:
theirs. Models, settings and the extension lie in a temporary folder, so that the checkouts stay as they are.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo_model.draw import PIXELS
from tests.webui.checkpoints import narrow_adapters, rotated, write_narrow
from tests.webui.demo_checkpoint import LAYOUT, ROOT, write
from tests.webui.families import (
    NARROWED,
    write_flux,
    write_sd2,
    write_sd2_wide,
    write_sdxl,
    write_sdxl_wide,
    write_z_image,
)

KINDS = ("A1111", "FORGE", "NEO")
BOOT_SECONDS = 400
USER = "someone:secret"
FLAGS = ["--skip-torch-cuda-test", "--skip-prepare-environment", "--api", "--server-name", "127.0.0.1"]
FLAGS += ["--api-auth", USER]
OWN_FLAGS = {
    "A1111": ["--no-half", "--use-cpu", "all", "--no-download-sd-model", "--do-not-download-clip"],
    "FORGE": ["--always-cpu"],
    "NEO": ["--skip-python-version-check", "--cpu", "--force-fp32"],
}
PICTURE = {"negative_prompt": "", "seed": 7, "do_not_save_samples": True, "do_not_save_grid": True}
DEMO = PICTURE | {
    "sampler_name": "DDIM",
    "steps": 8,
    "cfg_scale": 4,
    "width": PIXELS,
    "height": PIXELS,
}
NARROW = PICTURE | {"sampler_name": "Euler", "steps": 3, "cfg_scale": 4, "width": 64, "height": 64}
NARROW |= {"scheduler": "Automatic"}
# Another extension, in which pictures fail after their last step while a file "fail" lies beside it.
FAULTY = """from pathlib import Path

from modules import processing

kept = processing.decode_latent_batch


def decode(*args, **given):
    if Path(__file__).with_name("fail").exists():
        raise RuntimeError("asked to fail")
    return kept(*args, **given)


processing.decode_latent_batch = decode
"""


@dataclass(frozen=True)
class Webui:
    """concept: a prompt; live: an adapter with gates; plain: one without; rotated: one by rotations;
    asked: the pictures' settings; families: those that there are checkpoints and adapters of besides."""

    kind: str
    address: str
    data: Path
    concept: str
    live: str
    plain: str
    rotated: str
    word: str
    names: tuple[str, ...]
    asked: dict[str, Any]
    families: tuple[str, ...] = ()

    def call(self, path: str, body: Any = None, user: str = USER) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if user:
            headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        request = urllib.request.Request(self.address + path, data, headers)
        with urllib.request.urlopen(request, timeout=400) as answer:
            return json.load(answer)

    def draw(self, prompt: str, **changes: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
        answer = self.call("/sdapi/v1/txt2img", self.asked | {"prompt": prompt} | changes)
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in answer["images"]]
        return [np.asarray(picture.convert("RGB"), int) for picture in pictures], json.loads(answer["info"])

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Pictures raise after their last step."""
        flag = self.data / "extensions" / "faulty" / "scripts" / "fail"
        flag.touch()
        try:
            yield
        finally:
            flag.unlink()

    def picture(self, prompt: str, **changes: Any) -> np.ndarray:
        return self.draw(prompt, **changes)[0][-1]

    def job(self, path: str, body: Any, seconds: float = 300) -> dict[str, Any]:
        """Begin a job and wait for its end."""
        self.call(f"/spectral/v1/{path}", body)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found: dict[str, Any] = self.call("/spectral/v1/job")
            if found["state"] in ("finished", "stopped", "failed"):
                return found
            time.sleep(0.5)
        pytest.fail(f"{path}: still {found['state']}, {found['doing']}")

    @property
    def log(self) -> str:
        return (self.data / "log.txt").read_text(encoding="utf-8", errors="replace")


def boot(kind: str, data: Path) -> Iterator[Webui]:
    path, python = os.environ.get(f"{kind}_PATH"), os.environ.get(f"{kind}_PYTHON")
    if not path or not python:
        pytest.skip(f"set {kind}_PATH and {kind}_PYTHON to try the extension there")
    (data / "extensions").mkdir(parents=True)
    (data / "tmp").mkdir()  # Neo puts pictures there and does not make it
    (data / "extensions" / "spectral-adapters").symlink_to(ROOT, target_is_directory=True)
    faulty = data / "extensions" / "faulty" / "scripts"
    faulty.mkdir(parents=True)
    (faulty / "faulty.py").write_text(FAULTY, encoding="utf-8")
    described = _models(kind, data, Path(path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Absolute, but not resolved: an environment's Python is a link.
    command = [os.path.abspath(python), "launch.py", *FLAGS, *OWN_FLAGS[kind], "--port", str(port)]
    with open(data / "log.txt", "w") as log:
        process = subprocess.Popen(
            # With a data folder of its own, gradio 4 refuses to serve the host's own scripts and styles.
            [*command, "--data-dir", str(data), "--gradio-allowed-path", path],
            cwd=path,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
        webui = Webui(kind, f"http://127.0.0.1:{port}", data, **described)
        try:
            _wait(webui, process)
            yield webui
        finally:
            process.kill()
            process.wait()


def _models(kind: str, data: Path, host: Path) -> dict[str, Any]:
    """Checkpoints and adapters for it; what :class:`Webui` says of them."""
    models, adapters = data / "models" / "Stable-diffusion", data / "models" / "spectral_adapters"
    if kind == "A1111":
        shutil.copytree(ROOT / "example_workflows/adapters/examples", adapters)
        first = write(models)
        shutil.copy(first, models / "second.safetensors")
        shutil.copy(first.with_suffix(".yaml"), models / "second.yaml")
        _settings(data, "demo.safetensors")
        rotated(first, LAYOUT, adapters / "bot_rotated.safetensors")
        families = tuple(write_family(host, models, adapters) for write_family in (write_sd2, write_sdxl))
        names = ("bot_foura", "bot_rotated", "bot_spectral", "fish_spectral", "house_spectral")
        return {
            "concept": "a photo of <bot>",
            "live": "bot_foura",
            "plain": "bot_spectral",
            "rotated": "bot_rotated",
            "word": "<bot>",
            "names": names,
            "asked": DEMO,
            "families": families,
        }
    kept = os.environ.get("WEBUI_NARROW")  # a file that was written before
    if kept and Path(kept).is_file():
        models.mkdir(parents=True)
        os.link(kept, models / "narrow.safetensors")
    else:
        write_narrow(models / "narrow.safetensors")
    narrow_adapters(models / "narrow.safetensors", adapters)
    os.link(models / "narrow.safetensors", models / "second.safetensors")
    narrowed = data / "extensions" / "narrowed" / "scripts"
    narrowed.mkdir(parents=True)
    (narrowed / "narrowed.py").write_text(NARROWED, encoding="utf-8")
    writers = (write_sdxl_wide, write_flux, write_z_image if kind == "NEO" else write_sd2_wide)
    families = tuple(write_family(models, adapters) for write_family in writers)
    _settings(data, "narrow.safetensors")
    return {
        "concept": "a photo of <narrow>",
        "live": "foura",
        "plain": "lora",
        "rotated": "rotated",
        "word": "<narrow>",
        "names": ("foura", "lora", "rotated", "spectral"),
        "asked": NARROW,
        "families": families,
    }


def _settings(data: Path, checkpoint: str) -> None:
    values = {"sd_model_checkpoint": checkpoint, "VERSION_UID": "PY313"}  # Neo waits for Enter without
    values["show_progress_type"] = "Approx cheap"  # the others download a small model for each family
    (data / "config.json").write_text(json.dumps(values), encoding="utf-8")


def _wait(webui: Webui, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            webui.call("/spectral/v1/adapters")
            return
        except urllib.error.HTTPError as error:  # the page is there, our routes come at the end
            if error.code != 404:
                raise
            time.sleep(1)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    pytest.fail("the webui did not start:\n" + webui.log[-4000:])
