"""Compare Adapters: a labelled grid of pictures, with the same prompts and seeds in every column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import fuse, images, inputs, results

COMPARE = ("adapters", "fusion methods", "kept steps of a run")
STACKED = "stacked"  # all at once, without a fusion
SAMPLERS = ("euler", "euler_ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "uni_pc", "lcm")
SCHEDULERS = ("simple", "normal", "karras", "sgm_uniform", "ddim_uniform", "beta")
_CELL = 256  # pixels of a picture in the grid; small ones are enlarged to about that
_LOOKING = 4, 2  # steps and rounds of the fusions that draw


def _text(default: str, tooltip: str, multiline: bool = False) -> inputs.Input:
    return ("STRING", {"default": default, "multiline": multiline, "tooltip": tooltip})


def _int(default: int, least: int, most: int, tooltip: str) -> inputs.Input:
    options = {"default": default, "min": least, "max": most, "tooltip": tooltip}
    return ("INT", {**options, "control_after_generate": False})


class CompareAdapters:
    """Columns: adapters, fusions of them, or the steps of a run, each at every strength."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Draws the same prompts with the same seeds through several adapters, fusion methods, strengths or "
        "kept steps of a training, and puts all of it into one labelled picture."
    )
    SEARCH_ALIASES = [
        "xy plot",
        "grid",
        "contact sheet",
        "strength",
        "checkpoint",
        "compare lora",
        "lora",
        "spectral adapters",
    ]
    RETURN_TYPES = ("IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("grid", "pictures", "report")
    OUTPUT_TOOLTIPS = (
        "All pictures in one, with the names of rows and columns.",
        "The single pictures, row by row, for nodes that save or judge them.",
        "What every column was drawn with, and how long it took.",
    )
    FUNCTION = "compare"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "model": inputs.model("The model that everything is drawn with. It is not changed."),
                "clip": inputs.clip("Its text encoder. It is not changed."),
                "vae": ("VAE", {"tooltip": "Its VAE, which makes the pictures."}),
                "prompts": _text(
                    "", "What is drawn, one prompt in a line. Every line is a row of the grid.", True
                ),
                "compare": inputs.combo(
                    COMPARE,
                    "What the columns are. adapters: each connected one alone. fusion methods: all of them "
                    "fused, by one method after the other. kept steps of a run: what a training has kept.",
                ),
                "strengths": _text(
                    "1", "Every column at each of these strengths, with commas between, such as 0.5, 1, 1.5."
                ),
                "seeds": _int(2, 1, 16, "Pictures of each prompt, with different noise."),
                "seed": _int(0, 0, 2**53 - 1, "The noise of the first one; the others count on from here."),
                "steps": _int(0, 0, 200, "Denoising steps of a picture; 0 takes what suits the model."),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "Guidance by the prompt; 0 takes what suits the model.",
                    },
                ),
            },
            "optional": {
                "adapter_1": inputs.adapter("The first adapter."),
                "adapter_2": inputs.adapter("The second adapter."),
                "adapters": inputs.adapter_list(
                    "Further ones, or all of them, from Adapter Stack or Adapter Strength, at the strengths "
                    "set there."
                ),
                "latent": ("LATENT", {"tooltip": "Its size is used. Not connected: the model's own."}),
                "methods": _text(
                    "stacked, average, closed-form",
                    "For fusion methods: which ones, with commas between. stacked: all at once, unfused.",
                ),
                "run_name": _text(
                    "",
                    "For kept steps of a run: the run of Train Adapter. Its panel keeps a step with Use now.",
                ),
                "with_base": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "The model without any adapter is the first column."},
                ),
                "negative_prompt": _text("", "What the pictures shall not show."),
                "sampler_name": inputs.combo(
                    SAMPLERS, "How the noise is taken away; take the one that you draw with."
                ),
                "scheduler": inputs.combo(
                    SCHEDULERS, "How the noise levels are spread over the steps; as in KSampler."
                ),
            },
        }

    def compare(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        compare: str,
        strengths: str,
        seeds: int,
        seed: int,
        steps: int,
        cfg: float,
        adapter_1: Any = None,
        adapter_2: Any = None,
        adapters: Any = None,
        latent: Any = None,
        methods: str = "",
        run_name: str = "",
        with_base: bool = True,
        negative_prompt: str = "",
        sampler_name: str = "euler",
        scheduler: str = "simple",
    ) -> dict[str, Any]:
        from ..spectral_core.plots import contact_sheet
        from .host.fusing import compare as comparing

        connected = [
            results.need_adapter(a, f"adapter_{i + 1}") for i, a in enumerate((adapter_1, adapter_2)) if a
        ]
        connected += results.need_adapters(adapters)
        lines: list[str] = []
        if compare == COMPARE[0]:
            columns = _alone(connected)
        elif compare == COMPARE[1]:
            columns, lines = _fused(connected, methods, (model, clip, None), (latent, cfg, seed))
        else:
            columns = [(label, (adapter,)) for label, adapter in comparing.of_run(run_name.strip())]
        found = _at_strengths(columns, _strengths(strengths))
        plan = [comparing.Column("no adapter")] if with_base else []
        plan += [comparing.Column(label, given) for label, given in found]
        rows = comparing.Rows(
            tuple(line.strip() for line in prompts.splitlines() if line.strip()),
            negative_prompt,
            tuple(range(seed, seed + seeds)),
            steps,
            cfg,
            sampler_name,
            scheduler,
            latent,
        )
        done = comparing.grid(plan, rows, model, clip, vae)
        sheet = contact_sheet(done.pictures, rows.labels, [c.label for c in plan], cell=_CELL)
        way = f"{done.way.steps} steps, guidance {done.way.cfg:g}, {sampler_name}, {scheduler}"
        shown = [f"{c.label}: {s:.1f} s" for c, s in zip(plan, done.seconds, strict=True)]
        report = results.lines(f"{len(plan)} × {len(rows.labels)} pictures, {way}", *shown, *lines)
        ui = images.preview(sheet, "compare_adapters")
        return results.shown(report, images.to_image(sheet), done.images, report, **ui)


Columns = list[tuple[str, tuple[Any, ...]]]


def _strengths(text: str) -> list[float]:
    """Raises SpectralAdapterError for what is no number."""
    from ..spectral_core.errors import SpectralAdapterError

    try:
        found = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise SpectralAdapterError(
            f"strengths {text!r}: expected numbers with commas between, such as 0.5, 1, 1.5"
        ) from error
    return found or [1.0]


def _labels(adapters: Sequence[Any]) -> list[str]:
    from ..spectral_core.fusion.sources import labels_of

    return list(labels_of(adapters))


def _alone(adapters: Sequence[Any]) -> Columns:
    return [(label, (a,)) for label, a in zip(_labels(adapters), adapters, strict=True)] if adapters else []


def _at_strengths(columns: Columns, strengths: Sequence[float]) -> Columns:
    """Every column at every strength; the strength is said where there are several."""
    several = len(strengths) > 1
    return [
        (f"{label}, {s:g}" if several else label, tuple(a.scaled(s) for a in given))
        for label, given in columns
        for s in strengths
    ]


def _fused(
    adapters: Sequence[Any], methods: str, given: tuple[Any, Any, Any], looking: tuple[Any, float, int]
) -> tuple[Columns, list[str]]:
    """A column for each method, and lines for the report."""
    from ..spectral_core.errors import SpectralAdapterError
    from ..spectral_core.fusion import FUSIONS
    from ..spectral_core.words import chosen
    from .host.training.defaults import usual_guidance

    if len(adapters) < 2:
        raise SpectralAdapterError(
            f"fusion methods: {len(adapters)} adapters are connected, expected two or more; connect "
            "adapter_1 and adapter_2, or a list to adapters"
        )
    latent, cfg, seed = looking
    columns: Columns = []
    lines: list[str] = []
    for name in filter(None, (part.strip() for part in methods.split(","))):
        if chosen(name, (STACKED, *FUSIONS), "method") == STACKED:
            columns.append((STACKED, tuple(adapters)))
            continue
        steps, rounds = _LOOKING
        way = (latent, steps, cfg or usual_guidance(given[0]), seed, rounds)
        done = fuse.made(name, adapters, [1.0] * len(adapters), given, "", way)
        columns.append((name, (done.fused.adapter,)))
        lines += [f"{name}: {line}" for line in done.lines]
    return columns, lines
