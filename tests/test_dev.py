"""dev.py: the environment is made, reused, updated, repaired and locked; exit codes propagate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dev

ROOT = Path(dev.__file__).parent


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    """A requirements file that includes another one and installs nothing, so no test needs a network."""
    (tmp_path / "base.txt").write_text("# nothing\n")
    (tmp_path / "all.txt").write_text("# more\n-r base.txt\n")
    return tmp_path / "all.txt"


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the commands dev.py runs instead of running pip and venv; the interpreter counts as working."""
    calls: list[list[str]] = []

    def fake_run(command, **_):
        calls.append([str(part) for part in command])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(dev.subprocess, "run", fake_run)
    return calls


def pip_calls(calls: list[list[str]]) -> list[list[str]]:
    return [call for call in calls if "install" in call]


def test_real_environment_is_made_once_and_repaired_after_an_interruption(tmp_path, pins, capfd):
    venv = tmp_path / "env"
    python = dev.ensure_venv(pins, venv=venv)
    prefix = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert Path(prefix.stdout.strip()).resolve() == venv.resolve()
    assert set(json.loads((venv / dev.STAMP).read_text())) == {"all.txt", "base.txt"}
    assert not (venv / dev.UNFINISHED).exists()
    capfd.readouterr()

    dev.ensure_venv(pins, venv=venv)
    assert capfd.readouterr().out == "", "an up-to-date environment is used without a word"

    (venv / dev.UNFINISHED).touch()
    (venv / "half-installed").touch()
    dev.ensure_venv(pins, venv=venv)
    assert "interrupted" in capfd.readouterr().out
    assert not (venv / "half-installed").exists(), "an interrupted installation starts from nothing"


def test_included_requirements_count_for_the_hash_and_comments_do_not(pins):
    before = dev.wanted_stamp(pins)
    (pins.parent / "base.txt").write_text("# another comment\n\n")
    assert dev.wanted_stamp(pins) == before
    (pins.parent / "base.txt").write_text("einops==0.8.2\n")
    after = dev.wanted_stamp(pins)
    assert after["all.txt"] != before["all.txt"]
    assert after["base.txt"] != before["base.txt"]


def test_changed_pins_install_again_into_the_same_environment(tmp_path, pins, installs):
    venv = tmp_path / "env"
    dev.ensure_venv(pins, venv=venv)
    dev.ensure_venv(pins, venv=venv)
    assert len(pip_calls(installs)) == 1
    (pins.parent / "base.txt").write_text("einops==0.8.2\n")
    dev.ensure_venv(pins, venv=venv)
    assert len(pip_calls(installs)) == 2
    assert (venv / dev.OURS).exists()


def test_the_larger_set_of_pins_serves_the_smaller(tmp_path, pins, installs):
    venv = tmp_path / "env"
    dev.ensure_venv(pins, venv=venv)
    dev.ensure_venv(pins.parent / "base.txt", venv=venv)
    assert len(pip_calls(installs)) == 1


def test_index_goes_to_pip_and_no_registry_is_hard_coded(tmp_path, pins, installs):
    dev.ensure_venv(pins, index="file:///wheels", venv=tmp_path / "a")
    assert pip_calls(installs)[0][-2:] == ["--extra-index-url", "file:///wheels"]
    dev.ensure_venv(pins, venv=tmp_path / "b")
    assert not any(word.endswith("-url") or "://" in word for word in pip_calls(installs)[1])


def test_failed_pip_leaves_a_trace_and_a_message(tmp_path, pins, monkeypatch):
    def fake_run(command, **_):
        return subprocess.CompletedProcess(command, 1 if "install" in command else 0)

    monkeypatch.setattr(dev.subprocess, "run", fake_run)
    with pytest.raises(dev.SetupError, match="pip failed with exit code 1"):
        dev.ensure_venv(pins, venv=tmp_path / "env")
    assert (tmp_path / "env" / dev.UNFINISHED).exists()
    assert not (tmp_path / "env" / dev.STAMP).exists()


def test_an_environment_of_somebody_else_is_never_deleted(tmp_path, pins):
    venv = tmp_path / "env"
    venv.mkdir()
    (venv / "precious").touch()
    with pytest.raises(dev.SetupError, match="was not made by dev"):
        dev.ensure_venv(pins, venv=venv)
    assert (venv / "precious").exists()


def test_two_set_ups_wait_for_each_other(tmp_path):
    lock, log = tmp_path / "lock", tmp_path / "log"
    holder = (
        "import dev, pathlib, sys, time\n"
        "with dev.setup_lock(sys.argv[1]):\n"
        "    log = pathlib.Path(sys.argv[2])\n"
        "    log.write_text('held'); time.sleep(1.0); log.write_text('done')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(lock), str(log)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while not log.exists() or log.read_text() != "held":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with dev.setup_lock(lock):
            assert log.read_text() == "done"
    finally:
        process.wait(timeout=20)


@pytest.mark.parametrize("code", [0, 1, 5, 42])
def test_exit_code_of_a_job_is_its_own(code):
    assert dev.run_job([sys.executable, "-c", f"raise SystemExit({code})"]) == code


@pytest.mark.skipif(os.name == "nt", reason="signals end processes on POSIX only")
def test_exit_code_of_a_killed_job():
    assert dev.run_job([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ({}, 0),
        ({"ruff": 1}, 1),
        ({"mypy": 2}, 1),
        ({"pytest": 1}, 1),
        ({"pytest": 5}, 5),
        ({"ruff": 1, "pytest": 2}, 2),
    ],
)
def test_every_check_runs_and_any_failure_counts(failing, expected, monkeypatch, capsys):
    ran = []

    def fake_job(command, cwd=None):
        ran.append(command[2])
        return failing.get(command[2], 0)

    monkeypatch.setattr(dev, "run_job", fake_job)
    assert dev.test("python", ["-k", "gate"]) == expected
    assert ran == ["ruff", "mypy", "pytest"]
    out = capsys.readouterr().out
    assert ("FAILED" in out) == bool(failing)
    assert all(f"== {step}" in out for step in ran)


def test_options_after_the_command_belong_to_the_command(monkeypatch):
    seen = {}

    def fake_venv(requirements, index):
        seen["pins"] = requirements.name
        return "python"

    def fake_demo(python, args):
        seen.update(python=python, args=args)
        return 7

    monkeypatch.setattr(dev, "ensure_venv", fake_venv)
    monkeypatch.setitem(dev.JOBS, "demo", (fake_demo, "demo"))
    assert dev.main(["demo", "--images", "test", "--help", "-k"]) == 7
    assert seen == {"pins": "demo.txt", "python": "python", "args": ["--images", "test", "--help", "-k"]}


def test_bench_without_a_known_name_installs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(dev, "ensure_venv", lambda *_: pytest.fail("the name is checked first"))
    with pytest.raises(SystemExit, match="2"):
        dev.main(["bench", "no_such_benchmark"])
    assert "bench needs the name" in capsys.readouterr().err


def pins_of(name: str) -> list[Any]:
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements" / name).read_text().splitlines()
    words = [line.split("#", 1)[0].strip(" \\") for line in lines]
    return [Requirement(line) for line in words if line and not line.startswith("-")]


@pytest.mark.parametrize("name", ["demo", "test"])
def test_every_pin_has_hashes_and_is_what_is_meant(name):
    def told(pinned):
        return {(p.name, str(p.specifier), py) for p in pinned for py in PYTHONS if holds(p, py)}

    assert told(pins_of(f"{name}.txt")) == told(pins_of(f"{name}.in"))
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("#", "-r")))
    for entry in re.split(r"\n(?! )", text):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_what_is_hashed_is_installed_with_nothing_else_and_torch_after_it(tmp_path, pins, installs):
    (pins.parent / dev.TORCH).write_text("torch==2.13.0\n")
    dev.ensure_venv(pins, index="file:///wheels", venv=tmp_path / "env")
    hashed, torch = pip_calls(installs)
    assert {"--require-hashes", "--no-deps", str(pins)} <= set(hashed)
    assert "--require-hashes" not in torch and str(pins.parent / dev.TORCH) in torch
    assert hashed[-1] == torch[-1] == "file:///wheels"
    (pins.parent / dev.TORCH).write_text("torch==2.14.0\n")
    dev.ensure_venv(pins, venv=tmp_path / "env")
    assert len(pip_calls(installs)) == 4, "another torch is installed too"


def test_audit_says_what_is_known_of_the_pins(tmp_path, capsys, monkeypatch):
    from tools import audit

    wanted = audit.pins()
    assert {("torch", "2.13.0"), ("safetensors", "0.8.0")} <= set(wanted) and len(wanted) > 80
    entries = [
        {"id": "A", "affected": [{"package": {"name": "SafeTensors"}, "versions": ["0.7.0", "0.8.0"]}]},
        {"id": "B", "affected": [{"package": {"name": "safetensors"}, "versions": ["0.7.0"]}]},
        {"id": "C", "withdrawn": "x", "affected": [{"package": {"name": "torch"}, "versions": ["2.13.0"]}]},
    ]
    export = tmp_path / "all.zip"
    with zipfile.ZipFile(export, "w") as file:
        for entry in entries:
            file.writestr(f"{entry['id']}.json", json.dumps(entry))
    assert audit.main(["--database", str(export)]) == 1
    assert "safetensors==0.8.0: A (" in capsys.readouterr().out

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(audit.urllib.request, "urlopen", unreachable)
    assert audit.main([]) == 0 and "skipped" in capsys.readouterr().out
    assert audit.main(["--database", str(tmp_path / "none.zip")]) == 1


PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def holds(pin, python: str) -> bool:
    versions = {"python_version": python, "python_full_version": f"{python}.0"}
    return pin.marker is None or pin.marker.evaluate(versions)


def test_pins_are_exact_and_cover_the_supported_pythons():
    files = [*dev.included_files(dev.REQUIREMENTS["test"]), ROOT / "requirements" / dev.TORCH]
    pinned = [pin for file in files for pin in pins_of(file.name)]
    assert len(pinned) > 30
    for requirement in pinned:
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
    for python in PYTHONS:
        names = [r.name for r in pinned if holds(r, python)]
        assert len(names) == len(set(names)), f"two pins of one package on Python {python}"
        assert {"torch", "diffusers", "transformers", "numpy", "pytest", "peft"} <= set(names)


@pytest.mark.skipif(os.name == "nt", reason="locks are inherited on POSIX only")
def test_the_lock_outlives_a_killed_set_up_while_its_pip_runs(tmp_path):
    script = (
        "import dev, subprocess, sys\n"
        "with dev.setup_lock(sys.argv[1]):\n"
        "    pip = [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(2)']\n"
        "    subprocess.run(pip, close_fds=False)\n"
    )
    lock = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", script, lock], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.wait(timeout=20)
    with open(lock, "a+b") as file:
        assert not dev.try_lock(file), "pip still writes into the environment"
    with dev.setup_lock(lock):
        pass
    process.stdout.close()
