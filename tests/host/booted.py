"""A real ComfyUI for the tests: found on this machine, started once per version, always ended.

Which hosts: every folder named in $COMFYUI_PATH (several separated as in $PATH); when that is not set, the
ComfyUI that the pack is installed in, and every checkout in ~/comfy (comfy-cli's default is ~/comfy/ComfyUI).
Its Python: $COMFYUI_PYTHON, else the checkout's .venv, else the one that runs the tests.

The host's code is never written to: models, output, settings and custom nodes lie in a temporary folder, the
database is in memory, and no byte code is written. The pack is linked into that folder's custom_nodes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from spectral_core.errors import SpectralAdapterError

ROOT = Path(__file__).resolve().parents[2]
PACK_NAME = "comfyui-spectral-adapters"
NO_HOST = "no ComfyUI found; set COMFYUI_PATH to a checkout"
BOOT_SECONDS = 300  # about 10 on an idle machine

# Runs main.py and ends the process as soon as the test process is gone, however that ended: the pipe on stdin
# is then closed by the operating system.
LEASH = """
import os, runpy, sys, threading
def leave_with_the_tests():
    sys.stdin.buffer.read()
    os._exit(1)
threading.Thread(target=leave_with_the_tests, daemon=True).start()
sys.path[0] = os.getcwd()
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


class HostUnusable(Exception):
    """A checkout was found, but no Python that has its requirements; not a fault of the pack."""


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI folder, its version, and the Python to run it with; ``guessed``: nobody named that Python."""

    root: Path
    version: str
    python: Path
    guessed: bool


def read_version(root: Path) -> str:
    """The version a checkout states; ``unknown`` for one that does not."""
    file = root / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"__version__\s*=\s*\"([^\"]+)", text)
    return found.group(1) if found else "unknown"


def candidate_folders() -> list[Path]:
    """Folders that may be checkouts, in order of preference."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folders = [Path(name).expanduser() for name in named.split(os.pathsep) if name]
        missing = [str(folder) for folder in folders if not (folder / "main.py").is_file()]
        if missing:
            raise FileNotFoundError(f"COMFYUI_PATH names no ComfyUI checkout: {', '.join(missing)}")
        return folders
    around = ROOT.parent.parent
    installed_in = [around] if ROOT.parent.name == "custom_nodes" else []
    default = Path("~/comfy").expanduser()
    return [*installed_in, default / "ComfyUI", *sorted(default.glob("*"))]


def find_checkouts() -> list[Checkout]:
    """The hosts to test on, one per version."""
    found: dict[str, Checkout] = {}
    for folder in candidate_folders():
        if not ((folder / "main.py").is_file() and (folder / "comfy").is_dir()):
            continue
        version = read_version(folder)
        if version not in found:
            found[version] = Checkout(folder.resolve(), version, *python_of(folder))
    return list(found.values())


def python_of(root: Path) -> tuple[Path, bool]:
    """(the checkout's Python, is it only a guess)."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named), False
    own = root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return (own, False) if own.exists() else (Path(sys.executable), True)


def link_pack(custom_nodes: Path) -> Path:
    """Link the pack into ``custom_nodes``; where links are forbidden (Windows), copy what it reads."""
    custom_nodes.mkdir(parents=True)
    target = custom_nodes / PACK_NAME
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        unread = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "demo_output", "docs")
        shutil.copytree(ROOT, target, ignore=unread)
    return target


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Host:
    """One running ComfyUI. ``folder`` holds its models, input, output, custom_nodes and log."""

    def __init__(self, checkout: Checkout, folder: Path, more: Sequence[str] = ()) -> None:
        """more: further arguments of its command line."""
        self.checkout = checkout
        self.more = tuple(more)
        self.folder = folder
        self.pack = link_pack(folder / "custom_nodes")
        self.log_file = folder / "host.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = time.time()
        self.log_at_start = ""  # what it had printed when it first answered

    @property
    def log(self) -> str:
        """Everything the host printed so far, without colours."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def start(self, timeout: float = BOOT_SECONDS) -> None:
        """Start and wait until it answers. RuntimeError with the end of the log when it does not."""
        arguments = ["--cpu", "--base-directory", str(self.folder), "--port", str(self.port)]
        arguments += ["--listen", "127.0.0.1", "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        arguments += self.more
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [str(self.checkout.python), "-c", LEASH, *arguments],
                cwd=self.checkout.root,
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + timeout
        while not self._answers():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                self.stop()
                self._explain("ended by itself" if ended else f"is silent after {timeout} s")
            time.sleep(0.25)
        self.log_at_start = self.log

    def _answers(self) -> bool:
        try:
            self.get("/system_stats", timeout=5)
        except (OSError, urllib.error.URLError):
            return False
        return True

    def _explain(self, what: str) -> NoReturn:
        tail = "\n".join(self.log.splitlines()[-25:])
        missing = re.search(r"ModuleNotFoundError: No module named '([^']+)'", tail)
        if missing and self.checkout.guessed:
            raise HostUnusable(
                f"ComfyUI {self.checkout.version}: the Python that runs the tests lacks {missing.group(1)}; "
                "set COMFYUI_PYTHON"
            )
        raise RuntimeError(f"ComfyUI {self.checkout.version} in {self.checkout.root} {what}:\n{tail}")

    def stop(self) -> None:
        """End the process, by force if it does not listen. Safe to call twice."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=10)
        if self.process.stdin is not None:
            self.process.stdin.close()

    def get(self, path: str, timeout: float = 60) -> Any:
        """The JSON that ``GET path`` answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
            return json.loads(answer.read())

    def post(self, path: str, payload: object, timeout: float = 60) -> Any:
        """The JSON that ``POST path`` answers; None for an empty answer. An error status raises HTTPError."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(payload).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def run(self, graph: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queue a graph in API form and wait for it; its history entry (``status``, ``outputs``)."""
        prompt_id = self.post("/prompt", {"prompt": graph})["prompt_id"]
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry.get("status") is not None:
                return dict(entry)
            time.sleep(0.2)
        raise TimeoutError(f"the graph was not done after {timeout} s; the log ends with\n{self.log[-3000:]}")

    def complaints(self) -> list[str]:
        """What the log tells of failed imports and exceptions.

        Of any while the host started, and later of those that went through the pack, but for the pack's own
        errors: tests give it something to refuse.
        """
        signs = ("Traceback (most recent call last)", "IMPORT FAILED", "Cannot import")
        lines = [line for line in self.log_at_start.splitlines() if any(sign in line for sign in signs)]
        later = self.log[len(self.log_at_start) :]
        raised = re.findall(r"Traceback \(most recent call last\):\n((?:[ \t].*\n)*)(\S.*)", later)
        own = f"{SpectralAdapterError.__module__}."
        return lines + [
            error for frames, error in raised if PACK_NAME in frames and not error.startswith(own)
        ]
