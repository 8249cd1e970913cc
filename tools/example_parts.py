"""What the example workflows are made of: nodes with a place on the page, rows that draw a picture, notes.

An input from another node is a pair: that node's key, the output's number. ``tools.make_example_workflows``
turns graphs into the files that the page loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "SpectralAdapters_"
SAMPLER = {
    "seed": 4,
    "control_after_generate": "fixed",
    "steps": 20,
    "cfg": 4.0,
    "sampler_name": "ddim",
    "scheduler": "simple",
    "denoise": 1.0,
}
ON_DEMO = {"model": ("demo", 0), "clip": ("demo", 1)}
STRENGTHS = {"strength_model": 1.0, "strength_clip": 1.0}
Socket = tuple[str, str]  # name, type


@dataclass(frozen=True)
class Slots:
    """A node class as the page sees it; ``widgets`` in the order of their saved values."""

    sockets: tuple[Socket, ...]
    widgets: tuple[str, ...]
    outputs: tuple[Socket, ...]
    kinds: Mapping[str, str] = field(default_factory=dict)  # of the widgets


@dataclass(frozen=True)
class Node:
    """A node of a workflow: class, place and size on the page, values of widgets and links."""

    kind: str
    box: tuple[int, int, int, int]  # x, y, width, height
    values: Mapping[str, Any]
    title: str = ""


def as_node(n: Node, slots: Slots, number: int) -> dict[str, Any]:
    """The node as the page saves it, without links."""
    x, y, width, height = n.box
    properties = {} if n.kind == "MarkdownNote" else {"Node name for S&R": n.kind}
    made: dict[str, Any] = {
        "id": number,
        "type": n.kind,
        "pos": [x, y],
        "size": [width, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [{"name": name, "type": kind, "link": None} for name, kind in slots.sockets],
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in slots.outputs],
        "properties": properties,
        "widgets_values": [n.values[widget] for widget in slots.widgets],
    }
    return {**made, "title": n.title} if n.title else made


def node(kind: str, box: tuple[int, int, int, int], title: str = "", **values: Any) -> Node:
    return Node(kind, box, values, title)


def picture(
    prefix: str,
    x: int,
    y: int,
    model: tuple[str, int],
    clip: tuple[str, int],
    prompt: str,
    title: str = "",
    latent: tuple[str, int] = ("demo", 4),
) -> dict[str, Node]:
    """Prompt, sampler, decoder and the saved picture in one row, 340 high, behind :func:`start`."""
    names = {k: f"{prefix}_{k}" for k in ("prompt", "sampler", "decode", "save")}
    return {
        names["prompt"]: node("CLIPTextEncode", (x, y, 330, 110), title, clip=clip, text=prompt),
        names["sampler"]: node(
            "KSampler",
            (x + 360, y, 290, 270),
            model=model,
            positive=(names["prompt"], 0),
            negative=("negative", 0),
            latent_image=latent,
            **SAMPLER,
        ),
        names["decode"]: node(
            "VAEDecode", (x, y + 160, 200, 50), samples=(names["sampler"], 0), vae=("demo", 2)
        ),
        names["save"]: node(
            "SaveImage",
            (x + 680, y, 300, 330),
            images=(names["decode"], 0),
            filename_prefix=f"spectral/{prefix}",
        ),
    }


def start(x: int, y: int) -> dict[str, Node]:
    """The demo model with its latent, and the empty prompt."""
    return {
        "demo": node(PREFIX + "LoadDemoModel", (x, y, 380, 330)),
        "negative": node(
            "CLIPTextEncode", (x, y + 380, 380, 90), "Negative prompt", clip=("demo", 1), text=""
        ),
    }


def note(x: int, y: int, width: int, height: int, text: str) -> dict[str, Node]:
    return {"note": node("MarkdownNote", (x, y, width, height), "Read me", text=text)}


def applied(
    adapter: str, x: int, y: int, height: int = 400, on: Mapping[str, tuple[str, int]] = ON_DEMO
) -> Node:
    """The adapter that a node gives out first, on the demo model unless told otherwise."""
    return node(
        PREFIX + "ApplyAdapter",
        (x, y, 380, height),
        adapter=(adapter, 0),
        **on,
        **STRENGTHS,
        mode="auto",
        base_mismatch="delta",
    )


def loaded_foura(height: int = 330, **more: Any) -> Node:
    return node(
        PREFIX + "LoadFouRA",
        (420, 0, 400, height),
        adapter_name="examples/bot_foura.safetensors",
        **STRENGTHS,
        **more,
    )


def strength(
    box: tuple[int, int, int, int],
    title: str = "",
    begin: float = 0.0,
    end: float = 1.0,
    curve: str = "constant",
    **sockets: tuple[str, int],
) -> Node:
    return node(
        PREFIX + "AdapterStrength",
        box,
        f"Adapter Strength: {title}" if title else "",
        **sockets,
        **STRENGTHS,
        start_percent=begin,
        end_percent=end,
        curve=curve,
        custom_curve="",
        block_weights="",
    )


def fused(method: str, box: tuple[int, int, int, int], prompts: str = "", **sockets: tuple[str, int]) -> Node:
    return node(
        PREFIX + "FuseAdapters",
        box,
        **sockets,
        method=method,
        weight_1=1.0,
        weight_2=1.0,
        target_rank=0,
        freeze_gates=False,
        prompts=prompts,
        sample_steps=4,
        sample_cfg=4.0,
        sample_seed=0,
        save_statistics="",
        sample_rounds=2,
    )


def trained(box: tuple[int, int, int, int], rank: int, steps: int, run_name: str, **sockets: Any) -> Node:
    """Train Adapter for a FouRA of an object, the rest as the preset has it (0: by the model)."""
    return node(
        PREFIX + "TrainAdapter",
        box,
        **sockets,
        images="none",
        trigger_word="",
        preset="an object",
        method="foura",
        rank=rank,
        steps=steps,
        sample_every=0,
        run_name=run_name,
    )


def compared(box: tuple[int, int, int, int], **values: Any) -> Node:
    """Compare Adapters on the demo model, drawn as :func:`picture` draws."""
    drawn = {name: SAMPLER[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler")}
    return node(
        PREFIX + "CompareAdapters",
        box,
        **ON_DEMO,
        vae=("demo", 2),
        compare="adapters",
        seeds=1,
        **drawn,
        run_name="",
        with_base=True,
        negative_prompt="",
        **values,
    )


OWN_MODEL = (
    "**With your own model.** In place of Load Demo Model:\n\n"
    "- **SDXL**: Load Checkpoint. Empty Latent Image 1024, KSampler 25 steps, cfg 6.\n"
    "- **Flux**: Load Diffusion Model, DualCLIPLoader (flux), Load VAE. Empty SD3 Latent Image 1024, 20 "
    "steps, cfg "
    "1, FluxGuidance 3.5.\n"
    "- **Qwen-Image**: Load Diffusion Model, Load CLIP (qwen_image), Load VAE. Empty SD3 Latent Image "
    "1328, 20 "
    "steps, cfg 2.5.\n\n"
)


def own_model(x: int, y: int, more: str) -> dict[str, Node]:
    """A note on how the same is done with the models of today; ``more``: what differs here."""
    return {"own": node("MarkdownNote", (x, y, 380, 330), "SDXL, Flux, Qwen", text=OWN_MODEL + more)}


@dataclass(frozen=True)
class Graph:
    """A workflow. inputs: (node, widget) that its app mode offers; outputs: nodes whose pictures it shows.

    cover: nodes whose pictures make its cover, each with a word.
    """

    nodes: Mapping[str, Node]
    inputs: tuple[tuple[str, str], ...] = ()
    outputs: tuple[str, ...] = ()
    cover: tuple[tuple[str, str], ...] = ()
