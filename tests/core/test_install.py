"""install.py on made-up environments: what it accepts, what it refuses and what it says."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "torch": "2.1.0+cu118",
    "safetensors": "0.4.2",
    "numpy": "1.26.4",
    "Pillow": "10.0.0",
    "tqdm": "4.66.1",
}


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("pack_install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def host(tmp_path: Path, version: str | None) -> Path:
    """A folder that looks like ComfyUI, with the pack in its custom_nodes; the pack's folder."""
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "comfyui-spectral-adapters"
    pack.mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").touch()
    if version is not None:
        (tmp_path / "ComfyUI" / "comfyui_version.py").write_text(f'# made\n__version__ = "{version}"\n')
    return pack


@pytest.mark.parametrize("version", ["0.3.64", "0.3.100", "0.28.0", "1.0"])
def test_good_environment_in_a_host(install, tmp_path, capsys, version):
    assert install.main(host(tmp_path, version), (3, 10, 0), GOOD.get) == 0
    out = capsys.readouterr().out
    assert f"ComfyUI {version}" in out
    assert "Everything it needs is here" in out


@pytest.mark.parametrize(
    ("version", "says"), [("0.3.63", "0.3.63"), ("0.2.99", "0.2.99"), (None, "unknown version")]
)
def test_old_host_is_refused(install, tmp_path, capsys, version, says):
    assert install.main(host(tmp_path, version), (3, 11, 7), GOOD.get) == 1
    out = capsys.readouterr().out
    assert says in out
    assert "0.3.64 or newer" in out
    assert f"Update {tmp_path / 'ComfyUI'}" in out


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("torch", None, "torch is not installed: 2.1 or newer"),
        ("torch", "2.0.1", "torch 2.0.1 is too old"),
        ("torch", "1.13.1+cu117", "torch 1.13.1+cu117 is too old"),
        ("safetensors", "0.4.1", "safetensors 0.4.1 is too old"),
        ("numpy", None, "numpy is not installed"),
        ("Pillow", None, "Pillow is not installed"),
        ("tqdm", None, "tqdm is not installed"),
    ],
)
def test_missing_or_old_package_is_named(install, tmp_path, capsys, name, version, says):
    assert install.main(tmp_path, (3, 12, 1), {**GOOD, name: version}.get) == 1
    out = capsys.readouterr().out
    assert says in out
    assert "requirements.txt" in out, "it says what to do"
    assert out.count("  ! ") == 2


def test_old_python_is_refused(install, tmp_path, capsys):
    assert install.main(tmp_path, (3, 9, 18), GOOD.get) == 1
    assert "Python 3.9.18 is too old" in capsys.readouterr().out


def test_without_a_host_the_core_is_usable(install, tmp_path, capsys):
    assert install.main(tmp_path, (3, 13, 0), GOOD.get) == 0
    assert "not found two folders up" in capsys.readouterr().out


def test_linked_pack_finds_its_host(install, tmp_path):
    pack = host(tmp_path, "0.28.0")
    pack.rmdir()
    (tmp_path / "clone").mkdir()
    pack.symlink_to(tmp_path / "clone", target_is_directory=True)
    assert install.find_host(pack) == tmp_path / "ComfyUI"
    assert install.find_host(tmp_path / "clone") is None


WEBUI = {**GOOD, "torch": "2.1.2+cu121", "numpy": "1.26.2", "Pillow": "9.5.0"}


def webui(tmp_path: Path) -> Path:
    """A folder that looks like Automatic1111, with the pack in its extensions; the pack's folder."""
    pack = tmp_path / "webui" / "extensions" / "comfyui-spectral-adapters"
    pack.mkdir(parents=True)
    (tmp_path / "webui" / "webui.py").touch()
    return pack


def test_a_webui_with_its_own_pins_is_fine(install, tmp_path, capsys):
    assert install.main(webui(tmp_path), (3, 10, 6), WEBUI.get) == 0
    out = capsys.readouterr().out
    assert "torch 2.1.2+cu121" in out
    assert "ComfyUI" not in out and "!" not in out


@pytest.mark.parametrize(
    ("python", "name", "version", "says"),
    [
        ((3, 10, 6), "torch", "2.0.1", "torch 2.0.1 is too old"),
        ((3, 10, 6), "torch", None, "torch is not installed"),
        ((3, 9, 1), "torch", "2.1.2", "Python 3.9.1 is too old"),
    ],
)
def test_a_webui_is_told_and_never_stopped(install, tmp_path, capsys, python, name, version, says):
    assert install.main(webui(tmp_path), python, {**WEBUI, name: version}.get) == 0
    out = capsys.readouterr().out
    assert says in out
    assert "requirements" not in out and "ComfyUI" not in out


def test_a_folder_called_extensions_alone_is_no_webui(install, tmp_path):
    pack = webui(tmp_path)
    assert install.find_webui(pack) == tmp_path / "webui"
    (tmp_path / "webui" / "webui.py").unlink()
    assert install.find_webui(pack) is None


def test_a_webui_whose_extensions_lie_elsewhere(install, tmp_path, monkeypatch, capsys):
    """Its option --data-dir."""
    webui(tmp_path)
    pack = tmp_path / "data" / "extensions" / "spectral-adapters"
    pack.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(pack), str(tmp_path / "webui"), "elsewhere"])
    assert install.main(pack, (3, 10, 6), WEBUI.get) == 0
    assert "ComfyUI" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "path", [str(pack)])
    assert install.find_webui(pack) is None


def test_as_the_manager_runs_it():
    run = subprocess.run([sys.executable, "install.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in run.stdout
    assert "torch" in run.stdout


def test_it_needs_only_the_standard_library_and_starts_no_process():
    tree = ast.parse((ROOT / "install.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"importlib", "pathlib", "re", "sys"}
