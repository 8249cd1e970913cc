"""Graphs for the tests: small ones written here in API form, and the example workflows turned into it."""

from __future__ import annotations

import io
import json
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from demo_model.draw import PIXELS
from tests.host.booted import ROOT, Host

Graph = dict[str, Any]
EXAMPLES = ROOT / "example_workflows"
PROMPT = "a large red striped star on a blue background, on the left"
NEGATIVE = ""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node; an input from another one is ``[its id, the output's number]``."""
    return {"class_type": class_type, "inputs": inputs}


def demo_graph(prompt: str = PROMPT, seed: int = 1, steps: int = 20, **more: Any) -> Graph:
    """Load Demo Model to SaveImage, with the settings that its description names; ``more`` adds nodes."""
    return {
        "demo": node("SpectralAdapters_LoadDemoModel"),
        **more,
        **picture(["demo", 0], ["demo", 1], ["demo", 2], prompt, seed, steps, latent=["demo", 4]),
    }


def picture(
    model: list[Any],
    clip: list[Any],
    vae: list[Any],
    prompt: str = PROMPT,
    seed: int = 1,
    steps: int = 20,
    tag: str = "",
    size: int = PIXELS,
    latent: list[Any] | None = None,
) -> Graph:
    """The host's own nodes from prompt to saved picture. ``tag`` sets several apart in one graph.

    ``latent``: in place of an empty one of ``size``.
    """
    ids = {name: name + tag for name in ("positive", "negative", "latent", "sampler", "decode", "save")}
    empty = node("EmptyLatentImage", width=size, height=size, batch_size=1)
    return {
        **({} if latent else {ids["latent"]: empty}),
        ids["positive"]: node("CLIPTextEncode", clip=clip, text=prompt),
        ids["negative"]: node("CLIPTextEncode", clip=clip, text=NEGATIVE),
        ids["sampler"]: node(
            "KSampler",
            model=model,
            positive=[ids["positive"], 0],
            negative=[ids["negative"], 0],
            latent_image=latent or [ids["latent"], 0],
            seed=seed,
            steps=steps,
            cfg=4.0,
            sampler_name="ddim",
            scheduler="simple",
            denoise=1.0,
        ),
        ids["decode"]: node("VAEDecode", samples=[ids["sampler"], 0], vae=vae),
        ids["save"]: node("SaveImage", images=[ids["decode"], 0], filename_prefix=f"test{tag}"),
    }


def view(host: Host, file: Mapping[str, str]) -> bytes:
    """What ``/view`` answers for an entry of a node's ``images``."""
    url = f"http://127.0.0.1:{host.port}/view?{urllib.parse.urlencode(dict(file))}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def pictures_of(host: Host, entry: Mapping[str, Any], node_id: str = "save") -> list[Image.Image]:
    """The pictures that a node saved in a finished run (a history entry)."""
    files = entry["outputs"][node_id]["images"]
    return [Image.open(io.BytesIO(view(host, file))) for file in files]


PAGE_ONLY = {"Note", "MarkdownNote"}  # nodes that the host never sees
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def as_prompt(page: Mapping[str, Any], object_info: Mapping[str, Any]) -> Graph:
    """A workflow as the page saves it, in API form. ``object_info``: what the host offers."""
    sources = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    graph = {}
    for found in page["nodes"]:
        if found["type"] in PAGE_ONLY:
            continue
        given = object_info[found["type"]]["input"]
        declared = {**given.get("required", {}), **given.get("optional", {})}
        values = list(found.get("widgets_values", ()))
        inputs: dict[str, Any] = {}
        for name, declaration in declared.items():
            kind, options = declaration[0], (declaration[1] if len(declaration) > 1 else {})
            if isinstance(kind, list) or kind in WIDGETS:
                inputs[name] = values.pop(0)
                if options.get("control_after_generate"):
                    values.pop(0)
        assert not values, f"{found['type']}: values without a widget: {values}"
        linked = {s["name"]: s["link"] for s in found.get("inputs", ()) if s.get("link") is not None}
        inputs |= {name: sources[link] for name, link in linked.items()}
        graph[str(found["id"])] = node(found["type"], **inputs)
    return graph


def read_workflow(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
