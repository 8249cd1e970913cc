"""The pack loads in every real host: without an error, with all its nodes and its web files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.host import booted
from tests.host.booted import PACK_NAME, ROOT, Host


def test_host_is_the_version_it_says(host: Host) -> None:
    assert host.get("/system_stats")["system"]["comfyui_version"] == host.checkout.version


def test_pack_is_imported_without_an_error(host: Host) -> None:
    loaded = [line for line in host.log.splitlines() if " seconds" in line and PACK_NAME in line]
    assert len(loaded) == 1, host.log
    assert "IMPORT FAILED" not in loaded[0]


def test_log_tells_of_no_exception(host: Host) -> None:
    assert "Import times for custom nodes" in host.log_at_start, "printed before it answers"
    assert host.complaints() == []


def test_every_node_is_offered_from_the_pack(host: Host, pack: ModuleType) -> None:
    offered = host.get("/object_info")
    assert "KSampler" in offered
    ours = {name for name, info in offered.items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert ours == set(pack.NODE_CLASS_MAPPINGS)
    for name in ours:
        assert offered[name]["display_name"] == pack.NODE_DISPLAY_NAME_MAPPINGS[name]


def test_every_script_is_served(host: Host) -> None:
    prefix = f"/extensions/{PACK_NAME}/"
    served = {path.removeprefix(prefix) for path in host.get("/extensions") if path.startswith(prefix)}
    assert served == {file.relative_to(ROOT / "web").as_posix() for file in (ROOT / "web").rglob("*.js")}


def test_checkout_is_left_as_it_was(host: Host) -> None:
    written = []
    for folder, subfolders, files in os.walk(host.checkout.root):
        subfolders[:] = [name for name in subfolders if name not in (".venv", ".git", "__pycache__")]
        written += [f for f in (os.path.join(folder, name) for name in files) if changed_since(f, host)]
    assert written == []


def changed_since(file: str, host: Host) -> bool:
    return os.path.exists(file) and os.path.getmtime(file) > host.started_at


# Without a host: the finder, the leash and the reading of the log themselves.


def test_what_counts_as_a_complaint(tmp_path) -> None:
    host = Host(booted.Checkout(tmp_path, "1.0", Path(sys.executable), True), tmp_path / "base")

    def raised(file: str, error: str) -> str:
        return f'Traceback (most recent call last):\n  File "{file}", line 1, in run\n    x = y\n{error}\n'

    ours = f"custom_nodes/{PACK_NAME}/nodes/load.py"
    start = "Import times for custom nodes\n" + raised("comfy/sd.py", "KeyError: 1")
    refused = raised(ours, "spectral_adapters.NotConnected: no CLIP")
    later = raised("sqlalchemy/pool.py", "ProgrammingError: thread") + refused + raised(ours, "KeyError: 'x'")
    host.log_file.write_text(start + later)
    host.log_at_start = start
    assert host.complaints() == ["Traceback (most recent call last):", "KeyError: 'x'"]


def fake_checkout(folder: Path, version: str) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(120)\n")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_named_checkouts_win_and_each_version_counts_once(tmp_path, monkeypatch) -> None:
    names = [fake_checkout(tmp_path / n, v) for n, v in (("a", "1.0"), ("b", "2.0"), ("c", "1.0"))]
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join(map(str, names)))
    monkeypatch.setenv("COMFYUI_PYTHON", "some-python")
    found = booted.find_checkouts()
    assert [(c.root.name, c.version, str(c.python), c.guessed) for c in found] == [
        ("a", "1.0", "some-python", False),
        ("b", "2.0", "some-python", False),
    ]


def test_a_wrong_path_is_an_error_not_a_skip(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="names no ComfyUI checkout"):
        booted.find_checkouts()


def test_host_without_its_requirements_is_told_apart(tmp_path) -> None:
    root = fake_checkout(tmp_path / "comfyui", "1.0")
    (root / "main.py").write_text("import no_such_module_of_the_host\n")
    for guessed, error in ((True, booted.HostUnusable), (False, RuntimeError)):
        checkout = booted.Checkout(root, "1.0", Path(sys.executable), guessed)
        with pytest.raises(error, match="no_such_module_of_the_host"):
            Host(checkout, tmp_path / f"base-{guessed}").start(timeout=30)


def test_silent_host_is_ended(tmp_path) -> None:
    checkout = booted.Checkout(fake_checkout(tmp_path / "comfyui", "1.0"), "1.0", Path(sys.executable), True)
    host = Host(checkout, tmp_path / "base")
    with pytest.raises(RuntimeError, match="is silent after"):
        host.start(timeout=1.0)
    assert host.process is not None and host.process.poll() is not None


@pytest.mark.skipif(os.name == "nt", reason="looks for the process by a POSIX signal")
def test_host_dies_with_the_tests(tmp_path) -> None:
    """The test process is killed outright; nothing but the closed pipe tells the host."""
    root = fake_checkout(tmp_path / "comfyui", "1.0")
    tests = (
        "import pathlib, sys, time\n"
        "from tests.host.booted import Checkout, Host\n"
        f"host = Host(Checkout(pathlib.Path({str(root)!r}), '1.0', pathlib.Path(sys.executable), True), "
        f"pathlib.Path({str(tmp_path / 'base')!r}))\n"
        "host._answers = lambda: 'up' in host.log\n"
        "host.start(timeout=30)\n"
        "print(host.process.pid, flush=True)\n"
        "time.sleep(120)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", tests], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    host_pid = int(process.stdout.readline())
    os.kill(host_pid, 0)
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(host_pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(host_pid, 9)
    pytest.fail("the host outlived the tests")
