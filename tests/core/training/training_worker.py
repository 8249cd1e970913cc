"""One of several processes that train the toy together; the first writes its adapter and losses.

python -m torch.distributed.run --nproc_per_node 2 tests/core/training/training_worker.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spectral_core.files.adapter_file import save
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.loop import train
from spectral_core.training.runs import distributed
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import Toy

METHODS = {"lora": LoRAConfig(4), "foura": FouRAConfig(4, gate="adaptive")}
CONFIG = TrainConfig(steps=30, learning_rate=1e-2, accumulation=2, target_open=0.0)


def main(output: Path) -> None:
    with distributed.joined():
        world = distributed.world(expected=2)
        for method, config in METHODS.items():
            toy = Toy(config, batch=2)
            result = train(toy.setup, CONFIG, method, run=Run(output / method, checkpoint_every=10))
            if world.is_main:
                save(toy.attachment.to_adapter(), output / f"{method}.safetensors")
                (output / f"{method}.json").write_text(json.dumps(result.losses), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
