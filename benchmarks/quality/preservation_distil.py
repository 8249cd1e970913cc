"""The concepts and nothing else, in a distillation: how far the distilled adapter moves the model under
prompts without a concept, at the same fidelity, with and without ``preserve``; see
docs/evidence/preservation.md.

    python -m benchmarks.quality.preservation_distil [--seeds 0 1 2] [--steps 120]

Everything is the embedded model and the command's own path: two characters, each a LoRA of its own, their
closed-form fusion, and its distillation. ``fidelity``, ``drift`` and *at equal fidelity* are those of
:mod:`.preservation`, fidelity as the mean of both characters. ``step``: processor seconds of a step, to those
without.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common import finish
from benchmarks.quality.learning_rates import draw
from benchmarks.quality.preservation import EVERY, OF_ITS_WORLD, Looks, _spread, at_fidelity
from spectral_core.adapter.adapter import Adapter
from spectral_core.demo.run import EMBEDDED_TARGETS, open_model
from spectral_core.fusion import fuse
from spectral_core.pipelines.distil import DistilJob, distil
from spectral_core.pipelines.job import Job
from spectral_core.pipelines.statistics import Looking, concept_statistics
from spectral_core.pipelines.train import train_adapter
from spectral_core.statistics.prompts import PRESERVE
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.named_run import Output
from spectral_core.training.objectives.distillation import DISTIL

CONCEPTS = {"bot": "<bot>", "fish": "<fish>"}
SAMPLES, BATCH = 16, 4
CASES: dict[str, tuple[str, ...]] = {"without": (), "default": PRESERVE, "its world": OF_ITS_WORLD}


class Bench:
    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps, self.pipe = root, steps, open_model(None)
        self.seen = {name: draw(root / name, 0, name) for name in CONCEPTS}
        self.looks = [
            Looks(self.pipe, draw(root / f"other {name}", 500, name), word) for name, word in CONCEPTS.items()
        ]
        self.start = [looks.loss() for looks in self.looks]

    def fidelity(self) -> float:
        return fmean(1 - looks.loss() / start for looks, start in zip(self.looks, self.start, strict=True))

    def teachers(self, seed: int) -> list[Adapter]:
        found = []
        for name, word in CONCEPTS.items():
            job = Job(
                str(self.seen[name]), word, init_words="", method="lora", targets=EMBEDDED_TARGETS,
                size=self.looks[0].size,
            )  # fmt: skip
            config = TrainConfig(
                steps=80, batch_size=BATCH, learning_rate=3e-3, seed=seed, preserve_every=0, target_open=0
            )
            output = Output(self.root / f"teacher {name} {seed}", name, checkpoint_every=0)
            found.append(train_adapter(self.pipe, job, config, output).adapter)
        return found

    def runs(self, seed: int) -> dict[str, dict[str, Any]]:
        """Case -> the curve of (fidelity, drift) of one distillation, and its seconds."""
        adapters = self.teachers(seed)
        prompts = [[f"a {word}", f"a picture of a {word}"] for word in CONCEPTS.values()]
        statistics = concept_statistics(self.pipe, adapters, prompts, Looking(size=self.looks[0].size))
        fused = fuse(adapters, "closed-form", statistics=statistics).adapter
        found = {}
        for case, preserve in CASES.items():
            found[case] = self.measured(adapters, fused, prompts, preserve, f"{case} {seed}", seed)
            print(seed, case, found[case], file=sys.stderr, flush=True)
        return found

    def measured(
        self,
        adapters: list[Adapter],
        fused: Adapter,
        prompts: list[list[str]],
        preserve: tuple[str, ...],
        name: str,
        seed: int,
    ) -> dict[str, Any]:
        curve: list[tuple[float, float]] = []
        seconds: list[float] = []
        since: list[float] = []

        def look(event: dict[str, Any]) -> None:
            if event["event"] != "step":
                return
            seconds.extend(time.process_time() - start for start in since)
            if event["step"] % EVERY == 0 or event["step"] in (1, self.steps):
                curve.append((self.fidelity(), self.looks[0].drift()))
            since[:] = [time.process_time()]  # the look is no part of a step

        job = DistilJob(samples=SAMPLES, preserve=preserve, sample_steps=20, size=self.looks[0].size)
        config = replace(DISTIL, steps=self.steps, batch_size=BATCH, seed=seed)
        output = Output(self.root / name, "x", checkpoint_every=0, listener=look)
        distil(self.pipe, fused, adapters, prompts, job, config, output)
        return {"curve": curve, "seconds": median(seconds)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), options.steps)
        runs = [bench.runs(seed) for seed in options.seeds]
    rows = []
    for case in CASES:
        mine, plain = [run[case] for run in runs], [run["without"] for run in runs]
        ratios, steps = [], []
        for ours, other in zip(mine, plain, strict=True):
            both = min(max(f for f, _ in run["curve"]) for run in (ours, other))
            ratios.append(at_fidelity(ours["curve"], both) / at_fidelity(other["curve"], both))
            steps.append(ours["seconds"] / other["seconds"])
        rows.append(
            {
                "case": case,
                "fidelity": _spread([run["curve"][-1][0] for run in mine]),
                "drift": _spread([run["curve"][-1][1] for run in mine]),
                "drift at equal fidelity, of that without": _spread(ratios),
                "step": _spread(steps),
            }
        )
    return finish("preservation_distil", rows, [], vars(options))


if __name__ == "__main__":
    raise SystemExit(main())
