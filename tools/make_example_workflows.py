"""Write ``example_workflows/*.json`` and the blueprints in ``subgraphs``, as ComfyUI's page loads them.

    python -m tools.make_example_workflows

They are written down in :mod:`tools.example_graphs` and :mod:`tools.example_blueprints`. Sockets and
the order of widgets come from the pack's node classes; those of the host's own nodes that are used are in
``HOST_NODES``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_core.whole_file import write_whole
from tools import example_blueprints
from tools.example_graphs import WORKFLOWS
from tools.example_parts import Graph, Node, Slots, as_node

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "example_workflows"
BLUEPRINT_FOLDER = ROOT / "subgraphs"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")

HOST_NODES = {
    "CLIPTextEncode": Slots((("clip", "CLIP"),), ("text",), (("CONDITIONING", "CONDITIONING"),)),
    "KSampler": Slots(
        (
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ),
        ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        (("LATENT", "LATENT"),),
    ),
    "EmptyLatentImage": Slots((), ("width", "height", "batch_size"), (("LATENT", "LATENT"),)),
    "VAEDecode": Slots((("samples", "LATENT"), ("vae", "VAE")), (), (("IMAGE", "IMAGE"),)),
    "SaveImage": Slots((("images", "IMAGE"),), ("filename_prefix",), ()),
    "MarkdownNote": Slots((), ("text",), ()),
}


def our_slots() -> dict[str, Slots]:
    """The pack's nodes, read off their classes."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = pack
    spec.loader.exec_module(pack)
    found = {}
    for name, kind in pack.NODE_CLASS_MAPPINGS.items():
        types = kind.INPUT_TYPES()
        given = {**types.get("required", {}), **types.get("optional", {})}
        is_widget = {k: isinstance(v[0], list | tuple) or v[0] in WIDGETS for k, v in given.items()}
        sockets = tuple((k, v[0]) for k, v in given.items() if not is_widget[k])
        outputs = zip(getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES), kind.RETURN_TYPES, strict=True)
        kinds = {k: v[0] if isinstance(v[0], str) else "COMBO" for k, v in given.items() if is_widget[k]}
        found[name] = Slots(sockets, tuple(kinds), tuple(outputs), kinds)
    return found


def as_page(name: str, graph: Graph, slots: Mapping[str, Slots]) -> dict[str, Any]:
    """The workflow as the page saves it (version 0.4)."""
    nodes = with_room(dict(graph.nodes))
    ids = {key: number for number, key in enumerate(nodes, 1)}
    links: list[list[Any]] = []
    made = {key: as_node(n, slots[n.kind], ids[key]) for key, n in nodes.items()}
    for key, n in nodes.items():
        sockets = slots[n.kind].sockets
        unknown = set(n.values) - {s for s, _ in sockets} - set(slots[n.kind].widgets)
        assert not unknown, (key, unknown)
        for place, (socket, kind) in enumerate(sockets):
            if socket not in n.values:
                continue
            source, output = n.values[socket]
            assert slots[nodes[source].kind].outputs[output][1] == kind, (key, socket)
            links.append([len(links) + 1, ids[source], output, ids[key], place, kind])
            made[key]["inputs"][place]["link"] = len(links)
            made[source]["outputs"][output]["links"].append(len(links))
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-spectral-adapters/{name}")),
        "revision": 0,
        "last_node_id": len(ids),
        "last_link_id": len(links),
        "nodes": list(made.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [90, 90]}, "linearData": app_mode(graph, ids)},
        "version": 0.4,
    }


def app_mode(graph: Graph, ids: Mapping[str, int]) -> dict[str, Any]:
    """What the page's app mode shows of the workflow, on hosts that have it."""
    for key, _ in graph.inputs:
        assert key in ids, key
    return {
        "inputs": [[str(ids[key]), widget] for key, widget in graph.inputs],
        "outputs": [str(ids[key]) for key in graph.outputs],
    }


# What the page needs for our nodes' widgets, cards and reports, in pixels, in the higher of its two ways to
# show nodes.
HEIGHTS = {
    "LoadFouRA": 450,
    "LoadSpectralAdapter": 480,
    "LoadLoRAAsAdapter": 370,
    "AdapterStrength": 620,
    "AdapterStack": 400,
    "FuseAdapters": 860,
    "ApplyAdapter": 410,
    "SaveAdapter": 370,
    "ExportAdapterAsLoRA": 350,
    "LoadDemoModel": 300,
    "TrainAdapter": 850,
    "TrainOptimiser": 330,
}
_GAP = 50  # the title of the lower one, and air


def with_room(nodes: dict[str, Node]) -> dict[str, Node]:
    """The nodes as high as the page makes them, and those below moved down as far as that needs."""
    placed: dict[str, Node] = {}
    for key, found in sorted(nodes.items(), key=lambda item: item[1].box[1]):
        x, y, width, height = found.box
        height = max(height, HEIGHTS.get(found.kind.rpartition("_")[2], 0))
        for other in placed.values():
            left, top, its_width, its_height = other.box
            if x < left + its_width and left < x + width:
                y = max(y, top + its_height + _GAP)
        placed[key] = replace(found, box=(x, y, width, height))
    return {key: placed[key] for key in nodes}


def main() -> None:
    slots = {**HOST_NODES, **our_slots()}
    FOLDER.mkdir(exist_ok=True)
    for name, graph in WORKFLOWS.items():
        page = as_page(name, graph, slots)
        text = json.dumps(page, indent=1, ensure_ascii=False) + "\n"
        write_whole(FOLDER / f"{name}.json", text)
        print(f"{name}: {len(page['nodes'])} nodes, {len(page['links'])} links")
    BLUEPRINT_FOLDER.mkdir(exist_ok=True)
    for name, found in example_blueprints.BLUEPRINTS.items():
        text = json.dumps(example_blueprints.as_page(name, found, slots), indent=1, ensure_ascii=False) + "\n"
        write_whole(BLUEPRINT_FOLDER / f"{name}.json", text)


if __name__ == "__main__":
    main()
