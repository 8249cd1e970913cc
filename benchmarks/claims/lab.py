"""Where the experiments train, draw and keep what they made.

A :class:`Lab` has a folder; everything in it is named by what it depends on and made once, so that a run
that was stopped goes on, and several processes share the work (a cell under way in one is skipped by the
others). All times are processor seconds of the process, so that a busy machine does not change them much.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.claims.drawings import Drawn, style_picture
from benchmarks.claims.judge import Judge, as_tensor, judge
from benchmarks.common import RESULTS
from demo_model.draw import PIXELS, draw_concept
from demo_model.pictures import draw_beside
from spectral_core.adapter.adapter import Adapter, Provenance, create
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file as fileformat
from spectral_core.maths.svd_cache import SVDCache
from spectral_core.methods import MethodConfig
from spectral_core.pipelines import apply, generate, load_pipeline
from spectral_core.pipelines.conditioning import CaptionCache
from spectral_core.pipelines.dataset import encode_pictures
from spectral_core.pipelines.loading import diffusion_of, quiet_libraries
from spectral_core.pipelines.tokens import TokenRows, initial_rows
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.order import Order
from spectral_core.training.engine.columns import basis_source
from spectral_core.training.engine.loop import Setup, evaluation_loss, train
from spectral_core.whole_file import write_whole

MODEL = Path(__file__).resolve().parents[2] / "demo_model"
SIZE = (PIXELS, PIXELS)
HELD_OUT_SEED = 500_000
BATCH = 8
GUIDANCE = 4.0


PROTOCOL = 3
"""Of a cell. 2: on the demo model's first version, of 64 pixels. 1: and gates trained at the adapter's rate,
where they cannot close; middle and random columns at the top ones' rate; fusions judged under the wordings
that their statistics were collected under."""


class Busy(Exception):
    """Another process is making this cell."""


@dataclass(frozen=True)
class Setting:
    """How much is done. seeds: of the reported runs; sweep_seeds: of the rates' sweeps, never the same."""

    name: str
    seeds: tuple[int, ...]
    steps: int = 150
    pictures: int = 30
    held_out: int = 16
    prompts: int = 8
    per_prompt: int = 6
    sampler_steps: int = 10
    strengths: tuple[float, ...] = (0.6, 1.0, 1.3)
    merged_strengths: tuple[float, ...] = (0.6, 1.0, 1.3, 1.7, 2.2, 2.9)  # up to where the best is inside
    few_pictures: int = 8
    long_steps: tuple[int, ...] = (50, 150, 400)
    learning_steps: tuple[int, ...] = (25, 50, 100, 150)
    distil_steps: int = 200
    distil_samples: int = 16
    rates: int = 3
    drawings: int = 2400
    judge_steps: int = 600
    sweep_seeds: tuple[int, ...] = (100,)
    targets: str = "down_blocks.*, mid_block.*, up_blocks.*"


FULL = Setting("full", seeds=(0, 1, 2, 3, 4))
SMALL = Setting(
    "small",
    seeds=(0, 1),
    steps=3,
    pictures=4,
    held_out=2,
    prompts=2,
    per_prompt=2,
    sampler_steps=2,
    strengths=(0.5, 1.0),
    merged_strengths=(0.5, 1.0, 1.5),
    few_pictures=2,
    long_steps=(2, 4),
    learning_steps=(1, 3),
    distil_steps=2,
    distil_samples=2,
    rates=1,
    drawings=80,
    judge_steps=4,
    targets="attention",
)
SETTINGS = {setting.name: setting for setting in (FULL, SMALL)}


def published_cells(setting: Setting) -> Path:
    """The numbers of earlier runs that came with the project."""
    return RESULTS / f"claims_{setting.name}.json"


@dataclass(frozen=True)
class Task:
    """Something to learn: a style (``inked``, ``poster``) whose word stays as the tokenizer writes it, or a
    character (``bot`` …) whose word ``<bot>`` is new and trained with it, or the photographs in a folder,
    with a new word, too. side: in every third picture the character has something beside it and stands on
    this side, ``left``, ``right`` or ``either``."""

    kind: str
    name: str
    folder: Path | None = None
    side: str = ""

    @property
    def key(self) -> str:
        """For file names."""
        return f"{self.name}_{self.side}" if self.side else self.name

    @property
    def word(self) -> str:
        return self.name if self.kind == "style" else f"<{self.name}>"

    def pictures(self, first: int, count: int) -> list[Drawn]:
        if self.folder is not None:  # the same few, whatever was asked for
            return photographs(self.folder, self.word)[:count]
        seeds = range(first, first + count)
        if self.kind == "style":
            return [style_picture(self.name, seed) for seed in seeds]
        return [self._character(seed) for seed in seeds]

    def _character(self, seed: int) -> Drawn:
        if not self.side or seed % 3:
            return draw_concept(self.name, seed, self.word)
        side = ("left", "right")[seed // 3 % 2] if self.side == "either" else self.side
        return draw_beside(self.name, seed, self.word, side=side)


def photographs(folder: Path, word: str) -> list[Drawn]:
    """Pictures of a folder at the model's size, with their captions; ``<TOK>`` is the word."""
    found = []
    for text in sorted(folder.glob("*.txt")):
        file = next(f for f in sorted(folder.glob(f"{text.stem}.*")) if f.suffix != ".txt")
        with Image.open(file) as picture:
            small = picture.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        found.append((small, text.read_text(encoding="utf-8").strip().replace("<TOK>", word)))
    return found


@dataclass(frozen=True)
class Recipe:
    """A method as a claim compares it: its name, the configuration for a layer's weight, where the sweep of
    its rate begins, and the layers where they are not the setting's."""

    name: str
    configure: Callable[[Tensor], MethodConfig]
    start_rate: float
    targets: str = ""


@dataclass(frozen=True)
class Shown:
    """A picture in the order of training."""

    repeats: int = 1


@dataclass(frozen=True)
class Trained:
    """An adapter with the loss on pictures it never saw, before and after, and its cost."""

    adapter: Adapter
    held_out: float
    held_out_before: float
    parameters: int
    seconds: float


class Lab:
    """One folder of experiments on the embedded model."""

    def __init__(
        self, folder: Path, setting: Setting, photos: Path | None = None, again: bool = False
    ) -> None:
        # What was measured belongs to the weights that it was measured on.
        weights = hashlib.sha256((MODEL / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
        self.weights = weights.hexdigest()[:8]
        self.folder = folder / f"{setting.name}-{self.weights}"
        self.setting, self.photos = setting, photos
        self.again = again  # make published cells anew
        self.folder.mkdir(parents=True, exist_ok=True)
        quiet_libraries()

    @cached_property
    def pipe(self) -> Any:
        pipe = load_pipeline(MODEL)
        pipe.unet.to(memory_format=torch.channels_last)
        return pipe

    @cached_property
    def judge(self) -> Judge:
        with self.alone("judge", wait=True):
            return judge(self.pipe, self.folder, self.setting.drawings, self.setting.judge_steps)

    # --- kept results -----------------------------------------------------------------------------

    @contextmanager
    def alone(self, name: str, wait: bool = False) -> Iterator[None]:
        """Only one process is in the block of this name; the others raise Busy, or wait."""
        (self.folder / "locks").mkdir(exist_ok=True)
        with open(self.folder / "locks" / name, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy(name) from None
            yield

    def cell(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The kept numbers of this name, or made now. Raises Busy while another process makes them."""
        path = self.folder / "cells" / f"{name}.json"
        if not name.startswith("train__") and name in self._published and not self.again:
            return self._published[name]
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with self.alone(name):
                if not path.exists():
                    started = time.process_time()
                    made = dict(make()) | {"protocol": PROTOCOL}
                    made["cpu_seconds"] = time.process_time() - started
                    write_whole(path, json.dumps(made, indent=1))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def known(self, name: str) -> dict[str, Any] | None:
        """The kept numbers of this name, if there are some: in the folder, or published by an earlier run."""
        path = self.folder / "cells" / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return self._published.get(name)

    @cached_property
    def _published(self) -> dict[str, dict[str, Any]]:
        path = published_cells(self.setting)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def all_known(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Every cell but the trainings', by name."""
        names = {path.stem for path in (self.folder / "cells").glob("*.json")} | set(self._published)
        chosen = sorted(n for n in names if n.startswith(prefix) and not n.startswith("train__"))
        return {name: found for name in chosen if (found := self.known(name)) is not None}

    def publish(self) -> Path:
        """Write all known cells (but the trainings') into the results folder, where later runs find them."""
        path = published_cells(self.setting)
        write_whole(path, json.dumps(self.all_known(), ensure_ascii=False, sort_keys=True) + "\n")
        return path

    def keep_strip(self, name: str, pictures: Sequence[Image.Image]) -> None:
        """Pictures side by side, for the contact sheets of the report."""
        strip = Image.new("RGB", (SIZE[0] * len(pictures), SIZE[1]))
        for place, picture in enumerate(pictures):
            strip.paste(picture, (place * SIZE[0], 0))
        (self.folder / "strips").mkdir(exist_ok=True)
        strip.save(self.folder / "strips" / f"{name}.png")

    def strip(self, name: str) -> list[Image.Image]:
        """The pictures of a kept strip, none if there is none."""
        path = self.folder / "strips" / f"{name}.png"
        if not path.exists():
            return []
        with Image.open(path) as strip:
            return [strip.crop((x, 0, x + SIZE[0], SIZE[1])) for x in range(0, strip.width, SIZE[0])]

    # --- training ---------------------------------------------------------------------------------

    def trained(
        self,
        task: Task,
        recipe: Recipe,
        rate: float,
        seed: int,
        *,
        pictures: int | None = None,
        snapshots: Sequence[int] = (),
    ) -> dict[int, Trained]:
        """Adapters after the given steps (or the setting's) of one run, from the folder or trained now.

        Training pictures differ from seed to seed; the held-out pictures are the same for all. A run that
        diverges has a held-out loss of infinity and the adapter it began with.
        """
        steps = tuple(snapshots) or (self.setting.steps,)
        count = pictures or self.setting.pictures
        name = f"{task.key}__{recipe.name.replace(' ', '_')}__{rate:g}__{seed}__{count}"
        name += f"__{'-'.join(map(str, steps))}"  # runs with snapshots have another schedule
        cell = self.cell(f"train__{name}", lambda: self._train(name, task, recipe, rate, seed, count, steps))
        return {
            step: Trained(
                fileformat.load(self.folder / "adapters" / f"{name}__{step}.safetensors"),
                math.inf if cell["held_out"][str(step)] is None else cell["held_out"][str(step)],
                cell["before"],
                cell["parameters"],
                cell["cpu_seconds"],
            )
            for step in steps
        }

    def _train(
        self, name: str, task: Task, recipe: Recipe, rate: float, seed: int, count: int, steps: Sequence[int]
    ) -> dict[str, Any]:
        pipe, settings = self.pipe, self.setting
        drawn = task.pictures(1000 * (seed + 1), count) + task.pictures(HELD_OUT_SEED, settings.held_out)
        latents = encode_pictures(pipe, as_tensor([p for p, _ in drawn]) * 2 - 1)
        captions = [c for _, c in drawn]
        adapter = self._fresh(task, recipe, seed)
        new_words = {task.word: initial_rows(pipe, "shape")} if task.kind != "style" else {}
        tokens = TokenRows(pipe, new_words, trainable=True)
        found: dict[int, Adapter] = {0: adapter}
        losses: dict[int, float | None] = {}
        try:
            with attach(pipe.unet, adapter, part="unet", trainable=True) as attachment:
                encoded = CaptionCache(pipe, SIZE, keep=not new_words)

                def denoise(
                    noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None], first: int = 0
                ) -> Any:
                    said = ["" if i is None else captions[first + i] for i in indices]
                    return pipe.unet(noisy, timesteps, **encoded.encode(said)).sample

                rows = [p for parts in tokens.parameters.values() for p in parts.values()]
                diffusion, order = diffusion_of(pipe), Order([Shown()] * count, BATCH, seed)
                setup = Setup(denoise, latents[:count], order, diffusion, [attachment], rows)
                unseen = replace(
                    setup, denoiser=lambda *a: denoise(*a, first=count), latents=latents[count:], tokens=()
                )

                def measure(step: int) -> None:
                    with torch.no_grad(), attachment.gates.inference():
                        losses[step] = evaluation_loss(unseen, levels=8)
                    found[step] = replace(attachment.to_adapter(), tokens=tokens.values())

                before = evaluation_loss(unseen, levels=8)
                config = TrainConfig(
                    steps=steps[-1],
                    batch_size=BATCH,
                    learning_rate=rate,
                    schedule="constant"
                    if len(steps) > 1
                    else "cosine",  # what a snapshot shows is of its step
                    seed=seed,
                )
                if rows:
                    config = replace(config, token_learning_rate=2e-2)

                def listen(event: Any) -> None:
                    if event["event"] == "step" and event["step"] in steps[:-1]:
                        measure(event["step"])

                try:
                    train(setup, config, adapter.methods[0], listen)
                    measure(steps[-1])
                except SpectralAdapterError:
                    losses |= {step: None for step in steps if step not in losses}
        finally:
            tokens.remove()
        (self.folder / "adapters").mkdir(exist_ok=True)
        for step in steps:
            path = self.folder / "adapters" / f"{name}__{step}.safetensors"
            fileformat.save(found.get(step, adapter), path, overwrite=True)
        return {
            "held_out": {
                str(s): v if v is not None and math.isfinite(v) else None for s, v in losses.items()
            },
            "before": before,
            "parameters": _trained_parameters(adapter),
        }

    def _fresh(self, task: Task, recipe: Recipe, seed: int) -> Adapter:
        weights, _ = find_targets(self.pipe.unet, "unet", recipe.targets or self.setting.targets)
        generator = torch.Generator().manual_seed(seed)
        cache = SVDCache(self.folder / "svd")
        layers = {}
        for name, weight in weights.items():
            config = recipe.configure(weight)
            layers |= create({name: weight}, config, basis_source(config, cache), generator).layers
        return Adapter(layers, Provenance(name=task.name, family="mini", trigger_words=(task.word,)))

    def rate(self, kind: str, recipe: Recipe) -> float:
        """The recipe's best rate of a sweep by held-out loss, on the sweep's own seeds; the grid grows until
        the best is not at its end."""
        task = Task(kind, "inked" if kind == "style" else "house")

        def loss(exponent: int) -> float:
            rate = self.sweep_rate(recipe, exponent)
            runs = [self.trained(task, recipe, rate, seed) for seed in self.setting.sweep_seeds]
            return fmean(run[self.setting.steps].held_out for run in runs)

        width = self.setting.rates // 2
        known = {k: loss(k) for k in range(-width, width + 1)}
        while width and (best := min(known, key=lambda k: known[k])) in (min(known), max(known)):
            step = -1 if best == min(known) else 1
            if len(known) >= 7:
                break
            known[best + step] = loss(best + step)
        return self.sweep_rate(recipe, min(known, key=lambda k: known[k]))

    @staticmethod
    def sweep_rate(recipe: Recipe, exponent: int) -> float:
        """Steps of √10 around the recipe's first guess."""
        return float(f"{recipe.start_rate * 10 ** (exponent / 2):.2g}")

    # --- drawing ----------------------------------------------------------------------------------

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        adapters: Sequence[Adapter],
        recorder: Any = None,
        size: tuple[int, int] = SIZE,
    ) -> list[Image.Image]:
        """One picture per (prompt, seed) with the adapters on."""
        with apply(self.pipe, *adapters, recorder=recorder):
            return generate(
                self.pipe,
                prompts,
                seeds,
                steps=self.setting.sampler_steps,
                guidance=GUIDANCE,
                size=size,
                batch_size=32,
            )


def _trained_parameters(adapter: Adapter) -> int:
    from spectral_core.methods import method_of

    total = 0
    for layer in adapter.layers.values():
        for term in layer.terms:
            names = method_of(term.config).trainable(term.config)
            total += sum(term.params[name].numel() for name in names)
    return total
