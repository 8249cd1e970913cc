"""Draw the pictures of the help pages on a ComfyUI: what a node's numbers do to the image.

    python -m tools.draw_help [NODE ...]

Needs a ComfyUI (see ``tests/host/booted.py``). Writes ``web/docs/SpectralAdapters_<node>.jpg``. Everything is
drawn by the demo model with one seed; to be run again when it changes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from demo_model.draw import draw_concept
from spectral_core.demo.concepts import large
from spectral_core.demo.run import EMBEDDED_TARGETS
from spectral_core.plots import contact_sheet
from tests.host.booted import ROOT, Host, find_checkouts
from tests.host.graphs import Graph, node, pictures_of

P = "SpectralAdapters_"
FOLDER = ROOT / "web" / "docs"
PROMPT = large("<bot>", "in a meadow")
PROMPTS = tuple(large(f"<{name}>", "on a blue background") for name in ("bot", "fish"))
STAR, MOON = "a large red striped star on a blue background", "a small white moon on a black background"
TRAINED = "example_for_help"
Rows = dict[str, list[Image.Image]]  # a column's label -> its pictures


class Studio:
    """A started host, and what is drawn with it."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def drawn(self, adapter: Graph, prompts: Sequence[str], source: list[Any]) -> list[Image.Image]:
        """A picture of each prompt with the adapter that the nodes give out at ``source``."""
        graph = {
            "demo": node(P + "LoadDemoModel"),
            **adapter,
            "compare": node(
                P + "CompareAdapters",
                model=["demo", 0],
                clip=["demo", 1],
                vae=["demo", 2],
                adapter_1=source,
                prompts="\n".join(prompts),
                compare="adapters",
                strengths="1",
                seeds=1,
                seed=4,
                steps=20,
                cfg=4.0,
                with_base=False,
                sampler_name="ddim",
                scheduler="simple",
            ),
            "save": node("SaveImage", images=["compare", 1], filename_prefix="help"),
        }
        entry = self.host.run(graph, timeout=1200)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(f"{entry['status']}")
        return pictures_of(self.host, entry)

    def columns(self, made: dict[str, tuple[Graph, list[Any]]], prompts: Sequence[str]) -> Rows:
        return {label: self.drawn(graph, prompts, source) for label, (graph, source) in made.items()}


def loaded(kind: str = "LoadFouRA", name: str = "bot_foura", key: str = "load") -> Graph:
    given: dict[str, Any] = {"adapter_name": f"examples/{name}.safetensors"}
    given |= {"strength_model": 1.0, "strength_clip": 1.0}
    if kind == "LoadSpectralAdapter":
        given["base_mismatch"] = "delta"
    return {key: node(P + kind, **given)}


def strong(
    strength: float, start: float = 0.0, end: float = 1.0, curve: str = "constant", **more: Any
) -> Any:
    nodes = more.pop("nodes", loaded())
    given = {"strength_model": strength, "strength_clip": 1.0, "start_percent": start, "end_percent": end}
    given |= {"curve": curve, "custom_curve": "", "block_weights": "", **more}
    return {**nodes, "strong": node(P + "AdapterStrength", adapter=["load", 2], **given)}, ["strong", 0]


def strengths(nodes: Graph) -> dict[str, tuple[Graph, list[Any]]]:
    return {f"strength {s:g}": strong(s, nodes=nodes) for s in (-1.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)}


def resized(rank: int) -> tuple[Graph, list[Any]]:
    lora = node(P + "LoadLoRAAsAdapter", lora_name="examples/bot_lora.safetensors")
    return {"load": lora, "small": node(P + "ResizeAdapter", adapter=["load", 0], rank=rank, error=0.0)}, [
        "small" if rank else "load",
        0,
    ]


def fused(method: str) -> tuple[Graph, list[Any]]:
    both = loaded("LoadSpectralAdapter", "bot_spectral", "a") | loaded(
        "LoadSpectralAdapter", "fish_spectral", "b"
    )
    given = {"weight_1": 1.0, "weight_2": 1.0, "target_rank": 0, "freeze_gates": False, "method": method}
    given["prompts"] = f"{PROMPT}|{PROMPTS[0]}\n{PROMPTS[1]}|{large('<fish>', 'in a meadow')}"
    fuse = node(
        P + "FuseAdapters",
        adapter_1=["a", 2],
        adapter_2=["b", 2],
        model=["demo", 0],
        clip=["demo", 1],
        **given,
    )
    return {**both, "fuse": fuse}, ["fuse", 0]


def trained(
    label: str, kind: str = "", method: str = "foura", steps: int = 40, rank: int = 4, **options: Any
) -> tuple[Graph, list[Any]]:
    """Star for moon, as in the workflow "3 Train and use", with one thing changed."""
    graph: Graph = {
        "said": node("CLIPTextEncode", clip=["demo", 1], text=MOON),
        "shown": node("CLIPTextEncode", clip=["demo", 1], text=STAR),
        "none": node("CLIPTextEncode", clip=["demo", 1], text=""),
        "taught": node(
            "KSampler",
            model=["demo", 0],
            positive=["shown", 0],
            negative=["none", 0],
            latent_image=["demo", 4],
            seed=4,
            steps=20,
            cfg=4.0,
            sampler_name="ddim",
            scheduler="simple",
            denoise=1.0,
        ),
        "rate": node(P + "TrainOptimiser", learning_rate=0.006),
        "train": node(
            P + "TrainAdapter",
            model=["demo", 0],
            latents=["taught", 0],
            conditioning=["said", 0],
            options=["rate", 0],
            images="none",
            trigger_word="",
            preset="an object",
            method=method,
            rank=rank,
            steps=steps,
            sample_every=0,
            run_name=f"{TRAINED}_{label}",
        ),
    }
    if kind:
        graph["more"] = node(P + kind, options=["rate", 0], **options)
        graph["train"]["inputs"]["options"] = ["more", 0]
    return graph, ["train", 0]


def worded(init_words: str) -> tuple[Graph, list[Any]]:
    """A concept of its own, from the folder of pictures that :func:`write_pictures` has made."""
    graph, source = trained(
        f"words_{init_words or 'none'}", "TrainTextEncoder", steps=200, rank=8, init_words=init_words
    )
    graph["all"] = node(P + "TrainLayers", options=["rate", 0], targets=EMBEDDED_TARGETS)
    graph["four"] = node(P + "TrainMemory", options=["all", 0], batch_size=4)
    graph["more"]["inputs"]["options"] = ["four", 0]
    graph["train"]["inputs"] |= {"clip": ["demo", 1], "vae": ["demo", 2], "images": "bot"}
    graph["train"]["inputs"] |= {"trigger_word": "<bot>"}
    for name in ("latents", "conditioning"):
        del graph["train"]["inputs"][name]
    for name in ("said", "shown", "none", "taught"):
        del graph[name]
    return graph, source


def preserving(every: int) -> tuple[Graph, list[Any]]:
    """The word learned with its kind and everyday prompts kept, or not."""
    graph, source = worded("creature")
    given = {"class_words": "creature", "preserve_every": every}
    graph["keep"] = node(P + "TrainRegularisation", options=["more", 0], **given)
    graph["train"]["inputs"] |= {"options": ["keep", 0], "run_name": f"{TRAINED}_keep_{every}"}
    return graph, source


def write_pictures(folder: Path, count: int = 10) -> None:
    folder.mkdir(parents=True)
    for seed in range(count):
        picture, caption = draw_concept("bot", seed, "<TOK>")
        picture.save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption, encoding="utf-8")


def of_options(
    kind: str, name: str, values: Sequence[Any], **more: Any
) -> dict[str, tuple[Graph, list[Any]]]:
    return {
        f"{name} {value}": trained(f"{kind}_{i}", kind, **{name: value, **more})
        for i, value in enumerate(values)
    }


MOONS = (MOON, "a large white moon on a blue background", "a yellow heart on a red background")
PAGES: dict[str, tuple[Callable[[], dict[str, tuple[Graph, list[Any]]]], Sequence[str]]] = {
    "LoadFouRA": (lambda: strengths(loaded()), [PROMPT]),
    "LoadSpectralAdapter": (
        lambda: strengths(loaded("LoadSpectralAdapter", "fish_spectral")),
        [PROMPTS[1]],
    ),
    "AdapterStrength": (
        lambda: {
            "0 to 1": strong(1.0),
            "0 to 0.4": strong(1.0, 0.0, 0.4),
            "0.4 to 1": strong(1.0, 0.4, 1.0),
            "linear out": strong(1.0, curve="linear out"),
            "bell": strong(1.0, curve="bell"),
            "up_blocks.2: 0": strong(1.0, block_weights="up_blocks.2: 0"),
        },
        [PROMPT],
    ),
    "ResizeAdapter": (
        lambda: {f"rank {rank or 'as it was'}": resized(rank) for rank in (0, 2, 1)},
        [PROMPT, PROMPTS[0]],
    ),
    "FuseAdapters": (
        lambda: {method: fused(method) for method in ("closed-form", "sum", "average", "spectral")},
        [PROMPT, PROMPTS[1]],
    ),
    "TrainAdapter": (lambda: {f"{n} steps": trained("steps", steps=n) for n in (10, 30, 100)}, MOONS),
    "TrainOptimiser": (
        lambda: of_options("TrainOptimiser", "learning_rate", (0.001, 0.006, 0.03), steps=60),
        MOONS,
    ),
    "TrainLayers": (
        lambda: of_options("TrainLayers", "targets", ("*attn2.to_k", "attention", "attention+mlp")),
        MOONS,
    ),
    "TrainGate": (lambda: of_options("TrainGate", "target_open", (0.25, 0.5, 0.9)), MOONS),
    "TrainNoiseAndLoss": (
        lambda: of_options("TrainNoiseAndLoss", "timesteps", ("uniform", "logit-normal")),
        MOONS,
    ),
    "TrainTextEncoder": (
        lambda: {f"init_words '{words}'": worded(words) for words in ("", "creature")},
        [PROMPT, PROMPTS[0]],
    ),
    "TrainMemory": (lambda: of_options("TrainMemory", "batch_size", (1, 4)), MOONS),
    "TrainRegularisation": (
        lambda: {f"preserve_every {n}": preserving(n) for n in (0, 4)},
        [PROMPT, "a small white square on a red background", "a large yellow heart on a blue background"],
    ),
}


def report_sheet(host: Host) -> Image.Image:
    """What Adapter Report draws."""
    graph = {**loaded(), "report": node(P + "AdapterReport", adapter=["load", 2])}
    return pictures_of(host, host.run(graph), "report")[0]


def held_out_curve(host: Host) -> Image.Image:
    """The losses of a training that is judged by held-out pictures."""
    graph, _ = worded("creature")
    given = {"validation_share": 0.3, "validation_every": 10}
    graph |= {
        "demo": node(P + "LoadDemoModel"),
        "held": node(P + "TrainValidation", options=["more", 0], **given),
    }
    graph["train"]["inputs"] |= {"options": ["held", 0], "run_name": f"{TRAINED}_held"}
    graph["save"] = node("SaveImage", images=["train", 1], filename_prefix="help")
    return pictures_of(host, host.run(graph, timeout=1200), "save")[0]


SHEETS: dict[str, Callable[[Host], Image.Image]] = {
    "AdapterReport": report_sheet,
    "LoadDemoModel": lambda _: Image.open(ROOT / "demo_model" / "samples.jpg"),
    "TrainValidation": held_out_curve,
}


def sheet(rows: Rows, prompts: Sequence[str]) -> Image.Image:
    pictures = [[drawn[i] for drawn in rows.values()] for i in range(len(prompts))]
    return contact_sheet(pictures, list(prompts), list(rows), cell=128)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("nodes", nargs="*", metavar="NODE", help="such as LoadFouRA")
    chosen = options.parse_args().nodes or [*SHEETS, *PAGES]
    with tempfile.TemporaryDirectory() as folder:
        host = Host(find_checkouts()[0], Path(folder))
        write_pictures(host.folder / "input" / "bot")
        host.start()
        try:
            studio = Studio(host)
            for name in chosen:
                path = FOLDER / f"{P}{name}.jpg"
                if name in SHEETS:
                    drawn = SHEETS[name](host).convert("RGB")
                    drawn.thumbnail((900, 1400))
                else:
                    make, prompts = PAGES[name]
                    drawn = sheet(studio.columns(make(), prompts), prompts)
                drawn.save(path, quality=75 if name in SHEETS else 80, optimize=True)
                print(f"{name}: {path.stat().st_size:,} bytes", flush=True)
        finally:
            host.stop()


if __name__ == "__main__":
    main()
