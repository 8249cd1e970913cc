"""A trainer's parts as the tensors and plain numbers of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...attach.attaching import Attachment
from ...errors import SpectralAdapterError
from ..data.order import Order, OrderState
from .checkpoint import State
from .rng import RandomState


def pack_parameters(named: Sequence[tuple[str, nn.Parameter]], values: Sequence[Tensor]) -> State:
    return State({name: value.detach() for (name, _), value in zip(named, values, strict=True)}, {})


def unpack_parameters(named: Sequence[tuple[str, nn.Parameter]], packed: State) -> list[Tensor]:
    """The values in the order of the names, each on its parameter's device."""
    found = []
    for name, parameter in named:
        value = packed.tensors.get(name)
        if value is None or value.shape != parameter.shape:
            raise SpectralAdapterError(
                f"the checkpoint has {'no' if value is None else tuple(value.shape)} {name}, this run "
                f"{tuple(parameter.shape)}: it belongs to another run"
            )
        found.append(value.to(parameter.device))
    return found


def pack_gates(attachments: Sequence[Attachment]) -> State:
    """The gates' statistics; their mode and temperature."""
    packed = State(values={"runtimes": []})
    for i, attachment in enumerate(attachments):
        state = attachment.gates.state()
        counts: dict[str, dict[str, int]] = {}
        for kind in ("mu", "open", "levels"):
            counts[kind] = {name: count for name, (_, count) in state[kind].items()}
            packed.tensors |= {f"{i}.{kind}.{n}": total for n, (total, _) in state[kind].items()}
        plain = {key: state[key] for key in ("mode", "temperature", "calibrating")}
        packed.values["runtimes"].append(plain | {"counts": counts})
    return packed


def unpack_gates(attachments: Sequence[Attachment], packed: State) -> None:
    for i, (attachment, plain) in enumerate(zip(attachments, packed.values["runtimes"], strict=True)):
        device = next(attachment.parameters()).device
        means = {
            kind: {n: (packed.tensors[f"{i}.{kind}.{n}"].to(device), count) for n, count in names.items()}
            for kind, names in plain["counts"].items()
        }
        attachment.gates.restore({**plain, **means})


def pack_order(order: Order) -> State:
    state = order.state()
    return State({"generator": state.generator}, {"queue": list(state.queue)})


def unpack_order(order: Order, packed: State) -> None:
    order.restore(OrderState(tuple(packed.values["queue"]), packed.tensors["generator"]))


def pack_random(state: RandomState) -> State:
    values = {name: value for name, value in vars(state).items() if name != "tensors"}
    return State(dict(state.tensors), values)


def unpack_random(packed: State) -> RandomState:
    return RandomState(packed.tensors, **packed.values)
