"""The wheel away from the repository: what README promises to someone who installs it works there.

With ``SPECTRAL_ADAPTERS_WHEEL=full`` it is also installed with ``[all]`` into a new environment, from pip's
index (several gigabytes, minutes); else beside the libraries of the tests, which takes seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import dev
import spectral_core

ROOT = Path(dev.__file__).parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "spectral_core", "demo_model")
DOG = ROOT / "example_workflows" / "adapters" / "examples" / "bot_foura.safetensors"
STEPS = "steps=200"  # in README's lines; two are enough to see them run
FULL = os.environ.get("SPECTRAL_ADAPTERS_WHEEL") == "full"


def run(command: list[str | Path], cwd: Path, path: Path | None = None) -> str:
    """What it printed; no module of the repository can be found there."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONUTF8": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that setuptools' own folders do not come into the repository."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder]
    run([*build, source], folder)
    (made,) = folder.glob("*.whl")
    return made


def readme_lines() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert block.count(STEPS) == 1
    return str(block.replace(STEPS, "steps=2"))


def use(python: Path, command: Path, place: Path, path: Path | None = None) -> None:
    """README's command and lines, in a folder of the user's."""
    from demo_model.draw import draw_concept

    assert "usage: spectral-adapters" in run([command, "--help"], place, path)
    pictures = place / "pictures" / "vase"
    pictures.mkdir(parents=True)
    for i in range(2):
        picture, caption = draw_concept("house", i)
        picture.save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(caption.replace("house", "<TOK>"), encoding="utf-8")
    shutil.copy(DOG, place / "dog.safetensors")
    run([python, "-c", readme_lines()], place, path)
    made = {file.name for file in place.rglob("*.safetensors")}
    assert {"vase.safetensors", "both_lora.safetensors"} <= made, made
    run([command, "demo", "--quick", "--output", "drawn"], place, path)
    assert (place / "drawn" / "contact_sheet.png").is_file() and (place / "drawn" / "report.json").is_file()


@pytest.mark.slow
def test_beside_the_libraries_of_the_tests(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    target, place = tmp_path / "installed", tmp_path / "place"
    place.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target]
    run([*install, wheel], tmp_path)
    where = run([sys.executable, "-c", "import spectral_core as s; print(s.__file__)"], place, target)
    assert Path(where.strip()).is_relative_to(target)
    use(Path(sys.executable), target / "bin" / "spectral-adapters", place, target)


@pytest.mark.skipif(not FULL, reason="SPECTRAL_ADAPTERS_WHEEL=full installs the wheel with [all]")
def test_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = dev.venv_python(tmp_path / "env")
    index = ["--extra-index-url", url] if (url := os.environ.get("SPECTRAL_ADAPTERS_INDEX")) else []
    package = f"comfyui-spectral-adapters[all] @ {wheel.as_uri()}"
    run([python, "-m", "pip", "install", *index, package], tmp_path)
    (tmp_path / "place").mkdir()
    use(python, python.with_name("spectral-adapters"), tmp_path / "place")


def test_the_registry_gets_what_it_asks_for() -> None:
    """Its specification: docs.comfy.org/registry/specifications."""
    from PIL import Image

    # setuptools' own reader: tomllib is newer than Python 3.10
    reader = pytest.importorskip("setuptools.compat.py310")
    project = reader.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    urls, comfy = project["project"]["urls"], project["tool"]["comfy"]
    assert {"Repository", "Documentation"} <= {*urls}
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["version"] == spectral_core.__version__
    assert "Operating System :: OS Independent" in project["project"]["classifiers"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"]
    for name, ratio, most in (("Icon", 1, 400), ("Banner", 21 / 9, 2000)):
        file = ROOT / comfy[name].partition("/main/")[2]
        width, height = Image.open(file).size
        assert abs(width / height - ratio) < 1e-3 and width <= most, name
        assert comfy[name].startswith(urls["Repository"].replace("github.com", "raw.githubusercontent.com"))
