"""What the adaptive gates did: open gates per layer and per noise level.

Counting happens on the gates' own device and is fetched in batches, so that recording does not make a GPU
wait.

Shapes: is_open (B, rank) booleans; kept per layer: sums (bins + 1, rank) and counts (bins + 1,), float32 on
the CPU, the last bin for passes of unknown noise level; squares (bins + 1,) of the open gates of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SpectralAdapterError

_FETCH_EVERY = 256  # recorded passes
_SWITCHES = 0.05  # a gate that is open in 5 to 95 % of the cases depends on something


class GateRecorder:
    """Collects open gates; ``bins`` equal parts of the noise level, bin 0 the noisiest."""

    def __init__(self, bins: int = 10) -> None:
        if bins < 1:
            raise SpectralAdapterError(f"{bins} bins of the noise level: expected at least 1")
        self.bins = bins
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._waiting: list[tuple[str, Tensor, float | Tensor | None]] = []

    def record(self, layer: str, is_open: Tensor, progress: float | Tensor | None) -> None:
        """Add one pass: is_open (B, rank); progress 0 (noisiest) … 1: a number, (B,) or None."""
        levels = progress.numel() if isinstance(progress, Tensor) else 1
        if is_open.shape[0] % max(levels, 1) or levels == 0:
            raise SpectralAdapterError(
                f"layer {layer}: {levels} noise levels for {is_open.shape[0]} batch rows; expected one for "
                "all, one each, or one each of a batch that is repeated whole"
            )
        self._waiting.append((layer, is_open, progress))
        if len(self._waiting) >= _FETCH_EVERY:
            self._fetch()

    def _fetch(self) -> None:
        waiting, self._waiting = self._waiting, []
        with torch.inference_mode(False), torch.no_grad():
            # Sums born in inference mode could not grow outside it.
            for layer, is_open, progress in waiting:
                rows = is_open.cpu().float()
                if layer not in self._sums:
                    self._sums[layer] = torch.zeros(self.bins + 1, rows.shape[1])
                    self._counts[layer] = torch.zeros(self.bins + 1)
                    self._squares[layer] = torch.zeros(self.bins + 1)
                index = self._bins_of(progress, rows.shape[0])
                self._sums[layer].index_add_(0, index, rows)
                self._counts[layer].index_add_(0, index, torch.ones(rows.shape[0]))
                self._squares[layer].index_add_(0, index, rows.sum(1).square())

    def _bins_of(self, progress: float | Tensor | None, rows: int) -> Tensor:
        if progress is None:
            return torch.full((rows,), self.bins)
        level = torch.as_tensor(progress).detach().cpu().float().reshape(-1)
        level = level.repeat(rows // len(level))  # guidance repeats the batch
        return (level * self.bins).floor().long().clamp(0, self.bins - 1)

    def merge(self, other: GateRecorder) -> None:
        """Add what another recorder with the same bins has seen."""
        if other.bins != self.bins:
            raise SpectralAdapterError(
                f"recorders of {self.bins} and {other.bins} bins cannot be merged: use one number"
            )
        self._fetch()
        other._fetch()
        for layer, sums in other._sums.items():
            mine = self._sums.get(layer)
            if mine is not None and mine.shape != sums.shape:
                raise SpectralAdapterError(
                    f"layer {layer} has rank {mine.shape[1]} here and {sums.shape[1]} there"
                )
            self._sums[layer] = sums.clone() if mine is None else mine + sums
            for ours, theirs in ((self._counts, other._counts), (self._squares, other._squares)):
                known = ours.get(layer)
                ours[layer] = theirs[layer].clone() if known is None else known + theirs[layer]

    def summary(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON.

        ``layers`` names; ``ranks`` per layer; ``effective_rank`` layers × bins (None where nothing was seen),
        the mean number of open gates, noisiest bin first; ``input_spread`` the same for its standard
        deviation from input to input at one noise level; ``mean_effective_rank`` per layer over everything
        seen; ``switching`` the share of a layer's gates that are open in 5 to 95 % of the cases; ``passes``
        batch rows per layer; ``always_open`` the layers where no gate ever closed.
        """
        self._fetch()
        layers = list(self._sums)
        matrix: list[list[float | None]] = []
        spreads: list[list[float | None]] = []
        means: list[float] = []
        switching: list[float] = []
        for layer in layers:
            opened, counts = self._sums[layer].sum(1), self._counts[layer]
            matrix.append(
                [float(o / c) if c else None for o, c in zip(opened[:-1], counts[:-1], strict=True)]
            )
            variance = (self._squares[layer] / counts - (opened / counts).square()).clamp_min(0)
            spreads.append(
                [float(v) if c else None for v, c in zip(variance.sqrt()[:-1], counts[:-1], strict=True)]
            )
            means.append(float(opened.sum() / counts.sum()))
            shares = self._sums[layer].sum(0) / counts.sum()
            switching.append(float(((shares > _SWITCHES) & (shares < 1 - _SWITCHES)).float().mean()))
        ranks = [self._sums[layer].shape[1] for layer in layers]
        return {
            "bins": self.bins,
            "layers": layers,
            "ranks": ranks,
            "effective_rank": matrix,
            "input_spread": spreads,
            "mean_effective_rank": means,
            "switching": switching,
            "passes": [int(self._counts[layer].sum()) for layer in layers],
            "always_open": [n for n, mean, r in zip(layers, means, ranks, strict=True) if mean == r],
        }
