"""Checkpoint files: everything that the steps to come depend on, in one safetensors file, its numbers as JSON
in the metadata. No pickle anywhere, written atomically: a full disk or a crash leaves the last good one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import SpectralAdapterError
from ...files import writing as safewrite
from ...files.container import open_safely

VERSION = "2"
VERSION_KEY = "spectral_adapters.checkpoint"
VALUES_KEY = "spectral_adapters.values"
DIGEST_KEY = "spectral_adapters.digest"
_TRAINED = ("parameters.", "averages.", "optimiser")  # the optimisers are numbered
_NAME = re.compile(r"checkpoint-([0-9]{8,18})\.safetensors")


@dataclass
class State:
    """Tensors and JSON-able values, by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, prefix: str, other: State) -> None:
        self.tensors |= {f"{prefix}.{k}": v for k, v in other.tensors.items()}
        self.values[prefix] = other.values

    def part(self, prefix: str) -> State:
        start = prefix + "."
        tensors = {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}
        return State(tensors, self.values[prefix])


def path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08d}.safetensors"


def write(state: State, folder: Path, step: int) -> Path:
    """Write the checkpoint of a step, in place of one of the same step. Raises as
    :func:`..safewrite.write`."""
    text = json.dumps(state.values)
    metadata = {VERSION_KEY: VERSION, VALUES_KEY: text, DIGEST_KEY: digest(state.tensors, text)}
    return safewrite.write(state.tensors, metadata, path_of(folder, step), overwrite=True)


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over all that a checkpoint holds: every name, dtype, shape and byte, and the numbers."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode("utf-8", "surrogatepass"))
        if value.numel():
            found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read(path: Path) -> State:
    """A checkpoint; SpectralAdapterError where it is damaged, of another version or no checkpoint, and where
    what it trains is not finite."""
    file = open_safely(path)
    version = file.metadata.get(VERSION_KEY)
    if version != VERSION:
        raise SpectralAdapterError(
            f"{path}: checkpoint version {version!r}, expected {VERSION!r}: it was written by another "
            "version of this package, or is no checkpoint; start the run anew under another name"
        )
    text, tensors = file.metadata.get(VALUES_KEY, ""), file.read()
    if digest(tensors, text) != file.metadata.get(DIGEST_KEY):
        raise SpectralAdapterError(f"{path}: damaged checkpoint: it is not what was written (SHA-256)")
    for name, value in tensors.items():
        if name.startswith(_TRAINED) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SpectralAdapterError(
                f"{path}: {name} holds NaN or infinite values: the training had failed"
            )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpectralAdapterError(f"{path}: damaged checkpoint: {error}") from error
    return State(tensors, values)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every checkpoint in a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted(found, reverse=True)


def read_newest(folder: Path) -> tuple[State | None, list[str]]:
    """The newest checkpoint that can be read, and a note for each newer one that cannot.

    Raises SpectralAdapterError when there are some and none can be read.
    """
    notes: list[str] = []
    for _, path in listed(folder):
        try:
            return read(path), notes
        except SpectralAdapterError as error:
            notes.append(f"a checkpoint was left out: {error}")
    if notes:
        raise SpectralAdapterError(f"{folder}: no checkpoint can be read. {notes[0]}")
    return None, []


def keep_newest(folder: Path, count: int) -> None:
    for _, path in listed(folder)[max(count, 1) :]:
        _remove(path)


def discard_after(folder: Path, step: int) -> None:
    """Take away checkpoints later than a step, where an earlier one is there to go back to."""
    if any(found <= step for found, _ in listed(folder)):
        for found, path in listed(folder):
            if found > step:
                _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # on Windows another program may be reading it
        path.unlink()


def pack_optimiser(optimiser: torch.optim.Optimizer) -> State:
    """``<parameter>.<name>`` and ``group<i>.<name>``: tensors as tensors, also those of a table as
    ``<parameter>.<table>.<name>``, everything else as JSON."""
    full = optimiser.state_dict()
    found = State(values={"state": {}, "groups": []})
    for index, entries in full["state"].items():
        plain = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                found.tensors[f"{index}.{key}"] = value
            elif isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values()):
                found.tensors |= {f"{index}.{key}.{name}": v for name, v in value.items()}
            else:
                plain[key] = value
        found.values["state"][str(index)] = plain
    for i, group in enumerate(full["param_groups"]):
        plain = {}
        for key, value in group.items():
            if isinstance(value, Tensor):
                found.tensors[f"group{i}.{key}"] = value
            elif key != "params":
                plain[key] = value
        found.values["groups"].append(plain)
    return found


def unpack_optimiser(optimiser: torch.optim.Optimizer, packed: State) -> None:
    """Put a packed state into a fresh optimiser over the same parameters."""
    fresh = optimiser.state_dict()["param_groups"]
    if len(fresh) != len(packed.values["groups"]):
        raise SpectralAdapterError(
            f"the checkpoint has {len(packed.values['groups'])} groups of parameters, this run {len(fresh)}: "
            "it belongs to another run"
        )
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in packed.values["state"].items()}
    groups = [_like(old, new) for old, new in zip(fresh, packed.values["groups"], strict=True)]
    for name, tensor in packed.tensors.items():
        owner, key = name.split(".", 1)
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][key] = tensor
        elif "." in key:
            table, inner = key.split(".", 1)
            state[int(owner)].setdefault(table, {})[inner] = tensor
        else:
            state[int(owner)][key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _like(fresh: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved values of a group, pairs that JSON made lists of as tuples again."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    return {**values, "params": fresh["params"]}
