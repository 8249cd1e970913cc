"""Which examples each step shows: seeded shuffles of the epoch, in batches of one shape.

An example is its index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import SpectralAdapterError

MOST_SHOWN = 1_000_000  # examples of an epoch, repeats included


class HasRepeats(Protocol):
    """Something an epoch shows ``repeats`` times: an :class:`.folder.Example`."""

    @property
    def repeats(self) -> int: ...


@dataclass(frozen=True)
class OrderState:
    """The place in the order: indices drawn but not shown yet, and the shuffles' generator."""

    queue: tuple[int, ...]
    generator: Tensor


class Order:
    """Seeded shuffles of the epoch (repeats included), one after the other.

    groups: a key per example (its bucket); a batch holds examples of one key. What does not fill a batch
    waits for the next epoch, so that over time every example is shown as often as its repeats say.
    """

    def __init__(
        self,
        examples: Sequence[HasRepeats],
        batch_size: int,
        seed: int,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        shown = sum(e.repeats for e in examples)
        if shown > MOST_SHOWN:
            raise SpectralAdapterError(
                f"an epoch of {shown} pictures with their repeats: at most {MOST_SHOWN} are shown; lower the "
                "repeats"
            )
        self._epoch = [i for i, e in enumerate(examples) for _ in range(e.repeats)]
        if not self._epoch or batch_size < 1:
            raise SpectralAdapterError(
                f"{len(self._epoch)} examples in batches of {batch_size}: expected at least one of each"
            )
        self._groups: Sequence[Hashable] = [0] * len(examples) if groups is None else groups
        assert len(self._groups) == len(examples), "one group for each example"
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []

    @property
    def shown(self) -> list[int]:
        """The examples of an epoch, each once."""
        return list(dict.fromkeys(self._epoch))

    def next(self, count: int | None = None) -> list[int]:
        """Indices of the next batch; ``count`` of them instead of the batch size."""
        wanted = self.batch_size if count is None else count
        while (group := self._full_group(wanted)) is None:
            shuffled = torch.randperm(len(self._epoch), generator=self._generator).tolist()
            self._queue += [self._epoch[i] for i in shuffled]
        batch: list[int] = []
        rest: list[int] = []
        for index in self._queue:
            take = len(batch) < wanted and self._groups[index] == group[0]
            (batch if take else rest).append(index)
        self._queue = rest
        return batch

    def _full_group(self, wanted: int) -> tuple[Hashable] | None:
        """The group whose batch fills first, in the order of the queue."""
        counts: Counter[Hashable] = Counter()
        for index in self._queue:
            counts[self._groups[index]] += 1
            if counts[self._groups[index]] == wanted:
                return (self._groups[index],)
        return None

    def state(self) -> OrderState:
        return OrderState(tuple(self._queue), self._generator.get_state())

    def restore(self, state: OrderState) -> None:
        """Continue from a :meth:`state` of an order over the same examples."""
        if state.queue and max(state.queue) >= len(self._groups):
            raise SpectralAdapterError(
                f"the data order names example {max(state.queue)}, and there are {len(self._groups)}: the "
                "training data has changed"
            )
        self._queue = list(state.queue)
        self._generator.set_state(state.generator)
