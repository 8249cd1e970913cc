"""Statistics of what layers see while a model runs: second moments, streamed, for measuring and fusing.

    modules = modules_of(pipe.unet, adapters, "unet")
    with attach(pipe.unet, adapters[0]), collect(modules, adapters) as seen:
        ...  # a few denoising steps under this concept
    statistics = seen.statistics()

Forward pre-hooks watch the layers' inputs; nothing is kept of them but sums. ``space="exact"`` sums the
whole second moment, fan_in² numbers a layer; ``"rank"`` sums it in the basis of the adapters' own rows,
(Σ r)² numbers, which is all that the adapters can tell apart. Neighbouring layers that get one tensor (to_q,
to_k, to_v) share one sum. Adaptive gates of all the adapters are watched too: what their gated rows do there.

Shapes: inputs (…, in) or (B, in, *space); sums as in :mod:`.moments`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.adapter import Adapter, AdapterLayer
from ..attach.placement import place
from ..attach.targets import layer_problem
from ..errors import SpectralAdapterError
from ..gates import formula as gates
from ..gates.formula import GateRuntime
from ..maths.layers import Geometry, as_fp32, project
from ..maths.precision import full_precision
from ..methods import AdaptiveGate
from ..words import chosen
from .moments import GatedRows, Statistics, row_basis

Space = Literal["exact", "rank"]
SPACES: tuple[Space, ...] = get_args(Space)
LIMIT_BYTES = 8 << 30


def modules_of(root: nn.Module, adapters: Sequence[Adapter], part: str) -> dict[str, nn.Module]:
    """Layer name -> module of ``root`` for every weight of this part that any adapter changes; biases and
    norms have no input to speak of, and grouped convolutions are not watched.

    Raises SpectralAdapterError where a layer has no place there.
    """
    found: dict[str, nn.Module] = {}
    for adapter in adapters:
        if part in adapter.parts:
            placed = place(root, adapter, part, strict=True)[0]
            found |= {
                str(p.name): p.module for p in placed if p.name.vector is None and not layer_problem(p.module)
            }
    return found


def exact_bytes(
    modules: Mapping[str, nn.Module], widths: Mapping[str, int], dtype: torch.dtype = torch.float32
) -> int:
    """What exact statistics of these layers may take at most; widths: layer name -> fan_in."""
    by_module = {id(module): widths[name] for name, module in modules.items() if name in widths}
    return sum(width * width for width in by_module.values()) * dtype.itemsize


@contextmanager
def collect(
    modules: Mapping[str, nn.Module],
    adapters: Sequence[Adapter],
    space: Space = "exact",
    dtype: torch.dtype = torch.float32,
    limit_bytes: int = LIMIT_BYTES,
    device: torch.device | None = None,
) -> Iterator[Collector]:
    """Watch the inputs of ``modules`` (layer name -> module) inside the block.

    adapters: all those to be fused or measured, in that order. space: ``exact`` or ``rank``. dtype: of the
    sums, float32 or float64. limit_bytes: refuse sums that could need more. device: where they are kept, by
    default where the layers compute.
    """
    collector = Collector(modules, adapters, space, dtype, limit_bytes, device)
    try:
        collector.start()
        yield collector
    finally:
        collector.stop()


@dataclass(frozen=True)
class _Gate:
    """One adaptive gate to watch: its folded rows and its network."""

    adapter: int
    index: int
    down: Tensor
    gate: AdaptiveGate
    params: Mapping[str, Tensor]
    name: str

    def rows(self, x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """G(z)·z and G(z), one row per token or patch (N, R)."""
        is_convolution = self.down.dim() > 2
        z = project(x, self.down.to(x), geometry)
        params = {key: value.to(x.device) for key, value in self.params.items()}
        kind, rows_per_gate, budget = self.gate
        runtime = GateRuntime()
        opened = gates.values(z, params, kind, rows_per_gate, is_convolution, runtime, self.name, budget)
        shown = opened.reshape(len(opened), opened.shape[1], *(1,) * (z.dim() - 2))
        if not is_convolution:
            shown = shown.movedim(1, -1)
        return _token_rows(z * shown, is_convolution), _token_rows(shown.expand_as(z), is_convolution)


@dataclass
class _Pending:
    """The moment of the latest input, until a layer comes with another one."""

    x: Tensor
    geometry: Geometry
    state: _State
    moment: Tensor
    names: list[str]

    def of(self, x: Tensor, geometry: Geometry) -> bool:
        return self.x is x and self.geometry == geometry and self.state.is_that_of(x)


class _State:
    """A tensor's numbers as they are now: its version, or of an inference tensor, which counts none, a
    copy."""

    def __init__(self, x: Tensor) -> None:
        self._copy = x.clone() if x.is_inference() else None
        self._version = 0 if x.is_inference() else x._version

    def is_that_of(self, x: Tensor) -> bool:
        return self._version == x._version if self._copy is None else torch.equal(self._copy, x)


class Collector:
    """Running sums of every layer; see :func:`collect`."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        adapters: Sequence[Adapter],
        space: Space,
        dtype: torch.dtype,
        limit_bytes: int,
        device: torch.device | None = None,
    ) -> None:
        space = chosen(space, SPACES, "statistics space")
        if dtype not in (torch.float32, torch.float64):
            raise SpectralAdapterError(f"statistics as {dtype}: expected float32 or float64")
        self._layers = {n: _watched(n, adapters) for n in modules if any(n in a.layers for a in adapters)}
        if not self._layers:
            raise SpectralAdapterError("no layer to watch: the adapters change none of these modules")
        self._space, self._dtype, self._device = space, dtype, device
        self._modules = {name: modules[name] for name in self._layers}
        self._bases: dict[str, Tensor] = {}
        if space == "rank":
            self._bases = {n: row_basis(downs).float() for n, (downs, _) in self._layers.items()}
        else:
            self._check_size(limit_bytes)
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._gated: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._pending: _Pending | None = None
        self._handles: list[Any] = []

    def _check_size(self, limit: int) -> None:
        widths = {n: downs[0][0].numel() for n, (downs, _) in self._layers.items()}
        needed = exact_bytes(self._modules, widths, self._dtype)
        if needed > limit:
            raise SpectralAdapterError(
                f"exact statistics of {len(widths)} layers need up to {needed / 2**30:.1f} GiB, allowed are "
                f"{limit / 2**30:.1f}: collect them in rank space (space='rank'), or some layers at a time"
            )

    def start(self) -> None:
        """Put the hooks on."""
        names: dict[int, list[str]] = {}
        for name, module in self._modules.items():
            names.setdefault(id(module), []).append(name)
        for group in names.values():
            module = self._modules[group[0]]
            self._handles.append(module.register_forward_pre_hook(self._hook(group), with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks off; what was summed stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with torch.no_grad(), torch.inference_mode(False):
            self._flush()

    def _hook(self, names: list[str]) -> Any:
        kernel = self._adapted(names[0]).shape.kernel

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.no_grad(), torch.inference_mode(False):
                self._see(names, Geometry.of(module), x, len(kernel))

        return see

    def _adapted(self, name: str) -> AdapterLayer:
        return self._layers[name][1][0][0]

    @torch.no_grad()
    def _see(self, names: list[str], geometry: Geometry, x: Tensor, space: int) -> None:
        batch = x[None] if x.dim() == 1 + space else x
        wide = as_fp32(batch.detach())
        with full_precision(wide.device):
            for name in names:
                rows = self._see_layer(name, wide, geometry, space)
                self._counts[name] = self._counts.get(name, 0) + rows
        if self._space == "rank":
            return
        held = self._pending
        if held is not None and held.of(x, geometry):
            held.names.extend(names)
        else:  # summed now: whoever comes next may change x in place
            self._flush()
            moment = _second_moment(wide, self._adapted(names[0]).shape.kernel, geometry)
            self._pending = _Pending(x, geometry, _State(x), moment, list(names))

    def _see_layer(self, name: str, x: Tensor, geometry: Geometry, space: int) -> int:
        """What belongs to one layer alone: its moment in rank space, its gates; returns the rows seen."""
        watched = [gate for _, found in self._layers[name][1] for gate in found]
        basis = self._bases.get(name)
        if basis is None and not watched:
            return _row_count(x, geometry, self._adapted(name).shape.kernel)
        kernel = self._adapted(name).shape.kernel
        count = 0
        for part in x.split(1) if kernel and basis is None else (x,):
            if basis is None:
                rows = patches(part, kernel, geometry)
            else:
                down = basis.to(x).reshape(len(basis), *self._adapted(name).shape.weight_shape[1:])
                rows = _token_rows(project(part, down, geometry), bool(kernel))
                self._add((name,), rows.mT @ rows)
            if watched:
                self._add_gates(name, [gate.rows(part, geometry) for gate in watched], rows)
            count += len(rows)
        return count

    def _add_gates(self, name: str, found: list[tuple[Tensor, Tensor]], rows: Tensor) -> None:
        gated, opened = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        seen = [gated.mT @ rows, gated.mT @ gated, opened.sum(0)]
        products = [p.to(self._device or p.device) for p in seen]
        sums = self._gated.setdefault(name, [p.new_zeros(p.shape, dtype=self._dtype) for p in products])
        for total, product in zip(sums, products, strict=True):
            total += product

    def _flush(self) -> None:
        """Give the moment that waited to the layers that turned out to share it."""
        held, self._pending = self._pending, None
        if held is not None:
            self._add(tuple(held.names), held.moment)

    def _add(self, names: tuple[str, ...], product: Tensor) -> None:
        product = product.to(self._device or product.device)
        if names in self._sums:
            self._sums[names] += product
        else:
            self._sums[names] = product.to(self._dtype, copy=True)

    @torch.inference_mode(False)  # hosts ask in it, and its tensors would be of no use to others
    @torch.no_grad()
    def statistics(self) -> dict[str, Statistics]:
        """Layer name -> statistics; layers that never ran are left out. Those of one input share a tensor."""
        self._flush()
        shared: dict[tuple[tuple[str, ...], ...], Tensor] = {}
        found: dict[str, Statistics] = {}
        for name, count in self._counts.items():
            groups = tuple(names for names in self._sums if name in names)
            if groups not in shared:
                total = self._sums[groups[0]] / count
                for other in groups[1:]:
                    total += self._sums[other] / count
                shared[groups] = total
            found[name] = Statistics(shared[groups], count, self._bases.get(name), self._gated_rows(name))
        return found

    def _gated_rows(self, name: str) -> GatedRows | None:
        if name not in self._gated:
            return None
        cross, energy, opened = (total / self._counts[name] for total in self._gated[name])
        watched = [gate for _, found in self._layers[name][1] for gate in found]
        keys = tuple((gate.adapter, gate.index, len(gate.down)) for gate in watched)
        return GatedRows(keys, cross, energy, opened)


_Watched = tuple[list[Tensor], list[tuple[AdapterLayer, list[_Gate]]]]


def _watched(name: str, adapters: Sequence[Adapter]) -> _Watched:
    """The rows of all adapters in a layer, (R, in, *kernel) each, and each adapter's layer with its gates."""
    downs: list[Tensor] = []
    layers: list[tuple[AdapterLayer, list[_Gate]]] = []
    for place_, adapter in enumerate(adapters):
        if name not in adapter.layers:
            continue
        layer, found = adapter.layers[name], []
        for index, term in enumerate(layer.terms):
            down = term.factors(layer.shape).down.detach()
            downs.append(down)
            gate = term.config.adaptive_gate
            if gate is not None:
                found.append(_Gate(place_, index, down, gate, term.params, name))
        layers.append((layer, found))
    if len({layer.shape for layer, _ in layers}) > 1:
        raise SpectralAdapterError(
            f"layer {name} has different shapes in these adapters: they belong to different base models"
        )
    return downs, layers


def _token_rows(z: Tensor, is_convolution: bool) -> Tensor:
    """(N, R): one row per token, or per place of a convolution's output."""
    return (z.movedim(1, -1) if is_convolution else z).reshape(-1, z.shape[1 if is_convolution else -1])


def _row_count(x: Tensor, geometry: Geometry, kernel: tuple[int, ...]) -> int:
    if not kernel:
        return x.numel() // x.shape[-1]
    return len(_token_rows(project(x[:, :1], x.new_ones(1, 1, *kernel), geometry), True))


def _second_moment(x: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Σ x xᵀ (fan_in, fan_in); of a convolution one picture at a time, its patches are larger than it."""
    total = None
    for part in x.split(1) if kernel else (x,):
        rows = patches(part, kernel, geometry)
        product = rows.mT @ rows
        total = product if total is None else total + product
    assert total is not None
    return total


def patches(x: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """What a layer's flattened weight multiplies: (N, fan_in); for a linear layer its tokens."""
    if not kernel:
        return x.reshape(-1, x.shape[-1])
    dilation = geometry.dilation or (1,) * len(kernel)
    stride = geometry.stride or (1,) * len(kernel)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    mode = geometry.padding_mode
    sides = geometry.pad_sides if mode != "zeros" else _zero_padding(geometry.padding, spans)
    if any(sides):
        x = F.pad(x, sides) if mode == "zeros" else F.pad(x, sides, mode=mode)
    sizes = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, stride, strict=True)]
    views = []
    for offsets in itertools.product(*map(range, kernel)):
        places = tuple(
            slice(o * d, o * d + (size - 1) * s + 1, s)
            for o, d, size, s in zip(offsets, dilation, sizes, stride, strict=True)
        )
        index = (slice(None), slice(None), *places)
        views.append(x[index])
    return torch.stack(views, 2).flatten(1, 2).movedim(1, -1).flatten(0, -2)


def _zero_padding(padding: tuple[int, ...] | str, spans: list[int]) -> list[int]:
    """Both sides of each axis, last axis first, as F.pad wants them."""
    if padding == "valid":
        return [0] * (2 * len(spans))
    if padding == "same":
        pairs = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    else:
        assert not isinstance(padding, str)
        pairs = [(p, p) for p in padding]
    return [side for pair in reversed(pairs) for side in pair]
