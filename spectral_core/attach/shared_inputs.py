"""Layers that read one input, such as q, k and v of an attention: in training their first products are one.

The first of them that meets an input projects it for all, and their gates with it; the others find what is
theirs when they run. One product of 24 rows instead of three of 8, one gate's operations instead of three,
and one addition to the input's gradient. Which layers are siblings follows from their names and shapes and
never from what ran before: rounding depends on it, and a resumed training has to go on to the last bit.

What is made for a sibling belongs to the forward pass of the first: they run in one pass, with one backward,
and gradient checkpointing goes around all of them or none (:mod:`..training.engine.checkpointing` takes whole
blocks).

Shapes: x (…, in), z (…, R).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from ..adapter.adapter import AdapterLayer
from ..names.layer_name import LayerName
from . import gate_training as gate_node
from . import products
from .factors import Begun, Piece, Ready, Started

# Names of layers below one module that read the same input.
_FAMILIES = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
)
_CROSS = "attn2"  # what UNets call the attention to the words, whose first layer reads something else


class LayerUpdate(Protocol):
    """What is asked of an update here (:class:`.update.LayerUpdate`)."""

    name: LayerName
    layer: AdapterLayer
    pieces: tuple[Piece, ...]
    is_convolution: bool
    trained: bool
    siblings: Siblings | None

    def begins(self, x: Tensor) -> bool: ...
    def ready(self, piece: Piece, x: Tensor) -> Ready: ...
    def gate_of(self, piece: Piece, params: Mapping[str, Tensor]) -> gate_node.Gate: ...
    def has_gate_node(self, piece: Piece, x: Tensor) -> bool: ...


def relate(updates: Iterable[LayerUpdate]) -> None:
    """Tell every trained update its siblings."""
    alike: dict[Any, list[LayerUpdate]] = {}
    for update in updates:
        key = _input_of(update)
        if key is not None:
            alike.setdefault(key, []).append(update)
    for members in alike.values():
        if len(members) > 1:
            siblings = Siblings(members)
            for member in members:
                member.siblings = siblings


@contextmanager
def gates_stacked(updates: Iterable[LayerUpdate]) -> Iterator[None]:
    """Inside, the tensors of the trained gates that one node may open are stacked already, those of all
    layers in few operations: for one forward pass and its backward, between which none may change."""
    alike: dict[Any, list[tuple[LayerUpdate, Piece]]] = {}
    for update in updates:
        for piece in update.pieces:
            if update.trained and piece.gated:
                family = id(update if update.siblings is None else update.siblings)
                alike.setdefault((family, _gate_kind(piece)), []).append((update, piece))
    groups = [group for (_, kind), group in alike.items() if kind[0] == "mlp"]
    gates = [[update.gate_of(piece, piece.terms[0].params) for update, piece in group] for group in groups]
    for group, stack in zip(groups, gate_node.stacked(gates), strict=True):
        for _, piece in group:
            piece.stack = stack
    try:
        yield
    finally:
        for group in groups:
            for _, piece in group:
                piece.stack = None


def forget(updates: Iterable[LayerUpdate]) -> None:
    """Hold nothing of what was projected for updates that have not run."""
    for update in updates:
        if update.siblings is not None:
            update.siblings.forget()


def _input_of(update: LayerUpdate) -> tuple[Any, ...] | None:
    """Equal for layers that read one input; None where nothing is known."""
    parent, _, leaf = update.name.path.rpartition(".")
    if update.is_convolution:
        return None
    if update.name.rows is not None:  # q, k and v in one module
        return update.name.part, update.name.path
    for family in _FAMILIES:
        if leaf in family:
            apart = leaf == family[0] and parent.rpartition(".")[2] == _CROSS
            return None if apart else (update.name.part, parent, family, update.layer.shape.in_features)
    return None


class Siblings:
    """The trained updates that read one input."""

    def __init__(self, members: Sequence[LayerUpdate]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self.forget()

    def forget(self) -> None:
        """Hold nothing of the last input."""
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0
        self._given: Tensor | None = None
        self._waiting: dict[int, Begun] = {}

    def begin(self, member: LayerUpdate, x: Tensor) -> tuple[Tensor, Begun]:
        """The x for the member's module, and what its pieces begin with."""
        if id(member) not in self._waiting or not self._has_met(x):
            others = [m for m in (ref() for ref in self._members) if m is not None]
            members = [m for m in others if m is member or m.begins(x)]
            self._source, self._version = weakref.ref(x), x._version
            self._given, begun = project(members, x)
            self._waiting = {id(m): each for m, each in zip(members, begun, strict=True)}
        given, found = self._given, self._waiting.pop(id(member))
        assert given is not None
        if not self._waiting:
            self.forget()
        return given, found

    def _has_met(self, x: Tensor) -> bool:
        """Whether x is what was projected, unchanged since, or what came back for the modules to take."""
        is_source = self._source is not None and self._source() is x and x._version == self._version
        return is_source or x is self._given


def project(members: Sequence[LayerUpdate], x: Tensor) -> tuple[Tensor, list[Begun]]:
    """(x for the modules, what each member's pieces begin with); pieces that are alike in one product."""
    every = [(member, piece, member.ready(piece, x)) for member in members for piece in member.pieces]
    found = [Started(ready) for _, _, ready in every]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, each in enumerate(every):
        down = each[2][0]
        if len(down) and down.dim() == 2:  # a frozen gate may have closed every row
            alike.setdefault(_kind(each[0], each[1], x), []).append(i)
    for (is_gated, *_), places in alike.items():
        downs = [every[i][2][0] for i in places]
        ties = [every[i][1].tie(x.device, x.dtype) for i in places]
        opened: Sequence[gate_node.Opened | None] = [None] * len(places)
        if is_gated:
            gates = [member.gate_of(piece, ready[2]) for member, piece, ready in (every[i] for i in places)]
            multiply = not any(on_up(x, every[i][2][1]) for i in places)
            x, rows, opened = gate_node.project(x, downs, ties, gates, multiply)
        else:
            x, rows = products.project(x, downs, ties)
        for i, z, each_opened in zip(places, rows, opened, strict=True):
            found[i] = Started(every[i][2], z, each_opened)
    started = iter(found)
    return x, [[next(started) for _ in member.pieces] for member in members]


def _kind(member: LayerUpdate, piece: Piece, x: Tensor) -> tuple[Any, ...]:
    """Whether a gate is opened with the product; equal for pieces that one product may serve."""
    return (True, *_gate_kind(piece)) if member.has_gate_node(piece, x) else (False,)


def _gate_kind(piece: Piece) -> tuple[Any, ...]:
    """Equal for gates that one node may open; the shapes of their tensors follow from it."""
    config: Any = piece.terms[0].config
    return config.gate_kind, config.rank, config.rows_per_gate


def on_up(z: Tensor, up: Tensor) -> bool:
    """Whether factors of z's rows go on ``up``: a batch row's copy of it is smaller than its z."""
    return z.dim() == 3 and z.shape[1] > up.shape[0]
