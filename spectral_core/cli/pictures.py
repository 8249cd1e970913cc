"""The command ``generate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..plots import save_picture
from ..training.config import reading
from .models import DTYPES, open_adapter, open_model

DESCRIPTION = """Draw pictures with a model and any number of adapters.

An adapter (or LoRA file) may have a strength behind a colon. A picture depends on its own seed only. With
--composed each adapter predicts alone and the differences add up (FouRA's composition of sliders): none sees
what another does, for one more call of the model per adapter and step.

  python -m spectral_core generate --model sd15 --adapter vase.safetensors:0.8 --prompt 'a <vase>'"""


def add_parser(commands: Any) -> None:
    build = commands.add_parser(
        "generate",
        help="draw pictures",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument(
        "--model", required=True, metavar="PATH", help="a diffusers folder or a .safetensors checkpoint"
    )
    build.add_argument(
        "--adapter", action="append", default=[], metavar="FILE[:S]", help="with its strength; several add up"
    )
    build.add_argument(
        "--composed", action="store_true", help="add the adapters' predictions instead of their updates"
    )
    build.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="may be given several times"
    )
    build.add_argument(
        "--count", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)"
    )
    build.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first picture; each next one more (default: 0)",
    )
    build.add_argument("--steps", type=int, default=25, metavar="N", help="denoising steps (default: 25)")
    build.add_argument("--guidance", type=float, default=7.5, metavar="G", help="(default: 7.5)")
    build.add_argument(
        "--size", type=reading.size, metavar="PIXELS", help="like 512 or 768x512 (default: the model's own)"
    )
    build.add_argument("--batch-size", type=int, default=1, metavar="N", help="(default: 1)")
    build.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default: fp32)"
    )
    build.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU where there is one)")
    build.add_argument(
        "--output", "-o", type=Path, default=Path("pictures"), metavar="DIR", help="(default: pictures)"
    )
    build.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..pipelines import apply, generate
    from ..pipelines.composing import composed

    for name in ("count", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise SpectralAdapterError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1"
            )
    if options.size and any(side % 8 for side in options.size):
        raise SpectralAdapterError(
            f"--size {options.size[0]}x{options.size[1]}: expected multiples of 8 pixels, such as "
            f"{options.size[0] // 8 * 8 or 8}x{options.size[1] // 8 * 8 or 8}"
        )
    if options.composed and not options.adapter:
        raise SpectralAdapterError("--composed: expected --adapter, at least once")
    pipe = open_model(options.model, options.dtype, options.device)
    adapters = [adapter_of(text, pipe) for text in options.adapter]
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    seeds = [options.seed + i for i in range(options.count)] * len(options.prompt)
    with composed(pipe, adapters) if options.composed else apply(pipe, *adapters):
        pictures = generate(
            pipe,
            prompts,
            seeds,
            steps=options.steps,
            guidance=options.guidance,
            size=options.size,
            batch_size=options.batch_size,
        )
    for number, (seed, picture) in enumerate(zip(seeds, pictures, strict=True)):
        print(save_picture(picture, options.output / f"{number:03d}-seed{seed}.png"))
    return 0


def adapter_of(text: str, pipe: Any) -> Adapter:
    """``file`` or ``file:strength``."""
    name, _, strength = text.rpartition(":")
    if name and Path(name).is_file():
        try:
            return open_adapter(name, pipe).scaled(float(strength))
        except ValueError:
            raise SpectralAdapterError(f"--adapter {text}: {strength!r} is no strength") from None
    return open_adapter(text, pipe)
