"""Memory runs out for real, in a process that has little of it: the checkpoint is there all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.loop import train
from spectral_core.training.runs.checkpoint import listed
from spectral_core.training.runs.events import read_events
from spectral_core.training.runs.memory_errors import explained, is_out_of_memory
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import Toy

ROOT = Path(__file__).resolve().parents[3]
CONFIG = TrainConfig(steps=8, learning_rate=1e-2)

# Each call of the model takes ever more memory and holds it, as activations would be held until backward.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.engine.loop import train
from spectral_core.training.runs.memory_errors import is_out_of_memory
from spectral_core.training.runs.place import Run
from tests.core.training.test_training_memory_errors import CONFIG
from tests.core.training.training_toy import Toy
torch.set_num_threads(1)
toy, calls = Toy(LoRAConfig(4)), []
def take():
    calls.append(1)
    held = []
    while len(calls) == 6:
        held.append(torch.ones(1 << 20))
toy.on_call = take
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
try:
    train(toy.setup, CONFIG, "lora", run=Run(Path(sys.argv[1])))
except (MemoryError, RuntimeError) as error:
    assert is_out_of_memory(error), repr(error)
    print("out of memory")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory as Linux does")
def test_memory_that_runs_out_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "out of memory", done.stderr[-3000:]
    assert [step for step, _ in listed(tmp_path)] == [5]
    assert "lower batch_size" in read_events(tmp_path / "events.jsonl")[-1]["text"]
    assert "the checkpoint of step 5 is kept" in explained(tmp_path)
    whole, resumed = Toy(LoRAConfig(4)), Toy(LoRAConfig(4))
    losses = train(whole.setup, CONFIG, "lora").losses
    again = train(resumed.setup, CONFIG, "lora", run=Run(tmp_path))
    assert again.resumed_at == 5 and again.losses == losses and resumed.digest == whole.digest


def test_what_counts_as_out_of_memory(tmp_path: Path) -> None:
    lacking = [MemoryError(), torch.cuda.OutOfMemoryError(), RuntimeError("MPS backend out of memory")]
    assert all(is_out_of_memory(error) for error in lacking)
    assert not is_out_of_memory(RuntimeError("shapes")) and not is_out_of_memory(OSError("out of memory"))
    assert "no step was made" in explained(tmp_path) and "checkpointing" in explained(tmp_path)


def test_where_memory_runs_out_less_of_the_model_is_kept_and_nothing_else_changes(tmp_path: Path) -> None:
    """A step that does not fit is made again, to the last bit, as often as room can be made."""
    config = TrainConfig(steps=6, warmup=0, learning_rate=1e-2, seed=5)
    plain = Toy(FouRAConfig(4, gate="adaptive"))
    whole = train(plain.setup, config, "foura")
    calls, held = [], [4]

    def crowded() -> None:
        calls.append(held[0])
        if len(calls) >= 3 and held[0] > 1:
            raise MemoryError("no room")

    def make_room() -> bool:
        held[0] //= 2
        return held[0] > 0

    toy = Toy(FouRAConfig(4, gate="adaptive"), make_room=make_room)
    toy.on_call = crowded
    result = train(toy.setup, config, "foura", run=Run(tmp_path))
    assert result.losses == whole.losses and toy.digest == plain.digest
    assert calls[2:5] == [4, 2, 1]
    assert sum("memory ran out in step 3" in note for note in result.notes) == 2
    full = Toy(LoRAConfig(4), make_room=lambda: False)
    full.on_call = lambda: (_ for _ in ()).throw(MemoryError("no room"))
    with pytest.raises(MemoryError):
        train(full.setup, config, "lora")
