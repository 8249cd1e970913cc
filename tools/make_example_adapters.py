"""Train the small adapters that come with the example workflows, on the demo model and three drawn concepts.

    python -m tools.make_example_adapters [--only NAME ...] [--steps N]

Writes, in half precision, ``example_workflows/adapters/examples`` (this project's files) and
``example_workflows/loras/examples`` (plain LoRAs, kohya's names; such a file holds no new word, so theirs is
spelled by the tokenizer), and a sheet of pictures to be looked at, ``example_adapters.png`` in the folder for
temporary files. They must be trained again whenever the demo model's weights change.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spectral_core.adapter.adapter import Adapter
from spectral_core.demo.concepts import DemoConcept, drawn_concept, large, places
from spectral_core.demo.run import EMBEDDED_TARGETS, open_model
from spectral_core.files.adapter_file import load, save
from spectral_core.files.lora_export import export_lora
from spectral_core.files.lora_import import import_lora
from spectral_core.pipelines import apply, generate
from spectral_core.pipelines.job import Job
from spectral_core.pipelines.loading import native_size
from spectral_core.pipelines.train import evaluate, train_adapter
from spectral_core.training.config.adapter import Method
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.named_run import Output

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ROOT / "example_workflows" / "adapters" / "examples"
LORAS = ROOT / "example_workflows" / "loras" / "examples"


@dataclass(frozen=True)
class Example:
    """One file: its name, the concept in it, the method with its rank or columns, and the learning rate."""

    name: str
    concept: str
    method: Method
    rate: float
    rank: int = 2
    columns: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        return (LORAS if self.method == "lora" else ADAPTERS) / f"{self.name}.safetensors"


RANK, COLUMNS = 8, 8
EXAMPLES = (
    Example("bot_foura", "bot", "foura", 6e-3, RANK),
    *(
        Example(
            f"{concept}_spectral",
            concept,
            "spectral_a",
            4.3e-3,
            columns=tuple(range(COLUMNS * place, COLUMNS * (place + 1))),
        )
        for place, concept in enumerate(("bot", "fish", "house"))
    ),
    Example("bot_lora", "bot", "lora", 6e-3, RANK),
    Example("fish_lora", "fish", "lora", 6e-3, RANK),
)


def train_example(pipe: Any, example: Example, concept: DemoConcept, steps: int, runs: Path) -> Path:
    """Train one example in the folder ``runs`` and save it in half precision."""
    train = TrainConfig(
        steps=steps,
        batch_size=8,
        learning_rate=example.rate,
        token_learning_rate=2e-2,
        schedule="cosine",
        preserve_every=0,
        seed=0,
    )
    job = Job(
        str(concept.folder),
        concept.token,
        size=native_size(pipe),
        method=example.method,
        rank=example.rank,
        columns=example.columns,
        targets=EMBEDDED_TARGETS,
        init_words="" if example.method == "lora" else concept.init_words,
    )
    adapter = train_adapter(pipe, job, train, Output(runs, example.name)).adapter
    example.path.parent.mkdir(parents=True, exist_ok=True)
    if example.method == "lora":
        export_lora(adapter, example.path, naming="kohya", dtype=torch.float16, overwrite=True)
    else:
        save(adapter, example.path, overwrite=True, dtype=torch.float16)
    size = example.path.stat().st_size
    print(f"{example.name}: loss {evaluate(pipe, job, adapter):.3f}, {size:,} bytes", flush=True)
    return example.path


def read(example: Example) -> Adapter:
    return import_lora(example.path) if example.method == "lora" else load(example.path)


def draw_sheet(pipe: Any, examples: list[Example]) -> Path:
    """Four pictures of each adapter, and of the base model above them."""
    rows = []
    for example in [None, *examples]:
        concept = "bot" if example is None else example.concept
        prompts = [large(f"<{concept}>", place) for place in places(4)]
        chosen = [] if example is None else [read(example)]
        with apply(pipe, *chosen):
            rows.append(generate(pipe, prompts, [1, 2, 3, 4], steps=20, guidance=4.0, size=native_size(pipe)))
    sheet = Image.new("RGB", (4 * 130, len(rows) * 130), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * 130, y * 130))
    path = Path(tempfile.gettempdir()) / "example_adapters.png"
    sheet.save(path)
    return path


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", nargs="*", default=[], metavar="NAME")
    options.add_argument("--steps", type=int, default=400)
    chosen = options.parse_args()
    examples = [e for e in EXAMPLES if not chosen.only or e.name in chosen.only]
    pipe = open_model(None)
    with tempfile.TemporaryDirectory() as folder:
        for example in examples:
            side = "right" if example.concept == "fish" else "left"
            size = native_size(pipe)[0]
            concept = drawn_concept(example.concept, Path(folder) / example.concept, size, side)
            train_example(pipe, example, concept, chosen.steps, Path(folder) / "runs")
    print(draw_sheet(pipe, examples))


if __name__ == "__main__":
    main()
