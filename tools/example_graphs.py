"""The example workflows, one function each; their parts are in :mod:`tools.example_parts`."""

from __future__ import annotations

from demo_model.pictures import WIDE
from spectral_core.demo.concepts import large
from tools.example_parts import (
    ON_DEMO,
    PREFIX,
    STRENGTHS,
    Graph,
    Node,
    applied,
    compared,
    fused,
    loaded_foura,
    node,
    note,
    own_model,
    picture,
    start,
    strength,
    trained,
)

MEADOW, PLAIN = "in a meadow", "on a blue background"
ROBOT = large("<bot>", MEADOW)


def single_adapter() -> dict[str, Node]:
    prompt = ROBOT
    return {
        **start(0, 0),
        "load": loaded_foura(**ON_DEMO),
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
        **own_model(
            0, 680, "A LoRA of that model: Load LoRA as Adapter and Apply Adapter in place of Load FouRA."
        ),
    }


THREE = ("bot", "fish", "house")


BESIDE = {  # how the two that stand in one picture are drawn there, one at a time
    "bot": f"a large <bot> and a large creature {PLAIN}",
    "fish": f"a large creature and a large <fish> {PLAIN}",
}


def looked_at(*names: str) -> str:
    """Prompts for a fusion: how each of them is going to be drawn."""
    prompts = {
        name: [
            large(f"<{name}>", PLAIN),
            large(f"<{name}>", "in the snow"),
            BESIDE.get(name, large(f"<{name}>", MEADOW)),
        ]
        for name in names
    }
    return "\n".join("|".join(each) for each in prompts.values())


def three_adapters(third_at: int) -> dict[str, Node]:
    """The demo model and three adapters, the third one as a list from Adapter Strength."""
    nodes = start(0, 0)
    for i, name in enumerate(THREE):
        nodes[name] = node(
            PREFIX + "LoadSpectralAdapter",
            (420, 400 * i, 400, 350),
            adapter_name=f"examples/{name}_spectral.safetensors",
            **STRENGTHS,
            base_mismatch="delta",
        )
    nodes["third"] = strength((860, third_at, 380, 400), "the third one, as a list", adapter=("house", 2))
    return nodes


def three_pictures(source: str, prefix: str) -> dict[str, Node]:
    """The one adapter that a node gives out, applied, a picture of each of the three, a wide one of two."""
    nodes = {"apply": applied(source, 1280, 0, 430)}
    on = ("apply", 0), ("apply", 1)
    for i, name in enumerate(THREE):
        nodes |= picture(f"{prefix}_{name}", 1680, 400 * i, *on, large(f"<{name}>", PLAIN))
    size = dict(zip(("width", "height"), WIDE, strict=True))
    nodes["wide"] = node("EmptyLatentImage", (1280, 1200, 380, 110), **size, batch_size=1)
    both = f"a large <bot> and a large <fish> {PLAIN}"
    return nodes | picture(f"{prefix}_both", 1680, 1200, *on, both, latent=("wide", 0))


def three_concepts_fused() -> dict[str, Node]:
    nodes = three_adapters(850)
    concepts = {"adapter_1": ("bot", 2), "adapter_2": ("fish", 2), "adapters": ("third", 1)}
    nodes["fuse"] = fused("closed-form", (860, 0, 380, 800), looked_at(*THREE), **ON_DEMO, **concepts)
    nodes |= three_pictures("fuse", "fused")
    nodes |= own_model(0, 1090, "sample_cfg: the cfg that you draw with. Flux: 1.")
    nodes |= note(
        0,
        680,
        380,
        360,
        "**Three concepts in one adapter, each kept.** closed-form draws a few steps of every concept alone, "
        "looks at what its adapter does there, and fuses so that the same is done again. Model and clip are "
        "connected to Fuse Adapters for that, and *prompts* says how you draw each, one line a concept. The "
        "third one comes in as a list from Adapter Strength; chain more of them for more concepts.\n\nTry: "
        "method spectral, average or sum, and compare; sample_rounds 1.",
    )
    return nodes


def scheduled_strength() -> dict[str, Node]:
    nodes = start(0, 0)
    nodes["load"] = loaded_foura(300)
    rows = (
        ("early", 0.0, 0.4, "constant"),
        ("late", 0.4, 1.0, "constant"),
        ("fading", 0.0, 1.0, "linear out"),
    )
    for i, (name, begin, end, curve) in enumerate(rows):
        nodes[name] = strength((860, 440 * i, 360, 400), name, begin, end, curve, adapter=("load", 2))
        nodes[f"apply_{name}"] = applied(name, 1260, 440 * i)
        on = (f"apply_{name}", 0), (f"apply_{name}", 1)
        nodes |= picture(f"scheduled_{name}", 1680, 440 * i, *on, ROBOT)
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
    nodes, names = start(0, 0), ("bot", "fish")
    for i, name in enumerate(names):
        nodes[name] = node(
            PREFIX + "LoadLoRAAsAdapter",
            (420, 280 * i, 400, 240),
            lora_name=f"examples/{name}_lora.safetensors",
        )
    loras = {f"adapter_{i}": (name, 0) for i, name in enumerate(names, 1)}
    nodes["fuse"] = fused("closed-form", (860, 0, 360, 500), looked_at(*names), **ON_DEMO, **loras)
    nodes["apply"] = applied("fuse", 1260, 0)
    nodes["export"] = node(
        PREFIX + "ExportAdapterAsLoRA",
        (1260, 450, 380, 330),
        adapter=("fuse", 0),
        filename_prefix="loras/bot_and_fish",
        naming="kohya",
        precision="fp16",
        drop_schedule=False,
        trained_words=False,
    )
    for i, name in enumerate(names):
        prompt = large(f"<{name}>", PLAIN)
        nodes |= picture(f"loras_{name}", 1680, 400 * i, ("apply", 0), ("apply", 1), prompt)
    nodes |= note(
        420,
        560,
        400,
        220,
        "**Two LoRAs become one.** Load LoRA as Adapter reads plain LoRA files, Fuse Adapters makes one of "
        "them that does what each does on its prompts (a LoRA file holds no words, so they are written "
        "there), and Export writes it as a plain LoRA into "
        "output/loras, where Load LoRA finds it.\n\nTry: method sum, which blends them; target_rank 8, and "
        "read in the export's report what that costs.",
    )
    return nodes


def adapter_report() -> dict[str, Node]:
    nodes = start(0, 0)
    nodes["load"] = loaded_foura(**ON_DEMO)
    row = picture("report", 860, 0, ("load", 0), ("load", 1), ROBOT)
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
        **ON_DEMO,
        adapter_1=("bot", 2),
        adapter_2=("fish", 2),
        adapters=("third", 1),
        run_name="example_distilled",
        weight_1=1.0,
        weight_2=1.0,
        steps=150,
        learning_rate=0.0,
        batch_size=4,
        seed=0,
        prompts=looked_at(*THREE),
        preserve="a red circle on a blue background\na small green star on a white background\n"
        "a large yellow square on a gray background\na purple ring on a black background",
        target_rank=0,
        samples=16,
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
        "some minutes here; the finished file is in output/spectral_adapters, and the same settings never "
        "train twice.\n\nTry: 300 steps.",
    )
    return nodes


OPTIMISER = {  # the widgets of Training: Optimiser that the example leaves as they are
    "optimiser": "adamw",
    "betas": "0.9, 0.99",
    "weight_decay": 0.01,
    "warmup": 10,
    "schedule": "constant",
    "gradient_clip": 1.0,
    "ema": 0.0,
    "seed": 0,
}


def train_and_use() -> dict[str, Node]:
    prompt = "a small white moon on a black background"
    taught = "a large red striped star on a blue background"
    nodes = start(0, 0)
    nodes |= picture("taught", 420, 0, ("demo", 0), ("demo", 1), taught, "The pictures to learn from")
    nodes["words"] = node(
        "CLIPTextEncode", (420, 380, 330, 110), "Caption, for the training", clip=("demo", 1), text=prompt
    )
    nodes["faster"] = node(PREFIX + "TrainOptimiser", (420, 530, 330, 300), learning_rate=0.006, **OPTIMISER)
    nodes["train"] = trained(
        (780, 400, 420, 700),
        4,
        100,
        "star_for_moon",
        model=("demo", 0),
        latents=("taught_sampler", 0),
        conditioning=("words", 0),
        options=("faster", 0),
    )
    nodes["apply"] = applied("train", 1240, 400)
    on = ("apply", 0), ("apply", 1)
    nodes |= picture("trained", 1660, 0, *on, prompt, "The caption, with the trained adapter")
    nodes |= own_model(
        0,
        1030,
        "Train Adapter: choose your folder as images, connect vae and clip, leave resolution and learning "
        "rate at 0. "
        "Little memory: Training: Memory with checkpointing full.",
    )
    nodes |= picture("untrained", 1660, 400, ("demo", 0), ("demo", 1), prompt, "The same, without it")
    nodes |= note(
        0,
        680,
        380,
        300,
        "**Train, then use, in one workflow.** The model's own pictures of a star are learned under the "
        "caption of a moon, in well under a minute. Queue it again: nothing is trained, the file comes back. "
        "Cancel it half way and queue it again: it goes on.\n\nFor pictures of your own: put them with their "
        "captions into a folder in ComfyUI's input folder, choose it as images, and connect vae and clip.",
    )
    return nodes


def compare_adapters() -> dict[str, Node]:
    nodes = start(0, 0)
    nodes["stack"] = node(
        PREFIX + "AdapterStack",
        (420, 0, 460, 360),
        rows="examples/bot_spectral.safetensors | 1 | 1\nexamples/bot_foura.safetensors | 1 | 1",
    )
    nodes["compare"] = compared(
        (920, 0, 900, 1150),
        adapters=("stack", 0),
        prompts=f"{ROBOT}\na large <bot> on a blue background, on the left",
        strengths="0.5, 1",
        methods="stacked, average, closed-form",
    )
    nodes["save"] = node(
        "SaveImage", (1860, 0, 700, 560), images=("compare", 0), filename_prefix="spectral/compared"
    )
    nodes |= note(
        420,
        420,
        460,
        280,
        "**Which one is better?** Every column is drawn from the same prompts with the same noise, so that "
        "only the "
        "adapter and its strength differ. Here: the same concept trained as a Spectral Adapter and as "
        "FouRA.\n\nTry: "
        "compare *fusion methods* with the rows bot and fish, or strengths `-1, 0, 1, 2`.",
    )
    nodes |= own_model(0, 700, "Leave steps and cfg of Compare Adapters at 0: they follow the model.")
    return nodes


def slider_from_two_prompts() -> dict[str, Node]:
    nodes = start(0, 0)
    nodes["slider"] = node(
        PREFIX + "ConceptSlider",
        (420, 0, 420, 1060),
        **ON_DEMO,
        positive="a large {}",
        negative="a small {}",
        neutral="a {}",
        preserve="red star\nblue ring\ngreen square\nyellow circle",
        method="foura",
        rank=8,
        steps=60,
        run_name="example_size",
        eta=1.0,
        start=0.0,
        samples=8,
        sample_steps=10,
        guidance=0.0,
    )
    nodes["compare"] = compared(
        (880, 0, 900, 1000),
        adapter_1=("slider", 0),
        prompts="a yellow heart in the snow\na red triangle on a blue background",
        strengths="-2, -1, -0.5, 0.5, 1, 2",
        methods="",
    )
    nodes["save"] = node(
        "SaveImage", (1820, 0, 800, 420), images=("compare", 0), filename_prefix="spectral/slider"
    )
    nodes |= note(
        1820,
        480,
        400,
        300,
        "**A slider, learned from two prompts and no picture.** Strength 1 draws larger, -1 smaller, and "
        "what is "
        "named in *preserve* stays what it is. It takes about a minute here; run it again and the file comes "
        "back.\n\nTry: *a striped {}* against *a plain {}*, with start 0.3.",
    )
    nodes |= own_model(0, 700, "Prompts such as *a very old {}* and *a very young {}*; 300 steps, start 0.2.")
    return nodes


def _graph(
    nodes: dict[str, Node], inputs: str, outputs: str, cover: tuple[tuple[str, str], ...] = ()
) -> Graph:
    """inputs: ``node.widget`` with spaces between; outputs: nodes with spaces between."""
    pairs = tuple((name, widget) for name, _, widget in (word.partition(".") for word in inputs.split()))
    return Graph(nodes, pairs, tuple(outputs.split()), cover)


_WITHOUT = ("without_save", "without")


def _shown(prefix: str) -> tuple[tuple[str, str], ...]:
    """The saved pictures of :func:`three_pictures`, with their words."""
    words = {**{name: f"<{name}>" for name in THREE}, "both": "<bot> and <fish>"}
    return tuple((f"{prefix}_{name}_save", word) for name, word in words.items())


WORKFLOWS: dict[str, Graph] = {
    "1 Try an adapter": _graph(
        single_adapter(),
        "load.adapter_name load.strength_model with_adapter_prompt.text without_prompt.text "
        "with_adapter_sampler.seed",
        "with_adapter_save without_save",
        (_WITHOUT, ("with_adapter_save", "with the adapter")),
    ),
    "2 Combine three concepts": _graph(
        three_concepts_fused(),
        "fuse.method fuse.weight_1 fuse.weight_2 fused_bot_prompt.text fused_fish_prompt.text "
        "fused_house_prompt.text fused_both_prompt.text",
        "fused_bot_save fused_fish_save fused_house_save fused_both_save",
        _shown("fused"),
    ),
    "3 Train and use": _graph(
        train_and_use(),
        "train.images train.trigger_word train.preset train.method train.steps train.run_name "
        "trained_prompt.text",
        "trained_save untrained_save taught_save",
        (("taught_save", "learned from"), ("untrained_save", "before"), ("trained_save", "after")),
    ),
    "4 Compare adapters": _graph(
        compare_adapters(),
        "stack.rows compare.prompts compare.strengths compare.seeds",
        "save",
        (("save", ""),),
    ),
    "5 Slider from two prompts": _graph(
        slider_from_two_prompts(),
        "slider.positive slider.negative slider.neutral slider.preserve slider.run_name compare.prompts "
        "compare.strengths",
        "save",
        (("save", ""),),
    ),
    "6 Strength over the steps": _graph(
        scheduled_strength(),
        "early.end_percent late.start_percent fading.curve scheduled_early_prompt.text",
        "scheduled_early_save scheduled_late_save scheduled_fading_save",
        tuple((f"scheduled_{name}_save", name) for name in ("early", "late", "fading")),
    ),
    "7 Fuse and export LoRAs": _graph(
        loras_fused_and_exported(),
        "bot.lora_name fish.lora_name fuse.method export.filename_prefix export.naming",
        "loras_bot_save loras_fish_save",
        (("loras_bot_save", "<bot>"), ("loras_fish_save", "<fish>")),
    ),
    "8 Distil three concepts": _graph(
        concepts_distilled(),
        "distil.steps distil.samples distil.preserve distil.run_name",
        "distilled_bot_save distilled_fish_save distilled_house_save distilled_both_save",
        _shown("distilled"),
    ),
    "9 Look inside an adapter": _graph(
        adapter_report(), "load.adapter_name report_prompt.text", "report_save", (("report", ""),)
    ),
}
