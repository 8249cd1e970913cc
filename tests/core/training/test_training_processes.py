"""Two processes on the CPU, started by torch's launcher, do what one does with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_core.files.adapter_file import load
from spectral_core.training.engine.loop import train
from spectral_core.training.runs.checkpoint import listed
from spectral_core.training.runs.distributed import World
from spectral_core.training.runs.events import read_events
from tests.core.training.training_toy import Toy
from tests.core.training.training_worker import CONFIG, METHODS

ROOT = Path(__file__).resolve().parents[3]


WORKER = str(ROOT / "tests" / "core" / "training" / "training_worker.py")
TORCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
SHARED = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launched(launcher: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The worker under a launcher; HF_HOME keeps the user's own settings of accelerate away."""
    if "accelerate" in launcher[1]:
        pytest.importorskip("accelerate")
        launcher = [*launcher, *SHARED]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, *launcher, WORKER, str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


@pytest.mark.slow
@needs_distributed
@pytest.mark.parametrize("launcher", [TORCH, [*ACCELERATE, "--multi_gpu"]], ids=["torch", "accelerate"])
def test_two_processes_equal_one_with_twice_the_batch(launcher: list[str], tmp_path: Path) -> None:
    """accelerate's several processes are those of --multi_gpu, also where there is no GPU."""
    done = launched(launcher, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for method, config in METHODS.items():
        toy = Toy(config, batch=4)
        losses = train(toy.setup, CONFIG, method).losses
        assert json.loads((tmp_path / f"{method}.json").read_text()) == pytest.approx(losses, rel=1e-4)
        together, alone = load(tmp_path / f"{method}.safetensors"), toy.attachment.to_adapter()
        for name, layer in alone.layers.items():
            for key, value in layer.terms[0].params.items():
                found = together.layers[name].terms[0].params[key]
                # Adam turns a difference in the last bit of a small gradient into one of a step: so by norm
                assert (found - value).norm() <= 2e-3 * value.norm(), (method, name, key)
        steps = [e["step"] for e in read_events(tmp_path / method / "events.jsonl") if e["event"] == "step"]
        assert steps == list(range(1, CONFIG.steps + 1)), "one process writes, and only one"
        assert [step for step, _ in listed(tmp_path / method)] == [30, 20]


@pytest.mark.slow
@needs_distributed
def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(tmp_path: Path) -> None:
    done = launched([*ACCELERATE, "--cpu"], tmp_path)
    assert done.returncode != 0
    assert "1 process(es) take part in the training, expected 2" in done.stderr


def test_rows_of_a_batch_are_shared_out_whole() -> None:
    rows = [World(rank, 3).rows(6) for rank in range(3)]
    assert [list(range(6))[part] for part in rows] == [[0, 1], [2, 3], [4, 5]]
    assert World().rows(5) == slice(0, 5)
