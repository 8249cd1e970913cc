"""Long runs: what grows with time. ``python -m tests.faults.long_runs training`` or ``… host FOLDER``.

training: 5,000 steps on a tiny model, with checkpoints and a log. host: 300 times load, apply, sample and
unload in a real ComfyUI (FOLDER, with its Python in COMFYUI_PYTHON). Memory, open files and threads are taken
at even distances, and the slope of a straight line through the second half of them is stated: the first half
warms up.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEASURED = 60  # times in a run


def measure() -> dict[str, int]:
    """Of this process: resident bytes, open files, threads, objects that the collector knows (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
    }


def slopes(seen: Sequence[tuple[int, dict[str, int]]]) -> dict[str, float]:
    """Growth per unit of the first column, by least squares over the second half."""
    half = seen[len(seen) // 2 :]
    mean_x = sum(x for x, _ in half) / len(half)
    spread = sum((x - mean_x) ** 2 for x, _ in half)
    found = {}
    for kind in half[0][1]:
        mean_y = sum(y[kind] for _, y in half) / len(half)
        found[kind] = sum((x - mean_x) * (y[kind] - mean_y) for x, y in half) / spread
    return found


def training(steps: int) -> list[tuple[int, dict[str, int]]]:
    """A training of so many steps, measured as it goes."""
    from spectral_core.methods import FouRAConfig
    from spectral_core.training.config.config import TrainConfig
    from spectral_core.training.engine.loop import train
    from spectral_core.training.runs.place import Run
    from tests.core.training.training_toy import Toy
    from tests.faults.processes import in_memory

    seen: list[tuple[int, dict[str, int]]] = []
    every = max(1, steps // MEASURED)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] % every == 0:
            gc.collect()
            seen.append((event["step"], measure()))

    with in_memory() as folder:
        toy = Toy(FouRAConfig(4, transform="dft", gate="adaptive"))
        config = TrainConfig(steps=steps, learning_rate=1e-3, ema=0.99)
        run = Run(folder=folder, checkpoint_every=max(1, steps // 20), listener=listen)
        train(toy.setup, config, "foura", run=run)
    return seen


def host(root: Path, cycles: int) -> list[tuple[int, dict[str, int]]]:
    """The same of cycles in a host; ``inside_long_runs.py`` makes them."""
    from tests.host.booted import Checkout, python_of, read_version
    from tests.host.inside import run_script, script_path

    checkout = Checkout(root.resolve(), read_version(root), *python_of(root))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cycles.json").write_text(json.dumps({"cycles": cycles, "measured": MEASURED}))
        done = run_script(checkout, script_path("inside_long_runs.py"), Path(folder), seconds=7200)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        found = json.loads(Path(folder, "seen.json").read_text())
    return [(number, values) for number, values in found]


def main(arguments: Sequence[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("what", choices=("training", "host"))
    parser.add_argument("folder", nargs="?", type=Path, help="of the ComfyUI checkout")
    parser.add_argument("--count", type=int, help="steps or cycles (default: 5000, 300)")
    given = parser.parse_args(arguments)
    if given.what == "host" and given.folder is None:
        parser.error("host needs the folder of a ComfyUI checkout")
    is_training = given.what == "training"
    seen = training(given.count or 5000) if is_training else host(given.folder, given.count or 300)
    first, middle, last = seen[0], seen[len(seen) // 2], seen[-1]
    for kind, slope in slopes(seen).items():
        values = ", ".join(f"{number}: {value[kind]:,}" for number, value in (first, middle, last))
        print(f"{kind}: {values}; slope {slope:+.3g} a {'step' if is_training else 'cycle'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
