"""Run the experiments behind docs/evidence.md, or write that page from what is there.

    python -m benchmarks.claims run [EXPERIMENT …] [--setting small] [--folder DIR] [--threads N]
    python -m benchmarks.claims report [--setting full] [--folder DIR]

Runs go on where they were stopped; the same command in two terminals shares the work.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.claims import experiments
from benchmarks.claims.lab import SETTINGS, Busy, Lab

FOLDER = Path.home() / ".cache" / "spectral_adapters" / "claims"
WAIT = 5.0  # seconds, while only cells of other processes are left


def run(lab: Lab, names: list[str]) -> None:
    """Make every cell of the experiments."""
    waiting = [cell for name in names for cell in experiments.EXPERIMENTS[name].cells(lab)]
    total, done = len(waiting), 0
    while waiting:
        busy = []
        for name, make in waiting:
            try:
                seconds = lab.cell(name, make)["cpu_seconds"]
                done += 1
                print(f"{done}/{total} {name} {seconds:.0f} s", flush=True)
            except Busy as other:
                busy.append((name, make))
                print(f"{name}: {other} is under way elsewhere", flush=True)
        if len(busy) == len(waiting):
            time.sleep(WAIT)
        waiting = busy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument(
        "experiments", nargs="*", help=f"of {', '.join(experiments.EXPERIMENTS)}; all without any"
    )
    parser.add_argument("--setting", choices=list(SETTINGS), default="full")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if unknown := set(options.experiments) - set(experiments.EXPERIMENTS):
        parser.error(
            f"no experiment {sorted(unknown)[0]!r}: expected some of {', '.join(experiments.EXPERIMENTS)}"
        )
    torch.set_num_threads(options.threads)
    lab = Lab(options.folder, SETTINGS[options.setting])
    names = options.experiments or list(experiments.EXPERIMENTS)
    if options.command == "run":
        run(lab, names)
        return 0
    return experiments.report(lab)


if __name__ == "__main__":
    sys.exit(main())
