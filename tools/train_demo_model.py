"""Draw the data of the demo model and train it, stage by stage.

    python tools/train_demo_model.py all --device cuda      # minutes
    python tools/train_demo_model.py unet                   # one stage, on the CPU

Stages: data, vae, tokenizer, text (the text encoder's first lesson), unet, refine (the decoder), classifier,
evaluate. Each reads what the ones before it left in ``.cache/demo_model`` and ``demo_model``; ``unet``
resumes from its last checkpoint. Needs the pipelines extra (diffusers, transformers).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STAGES = ("data", "vae", "tokenizer", "text", "unet", "refine", "classifier", "evaluate")


def run(stage: str, device: str, minutes: float | None, workers: int) -> None:
    limit: dict[str, Any] = {} if minutes is None else {"minutes": minutes}
    if stage == "data":
        from tools.demo_training import common

        common.draw_data()
    elif stage == "vae":
        from tools.demo_training import autoencoder

        autoencoder.build(device)
        autoencoder.encode_data(device)
    elif stage == "tokenizer":
        from tools.demo_training import text

        text.train_tokenizer()
    elif stage == "text":
        from tools.demo_training import text_warmup

        text_warmup.train(device, **limit)
    elif stage in ("unet", "refine"):
        from tools.demo_training import parallel

        if workers > 1:
            parallel.train(stage, workers)
        else:
            parallel.STAGES[stage](device)
    elif stage == "classifier":
        from tools.demo_training import reader

        reader.train(device, **limit)
    else:
        from tools.demo_training import evaluate

        evaluate.evaluate(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ...")
    parser.add_argument("--minutes", type=float, help="time limit of the stage (text, classifier)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument(
        "--workers", type=int, default=1, help="unet, refine on the CPU: processes of one thread each"
    )
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        run(stage, options.device, options.minutes, options.workers)


if __name__ == "__main__":
    main()
