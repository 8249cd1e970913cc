#!/usr/bin/env python3
"""One command from a fresh clone to a result. Needs only Python >= 3.10 and a network for the first run.

    python dev.py demo [args]    train two new concepts on the embedded model, fuse them, draw a contact sheet
    python dev.py test [args]    ruff, mypy and pytest; args go to pytest (python dev.py test -k gate)
    python dev.py bench NAME     one of benchmarks/speed and quality, written to benchmarks/results/NAME.json
    python dev.py fuzz [args]    hostile inputs for every reader (python dev.py fuzz --minutes 30 --seed 2)
    python dev.py audit [args]   known vulnerabilities of the pinned releases; installs nothing
    python dev.py venv           only make the environment and print its Python

Every other command first makes the private environment `.venv` beside this file, or repairs it: it is
rebuilt when an earlier installation was interrupted, and brought up to date when a file in requirements/
changed. Two commands started together wait for each other there. Deleting `.venv` is always safe.

Which torch: pip's own configuration decides (pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
On Linux the default index offers the CUDA build, several GB. For the CPU build pass PyTorch's CPU wheel
index, as given on PyTorch's "Get started" page:  python dev.py --index URL demo
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - this line is for the Pythons that are too old
    sys.exit(
        "dev.py needs Python 3.10 or newer; this is Python {}.{} ({}). Run it with a newer one, "
        "for example: python3.11 dev.py demo".format(*sys.version_info[:2], sys.executable)
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
REQUIREMENTS = {"demo": ROOT / "requirements" / "demo.txt", "test": ROOT / "requirements" / "test.txt"}
TORCH = "torch.txt"  # beside them; without hashes, which differ from build to build
OURS = "made-by-dev.py"  # written before anything else; only such an environment is ever deleted here
STAMP = "dev-stamp.json"  # what is installed; written last
MOST_WORKERS = 4  # of the tests; each may start a host, which takes a gigabyte or two
BENCHMARKS = ("speed", "quality")
UNFINISHED = "dev-unfinished"  # there while this script installs; found later, it tells of an interruption


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def say(text):
    print(text, flush=True)


def venv_python(venv):
    """Path of the environment's interpreter; Windows keeps it in another folder."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


# --- which versions are wanted, which are there ---------------------------------------------------


def included_files(path):
    """`path` and every file it includes with `-r`, in order."""
    files = [path]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            files += included_files(path.parent / line[3:].strip())
    return files


def pins_hash(path):
    """SHA-256 of what a requirements file installs; comments and blank lines do not count."""
    digest = hashlib.sha256()
    for file in included_files(path):
        for line in file.read_text(encoding="utf-8").splitlines():
            pin = line.split("#", 1)[0].strip()
            if pin:
                digest.update(pin.encode() + b"\n")
    return digest.hexdigest()


def torch_file(requirements):
    """The file with torch's pin beside `requirements`, as a list of none or one."""
    return [file for file in [requirements.with_name(TORCH)] if file.is_file()]


def wanted_stamp(requirements):
    """What the stamp says once `requirements` is installed: one entry per file, the included ones too."""
    files = included_files(requirements) + torch_file(requirements)
    return {file.name: pins_hash(file) for file in files}


def read_stamp(venv):
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def interpreter_works(venv):
    """Does the environment's Python start, and is it new enough? (Its base may have been removed since.)"""
    check = "import sys, pip; sys.exit(sys.version_info < (3, 10))"
    try:
        return subprocess.run([venv_python(venv), "-c", check], capture_output=True).returncode == 0
    except OSError:
        return False


def up_to_date(venv, requirements):
    """Can the environment be used as it is?"""
    if (venv / UNFINISHED).exists():
        return False
    stamp, wanted = read_stamp(venv), wanted_stamp(requirements)
    return all(stamp.get(name) == pins for name, pins in wanted.items()) and interpreter_works(venv)


# --- making it ------------------------------------------------------------------------------------


@contextmanager
def setup_lock(path):
    """One installation at a time. The operating system drops the lock when its holders have died.

    pip inherits the file, so a pip that outlives a killed dev.py keeps the next one waiting (not on Windows).
    """
    with open(path, "a+b") as file:
        os.set_inheritable(file.fileno(), True)
        waiting = False
        while not try_lock(file):
            if not waiting:
                say("dev.py: another dev.py is setting up the environment; waiting for it")
                waiting = True
            time.sleep(0.5)
        yield


def try_lock(file):
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def discard_if_broken(venv):
    """Remove an environment that an interrupted installation left behind or whose Python is gone."""
    if not venv.exists():
        return
    interrupted = (venv / UNFINISHED).exists()
    if not interrupted and interpreter_works(venv):
        return
    why = "an earlier installation was interrupted" if interrupted else "its Python does not start any more"
    if not (venv / OURS).exists():
        raise SetupError(f"{venv} was not made by dev.py and cannot be used: {why}. Delete it and run again.")
    if Path(sys.prefix).resolve() == venv.resolve():
        raise SetupError(f"{venv} must be rebuilt ({why}) but runs this very command. Use another Python.")
    say(f"dev.py: rebuilding {venv.name}: {why}")
    shutil.rmtree(venv)


def create_venv(venv):
    say(f"dev.py: making {venv.name} with Python {sys.version.split()[0]}")
    venv.mkdir()
    (venv / OURS).touch()
    (venv / UNFINISHED).touch()  # from here on an interruption is recognised
    if subprocess.run([sys.executable, "-m", "venv", str(venv)], close_fds=False).returncode != 0:
        raise SetupError(
            "this Python cannot make virtual environments. On Debian and Ubuntu install the package "
            f"python3.{sys.version_info.minor}-venv; elsewhere use a Python from python.org. Then run again."
        )


def install(venv, requirements, index):
    """pip installs the pins, each file with one of its known SHA-256; then torch, of the build that is
    configured. The stamp is written after the last package."""
    (venv / UNFINISHED).touch()
    if index is None and sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        say("dev.py: no NVIDIA driver found; if pip fetches the CUDA build of torch, see dev.py --help")
    say(f"dev.py: installing requirements/{requirements.name} (the first time takes some minutes)")
    started = time.monotonic()
    pip = [str(venv_python(venv)), "-m", "pip", "install", "--disable-pip-version-check"]
    hashed = ["--require-hashes", "--no-deps", "-r", str(requirements)]  # the pins name every dependency
    for what in (hashed, *(["-r", str(file)] for file in torch_file(requirements))):
        command = [*pip, *what, *(["--extra-index-url", index] if index else [])]
        code = subprocess.run(command, close_fds=False).returncode
        if code != 0:
            raise SetupError(
                f"pip failed with exit code {code}; its message is above. Check the network, the free disk "
                "space and pip's configuration, then run again: what was downloaded is kept in pip's cache."
            )
    stamp = {**read_stamp(venv), **wanted_stamp(requirements)}
    partial = venv / (STAMP + ".part")
    partial.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(partial, venv / STAMP)
    (venv / UNFINISHED).unlink()
    say(f"dev.py: installed in {time.monotonic() - started:.0f} s")


def ensure_venv(requirements, index=None, venv=VENV):
    """The environment's Python, with `requirements` installed. Raises SetupError."""
    with setup_lock(venv.with_name(venv.name + ".lock")):
        if not up_to_date(venv, requirements):
            discard_if_broken(venv)
            if not venv.exists():
                create_venv(venv)
            install(venv, requirements, index)
    return venv_python(venv)


# --- the jobs -------------------------------------------------------------------------------------


def run_job(command, cwd=None):
    """Run a job in the foreground; its exit code, 128 + n when signal n ended it."""
    env = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONUTF8="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env.pop("PYTHONHOME", None)
    code = subprocess.run([str(part) for part in command], cwd=cwd, env=env).returncode
    return code if code >= 0 else 128 - code


def demo(python, args):
    return run_job([python, "-m", "spectral_core", "demo", *args])


def bench_names():
    """Of benchmarks/speed and benchmarks/quality; their own --help says what each measures."""
    found = (p for room in BENCHMARKS for p in (ROOT / "benchmarks" / room).glob("*.py"))
    return {p.stem: f"benchmarks.{p.parent.name}.{p.stem}" for p in sorted(found) if p.stem != "__init__"}


def bench(python, args):
    return run_job([python, "-m", bench_names()[args[0]], *args[1:]], cwd=ROOT)


def fuzz(python, args):
    return run_job([python, "-m", "tests.fuzz.run", *args], cwd=ROOT)


def audit(python, args):
    return run_job([python, ROOT / "tools" / "audit.py", *args])


def cores():
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def test(python, args):
    """ruff, mypy and pytest, all three even when one fails. pytest's exit code 5 is `no test ran`."""
    failed, workers = {}, min(cores(), MOST_WORKERS)
    # Several processes of few threads: the tests' models are too small to keep more threads busy.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    steps = {
        "ruff": [python, "-m", "ruff", "check", "."],
        "mypy": [python, "-m", "mypy", "spectral_core", "nodes", "spectral_webui"],
        "pytest": [python, "-m", "pytest", f"--numprocesses={workers}", "--no-loadscope-reorder", *args],
    }
    for name, command in steps.items():
        say(f"== {name}")
        started = time.monotonic()
        code = run_job(command, cwd=ROOT)
        if code != 0:
            failed[name] = code
        if name != "pytest":  # pytest ends with its own summary and seconds
            say(f"== {name}: {'FAILED' if code else 'ok'}, {time.monotonic() - started:.1f} s")
    if failed:
        say("dev.py test FAILED: " + ", ".join(f"{name} (exit code {code})" for name, code in failed.items()))
    return failed.get("pytest") or (1 if failed else 0)


def venv_only(python, args):
    say(str(python))
    return 0


JOBS = {"demo": (demo, "demo"), "test": (test, "test"), "bench": (bench, "test"), "fuzz": (fuzz, "test")}
JOBS |= {"venv": (venv_only, "test"), "audit": (audit, None)}  # None: with the Python that runs this file


def main(argv):
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", metavar="URL", help="an index for pip besides its configured ones")
    parser.add_argument("command", choices=JOBS, metavar="command", help=", ".join(JOBS))
    # What follows the command is the command's own, options included.
    end = next((i + 1 for i, word in enumerate(argv) if word in JOBS), len(argv))
    options, args = parser.parse_args(argv[:end]), argv[end:]
    job, requirements = JOBS[options.command]
    if options.command == "bench" and args[:1] not in [[name] for name in bench_names()]:
        parser.error(f"bench needs the name of a benchmark, one of: {', '.join(bench_names()) or 'none yet'}")
    if sys.version_info >= (3, 14):
        say("dev.py: the pinned versions are tested with Python 3.10 to 3.13; this one is newer")
    try:
        python = sys.executable
        if requirements is not None:
            python = ensure_venv(REQUIREMENTS[requirements], options.index)
        return job(python, args)
    except SetupError as error:
        say(f"dev.py: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
