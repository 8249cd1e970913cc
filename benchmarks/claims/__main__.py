"""Run the experiments behind docs/evidence.md, or write that page from what is there.

    python -m benchmarks.claims run [EXPERIMENT …] [--again] [--setting small] [--folder DIR] [--threads N]
    python -m benchmarks.claims report [--setting full] [--folder DIR]

Runs go on where they were stopped; the same command in two terminals shares the work. Numbers that came with
the project are not made anew without ``--again``.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.claims import experiments, learning, report
from benchmarks.claims.lab import SETTINGS, Busy, Lab

FOLDER = Path.home() / ".cache" / "spectral_adapters" / "claims"
WAIT = 5.0  # seconds, while only cells of other processes are left


def work(lab: Lab, waiting: experiments.Cells) -> None:
    """Make every cell; those that another process makes come last."""
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
    parser.add_argument("--seeds", type=int, help="only the first N; the others can follow later")
    parser.add_argument("--again", action="store_true", help="also what came with the project")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--photos", type=learning.photo_folder, metavar="DIR", help="of a real concept, for learning"
    )
    parser.add_argument("--docs", type=Path, default=report.DOCS, help="where report writes evidence.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.experiments) - set(experiments.EXPERIMENTS):
        parser.error(
            f"no experiment {sorted(unknown)[0]!r}: expected some of {', '.join(experiments.EXPERIMENTS)}"
        )
    torch.set_num_threads(options.threads)
    setting = SETTINGS[options.setting]
    seeds = setting.seeds[: options.seeds]
    lab = Lab(options.folder, replace(setting, seeds=seeds), options.photos, options.again)
    names = options.experiments or list(experiments.EXPERIMENTS)
    if options.command == "run":
        work(lab, [cell for name in names for cell in experiments.EXPERIMENTS[name].cells(lab)])
        return 0
    print(f"written: {lab.publish().name}, {report.write(lab, options.docs).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
