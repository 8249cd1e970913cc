"""The example workflows: nodes with a place on the page, their values and links.

An input from another node is a pair: that node's key, the output's number. ``tools.make_example_workflows``
turns this into the files that the page loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Node:
    """A node of a workflow: class, place and size on the page, values of widgets and links."""

    kind: str
    box: tuple[int, int, int, int]  # x, y, width, height
    values: Mapping[str, Any]
    title: str = ""


def node(kind: str, box: tuple[int, int, int, int], title: str = "", **values: Any) -> Node:
    return Node(kind, box, values, title)


def picture(
    prefix: str, x: int, y: int, model: tuple[str, int], clip: tuple[str, int], prompt: str, title: str = ""
) -> dict[str, Node]:
    """Prompt, sampler, decoder and the saved, enlarged picture in one row, 340 high, behind :func:`start`."""
    names = {k: f"{prefix}_{k}" for k in ("prompt", "sampler", "decode", "larger", "save")}
    return {
        names["prompt"]: node("CLIPTextEncode", (x, y, 330, 110), title, clip=clip, text=prompt),
        names["sampler"]: node(
            "KSampler",
            (x + 360, y, 290, 270),
            model=model,
            positive=(names["prompt"], 0),
            negative=("negative", 0),
            latent_image=("size", 0),
            **SAMPLER,
        ),
        names["decode"]: node(
            "VAEDecode", (x, y + 160, 200, 50), samples=(names["sampler"], 0), vae=("demo", 2)
        ),
        names["larger"]: node(
            "ImageScaleBy",
            (x, y + 250, 290, 82),
            "Upscale Image By 4, to see it",
            image=(names["decode"], 0),
            upscale_method="bicubic",
            scale_by=4.0,
        ),
        names["save"]: node(
            "SaveImage",
            (x + 680, y, 300, 330),
            images=(names["larger"], 0),
            filename_prefix=f"spectral/{prefix}",
        ),
    }


def start(x: int, y: int) -> dict[str, Node]:
    """The demo model, the empty prompt and the size."""
    return {
        "demo": node(PREFIX + "LoadDemoModel", (x, y, 380, 330)),
        "negative": node(
            "CLIPTextEncode", (x, y + 380, 380, 90), "Negative prompt", clip=("demo", 1), text=""
        ),
        "size": node(
            "EmptyLatentImage",
            (x, y + 520, 380, 110),
            "Empty Latent Image: 128 gives 64 x 64 pixels here",
            width=128,
            height=128,
            batch_size=1,
        ),
    }


def note(x: int, y: int, width: int, height: int, text: str) -> dict[str, Node]:
    return {"note": node("MarkdownNote", (x, y, width, height), "Read me", text=text)}


def single_adapter() -> dict[str, Node]:
    prompt = "a <bot> on a red background"
    return {
        **start(0, 0),
        "load": node(
            PREFIX + "LoadFouRA",
            (420, 0, 400, 330),
            adapter_name="examples/bot_foura.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
            model=("demo", 0),
            clip=("demo", 1),
        ),
        **picture("with_adapter", 860, 0, ("load", 0), ("load", 1), prompt, "Prompt, with the adapter"),
        **picture("without", 860, 400, ("demo", 0), ("demo", 1), prompt, "The same, without it"),
        **note(
            420,
            380,
            400,
            250,
            "**One adapter.** Load FouRA puts a trained concept on the model and on the text encoder; its "
            "word is `<bot>`. The lower row is the same prompt and seed without it: the model has never "
            "seen the word.\n\nTry: strength_model 0, 0.5, 1.5. With 0 both rows are equal.",
        ),
    }


THREE = ("bot", "fish", "house")


def three_adapters(third_at: int) -> dict[str, Node]:
    """The demo model and three adapters, the third one as a list from Adapter Strength."""
    nodes = start(0, 0)
    for i, name in enumerate(THREE):
        nodes[name] = node(
            PREFIX + "LoadSpectralAdapter",
            (420, 400 * i, 400, 350),
            adapter_name=f"examples/{name}_spectral.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
            base_mismatch="delta",
        )
    nodes["third"] = node(
        PREFIX + "AdapterStrength",
        (860, third_at, 380, 400),
        "Adapter Strength: the third one, as a list",
        adapter=("house", 2),
        strength_model=1.0,
        strength_clip=1.0,
        start_percent=0.0,
        end_percent=1.0,
        curve="constant",
        custom_curve="",
        block_weights="",
    )
    return nodes


def three_pictures(source: str, prefix: str) -> dict[str, Node]:
    """The one adapter that a node gives out, applied, and a picture of each of the three."""
    nodes = {
        "apply": node(
            PREFIX + "ApplyAdapter",
            (1280, 0, 380, 430),
            adapter=(source, 0),
            model=("demo", 0),
            clip=("demo", 1),
            strength_model=1.0,
            strength_clip=1.0,
            mode="auto",
            base_mismatch="delta",
        )
    }
    for i, name in enumerate(THREE):
        prompt = f"a <{name}> on a red background"
        nodes |= picture(f"{prefix}_{name}", 1680, 400 * i, ("apply", 0), ("apply", 1), prompt)
    return nodes


def three_concepts_fused() -> dict[str, Node]:
    nodes = three_adapters(850)
    nodes["fuse"] = node(
        PREFIX + "FuseAdapters",
        (860, 0, 380, 800),
        model=("demo", 0),
        clip=("demo", 1),
        adapter_1=("bot", 2),
        adapter_2=("fish", 2),
        adapters=("third", 1),
        method="closed-form",
        weight_1=1.0,
        weight_2=1.0,
        target_rank=0,
        freeze_gates=False,
        prompts="",
        sample_steps=4,
        sample_cfg=4.0,
        sample_seed=0,
        save_statistics="",
        sample_rounds=2,
    )
    nodes |= three_pictures("fuse", "fused")
    nodes |= note(
        0,
        680,
        380,
        360,
        "**Three concepts in one adapter, each kept.** closed-form draws a few steps of every concept alone, "
        "looks at what its adapter does there, and fuses so that the same is done again. Model and clip are "
        "connected to Fuse Adapters for that; the prompts come from the adapters' own words. The third one "
        "comes in as a list from Adapter Strength; chain more of them for more concepts.\n\nTry: method "
        "spectral, average or sum, and compare; sample_rounds 1.",
    )
    return nodes


def scheduled_strength() -> dict[str, Node]:
    nodes = start(0, 0)
    nodes["load"] = node(
        PREFIX + "LoadFouRA",
        (420, 0, 400, 300),
        adapter_name="examples/bot_foura.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    rows = (
        ("early", 0.0, 0.4, "constant"),
        ("late", 0.4, 1.0, "constant"),
        ("fading", 0.0, 1.0, "linear out"),
    )
    for i, (name, begin, end, curve) in enumerate(rows):
        nodes[name] = node(
            PREFIX + "AdapterStrength",
            (860, 440 * i, 360, 400),
            f"Adapter Strength: {name}",
            adapter=("load", 2),
            strength_model=1.0,
            strength_clip=1.0,
            start_percent=begin,
            end_percent=end,
            curve=curve,
            custom_curve="",
            block_weights="",
        )
        nodes[f"apply_{name}"] = node(
            PREFIX + "ApplyAdapter",
            (1260, 440 * i, 380, 400),
            adapter=(name, 0),
            model=("demo", 0),
            clip=("demo", 1),
            strength_model=1.0,
            strength_clip=1.0,
            mode="auto",
            base_mismatch="delta",
        )
        on = (f"apply_{name}", 0), (f"apply_{name}", 1)
        nodes |= picture(f"scheduled_{name}", 1680, 440 * i, *on, "a <bot> on a red background")
    nodes |= note(
        420,
        350,
        400,
        280,
        "**Strength over the denoising.** 0 is the noisiest step, where shape and place are decided, 1 the "
        "cleanest, where details are. The rows: only early, only late, and fading out. Same prompt and "
        "seed.\n\nTry: curve custom with `0:0, 0.3:1, 0.7:1, 1:0`.",
    )
    return nodes


def loras_fused_and_exported() -> dict[str, Node]:
    nodes = start(0, 0)
    for i, name in enumerate(("bot", "fish")):
        nodes[name] = node(
            PREFIX + "LoadLoRAAsAdapter",
            (420, 280 * i, 400, 240),
            lora_name=f"examples/{name}_lora.safetensors",
        )
    nodes["fuse"] = node(
        PREFIX + "FuseAdapters",
        (860, 0, 360, 500),
        adapter_1=("bot", 0),
        adapter_2=("fish", 0),
        method="sum",
        weight_1=1.0,
        weight_2=1.0,
        target_rank=0,
        freeze_gates=False,
        prompts="",
        sample_steps=4,
        sample_cfg=4.0,
        sample_seed=0,
        save_statistics="",
        sample_rounds=2,
    )
    nodes["apply"] = node(
        PREFIX + "ApplyAdapter",
        (1260, 0, 380, 400),
        adapter=("fuse", 0),
        model=("demo", 0),
        clip=("demo", 1),
        strength_model=1.0,
        strength_clip=1.0,
        mode="auto",
        base_mismatch="delta",
    )
    nodes["export"] = node(
        PREFIX + "ExportAdapterAsLoRA",
        (1260, 450, 380, 330),
        adapter=("fuse", 0),
        filename_prefix="loras/bot_and_fish",
        naming="kohya",
        precision="fp16",
        drop_schedule=False,
    )
    for i, name in enumerate(("bot", "fish")):
        prompt = f"a <{name}> on a red background"
        nodes |= picture(f"loras_{name}", 1680, 400 * i, ("apply", 0), ("apply", 1), prompt)
    nodes |= note(
        420,
        560,
        400,
        220,
        "**Two LoRAs become one.** Load LoRA as Adapter reads plain LoRA files, Fuse Adapters adds them, "
        "and Export writes one plain LoRA into output/loras, where Load LoRA finds it.\n\nTry: target_rank "
        "2, and read in the export's report what that costs.",
    )
    return nodes


def adapter_report() -> dict[str, Node]:
    nodes = start(0, 0)
    nodes["load"] = node(
        PREFIX + "LoadFouRA",
        (420, 0, 400, 330),
        adapter_name="examples/bot_foura.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
        model=("demo", 0),
        clip=("demo", 1),
    )
    row = picture("report", 860, 0, ("load", 0), ("load", 1), "a <bot> on a red background")
    row["report_decode"] = node("VAEDecode", (860, 160, 200, 50), samples=("report", 2), vae=("demo", 2))
    nodes |= row
    nodes["report"] = node(
        PREFIX + "AdapterReport",
        (860, 390, 980, 620),
        adapter=("load", 2),
        model=("demo", 0),
        samples=("report_sampler", 0),
    )
    nodes |= note(
        420,
        390,
        400,
        260,
        "**What is in an adapter, and what its gates did.** The sampler's latent passes through Adapter "
        "Report, so that the report is made after the run and shows which gates were open at which "
        "step.\n\nWithout a run it shows layers, ranks and spectra only.",
    )
    return nodes


def concepts_distilled() -> dict[str, Node]:
    nodes = three_adapters(1050)
    nodes["distil"] = node(
        PREFIX + "DistilAdapters",
        (860, 0, 380, 1000),
        model=("demo", 0),
        clip=("demo", 1),
        adapter_1=("bot", 2),
        adapter_2=("fish", 2),
        adapters=("third", 1),
        run_name="example_distilled",
        weight_1=1.0,
        weight_2=1.0,
        steps=60,
        learning_rate=0.0,
        batch_size=4,
        seed=0,
        prompts="",
        preserve="a red circle on a blue background\na small green star on a white background\n"
        "a large yellow square on a gray background\na purple ring on a black background",
        target_rank=0,
        samples=8,
        sample_steps=10,
        sample_cfg=0.0,
        accumulation=1,
        precision="auto",
        checkpointing="none",
        checkpoint_every=100,
    )
    nodes |= three_pictures("distil", "distilled")
    nodes |= note(
        0,
        680,
        380,
        400,
        "**Three concepts in one adapter, trained to be it.** Distil Adapters begins with a closed-form "
        "fusion, draws a few pictures of every concept with its own adapter, and trains the one adapter to "
        "predict there what that adapter predicts, and to leave the prompts in *preserve* alone. It takes "
        "about a minute here; the finished file is in output/spectral_adapters, and the same settings never "
        "train twice.\n\nTry: 200 steps and 16 samples, which are the node's own defaults.",
    )
    return nodes


WORKFLOWS = {
    "single_adapter": single_adapter,
    "three_concepts_fused": three_concepts_fused,
    "concepts_distilled": concepts_distilled,
    "scheduled_strength": scheduled_strength,
    "loras_fused_and_exported": loras_fused_and_exported,
    "adapter_report": adapter_report,
}
