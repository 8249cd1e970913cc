"""Runs an ``inside_*.py`` once in a host's own Python, with the host's ``comfy`` importable, on the CPU.

The script finds a folder in ``sys.argv[2]`` and exchanges files in it with the test. No server is started. It
may import the ``inside_*`` modules of every room here by their names.
"""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

from tests.host.booted import NO_HOST, Checkout, find_checkouts

SECONDS = 900  # about 12 on an idle machine, 100 for the names of LoRA files

# The small models of every family, by name, in scripts that only a host's Python can import.
TABLES = {
    "FAMILIES": "inside_models.py",
    "UNETS": "inside_models_unets.py",
    "IMAGES": "inside_models_images.py",
    "VIDEOS": "inside_models_videos.py",
    "OTHERS": "inside_models_others.py",
}

# The host reads its command line only when main.py asks for it; the CPU is chosen before anything looks for a
# GPU, but where a benchmark asks for one.
ON_GPU = "SPECTRAL_ADAPTERS_ON_GPU"
HERE = Path(__file__).resolve().parent
BOOTSTRAP = f"""
import os, runpy, sys
sys.path[0] = os.getcwd()
sys.path += {sorted({str(found.parent) for found in HERE.rglob("inside_*.py")})!r}
import comfy.cli_args
comfy.cli_args.args.cpu = {ON_GPU!r} not in os.environ
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def checkouts() -> list[object]:
    """The parameters for a fixture: one per host version; without a host one that is skipped."""
    found = [pytest.param(checkout, id=checkout.version) for checkout in find_checkouts()]
    return found or [pytest.param(None, id="no host", marks=pytest.mark.skip(reason=NO_HOST))]


def script_path(name: str) -> Path:
    """Where the script of this name lies; each name is there once."""
    (found,) = HERE.rglob(name)
    return found


def families() -> list[str]:
    """The names in the tables of scripts that only a host's Python can import."""
    names = []
    for table, script in TABLES.items():
        tree = ast.parse(script_path(script).read_text(encoding="utf-8"))
        assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
        (found,) = (n.value for n in assigned if ast.unparse(n.targets[0]) == table)
        assert isinstance(found, ast.Dict)
        names += [ast.literal_eval(key) for key in found.keys if key is not None]
    return names


def run_script(
    checkout: Checkout, script: Path, folder: Path, *words: str, seconds: float = SECONDS, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in the host's Python, with these environment variables more."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        [str(checkout.python), "-c", BOOTSTRAP, str(script), str(folder), *words],
        cwd=checkout.root,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
    )


def run_inside(checkout: Checkout, script: str, folder: Path, *words: str) -> None:
    """Run the script of this name; AssertionError with what it printed when it fails."""
    done = run_script(checkout, script_path(script), folder, *words)
    if checkout.guessed and "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"ComfyUI {checkout.version}: the Python that runs the tests lacks its requirements")
    assert done.returncode == 0, f"{script} on ComfyUI {checkout.version}:\n{done.stdout}\n{done.stderr}"
