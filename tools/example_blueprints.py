"""The subgraph blueprints that the page lists among its nodes (``subgraphs/*.json``).

An input of a subgraph feeds sockets or widgets of the nodes in it: pairs of a node's key and an input's name.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.example_parts import Node, Slots, applied, as_node, fused, strength, trained

IN, OUT = -10, -20  # the ids of a subgraph's two ends


@dataclass(frozen=True)
class Blueprint:
    """inputs: name, type, what it feeds. outputs: name, type, the node and the number of its output."""

    description: str
    nodes: Mapping[str, Node]
    inputs: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    outputs: tuple[tuple[str, str, str, int], ...]


def train_a_concept() -> Blueprint:
    train = trained((0, 0, 420, 850), 0, 0, "my_concept")
    return Blueprint(
        "Trains an adapter on a folder of pictures and puts it on the model.",
        {"train": train, "apply": applied("train", 480, 0, 410, {})},
        (
            ("model", "MODEL", (("train", "model"), ("apply", "model"))),
            ("clip", "CLIP", (("train", "clip"), ("apply", "clip"))),
            ("vae", "VAE", (("train", "vae"),)),
            ("images", "COMBO", (("train", "images"),)),
            ("trigger_word", "STRING", (("train", "trigger_word"),)),
            ("preset", "COMBO", (("train", "preset"),)),
            ("run_name", "STRING", (("train", "run_name"),)),
        ),
        (
            ("MODEL", "MODEL", "apply", 0),
            ("CLIP", "CLIP", "apply", 1),
            ("ADAPTER", "SPECTRAL_ADAPTER", "train", 0),
        ),
    )


def combine_three() -> Blueprint:
    third = strength((0, 0, 380, 620))
    fuse = fused("closed-form", (440, 0, 380, 860), adapters=("third", 1))
    return Blueprint(
        "Fuses three adapters so that each keeps its concept, and puts the one on the model.",
        {"third": third, "fuse": fuse, "apply": applied("fuse", 880, 0, 410, {})},
        (
            ("model", "MODEL", (("fuse", "model"), ("apply", "model"))),
            ("clip", "CLIP", (("fuse", "clip"), ("apply", "clip"))),
            ("adapter_1", "SPECTRAL_ADAPTER", (("fuse", "adapter_1"),)),
            ("adapter_2", "SPECTRAL_ADAPTER", (("fuse", "adapter_2"),)),
            ("adapter_3", "SPECTRAL_ADAPTER", (("third", "adapter"),)),
            ("method", "COMBO", (("fuse", "method"),)),
            ("prompts", "STRING", (("fuse", "prompts"),)),
            ("sample_cfg", "FLOAT", (("fuse", "sample_cfg"),)),
        ),
        (
            ("MODEL", "MODEL", "apply", 0),
            ("CLIP", "CLIP", "apply", 1),
            ("ADAPTER", "SPECTRAL_ADAPTER", "fuse", 0),
        ),
    )


BLUEPRINTS = {
    "Train a concept (Spectral Adapters)": train_a_concept(),
    "Combine three adapters (Spectral Adapters)": combine_three(),
}


def as_page(name: str, found: Blueprint, slots: Mapping[str, Slots]) -> dict[str, Any]:
    """A file as the page publishes a subgraph: one node, and the subgraph that it is."""

    def known(what: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-spectral-adapters/{name}/{what}"))

    ids = {key: number for number, key in enumerate(found.nodes, 1)}
    inside = {key: _inside(n, slots[n.kind], ids[key]) for key, n in found.nodes.items()}
    links: list[dict[str, Any]] = []

    def link(origin: tuple[int, int], key: str, name: str, kind: str) -> int:
        place = next(i for i, s in enumerate(inside[key]["inputs"]) if s["name"] == name)
        made = {"id": len(links) + 1, "origin_id": origin[0], "origin_slot": origin[1]}
        links.append({**made, "target_id": ids[key], "target_slot": place, "type": kind})
        inside[key]["inputs"][place]["link"] = len(links)
        return len(links)

    for key, n in found.nodes.items():
        for socket, kind in slots[n.kind].sockets:
            if socket in n.values:
                source, output = n.values[socket]
                number = link((ids[source], output), key, socket, kind)
                inside[source]["outputs"][output]["links"].append(number)
    given = []
    for place, (label, kind, fed) in enumerate(found.inputs):
        numbers = [link((IN, place), key, what, kind) for key, what in fed]
        given.append({"id": known(f"in {label}"), "name": label, "type": kind, "linkIds": numbers})
    results = []
    for place, (label, kind, key, output) in enumerate(found.outputs):
        made = {"id": len(links) + 1, "origin_id": ids[key], "origin_slot": output, "target_id": OUT}
        links.append({**made, "target_slot": place, "type": kind})
        inside[key]["outputs"][output]["links"].append(len(links))
        results.append({"id": known(f"out {label}"), "name": label, "type": kind, "linkIds": [len(links)]})
    widgets = {label for label, _, fed in found.inputs if _is_widget(found, slots, fed[0])}
    subgraph = {
        "id": known("subgraph"),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(ids), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": IN, "bounding": [-240, 0, 140, 40 + 20 * len(given)]},
        "outputNode": {"id": OUT, "bounding": [1400, 0, 140, 40 + 20 * len(results)]},
        "inputs": given,
        "outputs": results,
        "widgets": [],
        "nodes": list(inside.values()),
        "groups": [],
        "links": links,
        "extra": {"workflowRendererVersion": "LG"},
        "category": "spectral adapters",
        "description": found.description,
    }
    values = [found.nodes[fed[0][0]].values[fed[0][1]] for label, _, fed in found.inputs if label in widgets]
    outer = {
        "id": 1,
        "type": subgraph["id"],
        "pos": [0, 0],
        "size": [420, 340],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": label, "type": kind, "link": None}
            | ({"widget": {"name": label}} if label in widgets else {})
            for label, kind, _ in found.inputs
        ],
        "outputs": [{"name": label, "type": kind, "links": None} for label, kind, _, _ in found.outputs],
        "title": name,
        "properties": {"proxyWidgets": [["-1", label] for label, _, _ in found.inputs if label in widgets]},
        "widgets_values": values,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {},
    }


def _is_widget(found: Blueprint, slots: Mapping[str, Slots], fed: tuple[str, str]) -> bool:
    return fed[1] in slots[found.nodes[fed[0]].kind].widgets


def _inside(n: Node, slots: Slots, number: int) -> dict[str, Any]:
    """In a subgraph a widget has a socket, too."""
    made = as_node(n, slots, number)
    widgets = [
        {"name": w, "type": slots.kinds[w], "widget": {"name": w}, "link": None} for w in slots.widgets
    ]
    return {**made, "inputs": made["inputs"] + widgets}
