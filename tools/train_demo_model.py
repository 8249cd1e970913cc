"""Draw the demo model's data and train it on, stage by stage.

    python tools/train_demo_model.py all --device cuda      # minutes
    python tools/train_demo_model.py unet --workers 2       # one stage, on the CPU; goes on where it stopped

Stages: data, autoencoder (its decoder), tokenizer, text (the text encoder's first lesson), latents, unet,
redraw and decoder (the same longer, on latents as the sampler leaves them), classifier, evaluate. Each reads
what the ones before it left in ``.cache/demo_model`` (or in ``DEMO_MODEL_CACHE``) and ``demo_model``.
Autoencoder, unet and decoder go on from their last checkpoint in the cache, or else from the weights in
``demo_model``: there data, latents and unet are enough. Needs the pipelines extra (diffusers, transformers).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STAGES = (
    "data",
    "autoencoder",
    "tokenizer",
    "text",
    "latents",
    "unet",
    "redraw",
    "decoder",
    "classifier",
    "evaluate",
)
PARALLEL = ("autoencoder", "unet", "decoder")


def run(stage: str, device: str, limits: dict[str, Any], workers: int) -> None:
    if stage == "data":
        from tools.demo_training import common

        common.draw_data()
    elif stage in PARALLEL:
        from tools.demo_training import parallel

        parallel.train(stage, device, workers, limits)
    elif stage == "tokenizer":
        from tools.demo_training import text

        text.train_tokenizer()
    elif stage == "text":
        from tools.demo_training import text_warmup

        text_warmup.train(device, **limits)
    elif stage == "latents":
        from tools.demo_training import unet

        unet.encode_pictures(device)
    elif stage == "redraw":
        from tools.demo_training import redraw

        redraw.redraw(device)
    elif stage == "classifier":
        from tools.demo_training import reader

        reader.train(device, **limits)
    else:
        from tools.demo_training import evaluate

        evaluate.evaluate(device, **({"count": limits["steps"]} if limits else {}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ...")
    parser.add_argument(
        "--steps", type=int, help="length of the stage instead of its own (evaluate: samples)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help=f"{', '.join(PARALLEL)} on the CPU: processes of one thread each",
    )
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    limits = {} if options.steps is None else {"steps": options.steps}
    for stage in STAGES if options.stage == "all" else (options.stage,):
        run(stage, options.device, limits, options.workers)


if __name__ == "__main__":
    main()
