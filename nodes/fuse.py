"""Fuse Adapters: several adapters become one, with a report and a picture of how much they overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import images, inputs, results, tensors


def _methods() -> list[str]:
    from ..spectral_core.fusion import FUSIONS  # slow to import: not while the host starts

    return list(FUSIONS)


def _rounds() -> int:
    from ..spectral_core.fusion.rounds import ROUNDS

    return ROUNDS


def _required() -> dict[str, Any]:
    return {
        "method": inputs.combo(
            _methods(),
            "sum: both at full strength, as if loaded one after the other. average: their mean, subtler. "
            "spectral: adds the changes of singular columns, for Spectral Adapters with columns of their "
            "own. closed-form: keeps what each concept does best of all; connect model and clip. Others: "
            "see the help page.",
        ),
        "weight_1": inputs.strength("How strong the first concept is in the result; 0 leaves it out."),
        "weight_2": inputs.strength("How strong the second concept is in the result; 0 leaves it out."),
        "target_rank": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 4096,
                "tooltip": "Compresses every layer to this rank: smaller files, a little of the "
                "look lost (the report says how much). 0 keeps everything exactly.",
            },
        ),
        "freeze_gates": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "Replaces FouRA's adaptive gates by their average from training. The "
                "result can then be compressed, merged and exported, but no longer adapts to the "
                "step.",
            },
        ),
    }


def _sockets() -> dict[str, Any]:
    return {
        "adapter_1": inputs.adapter("The first concept."),
        "adapter_2": inputs.adapter("The second concept."),
        "adapters": inputs.adapter_list(
            "Further concepts, or all of them, from Adapter Stack or Adapter Strength, at the strengths set "
            "there."
        ),
        "model": inputs.model(
            "The model that the concepts are for. closed-form and gradient draw a few steps with it, to see "
            "what each concept does; it is not changed."
        ),
        "clip": inputs.clip(
            "The text encoder that the concepts are for. With it closed-form and gradient write their "
            "prompts themselves, from the adapters' trigger words."
        ),
        "conditioning": (
            "CONDITIONING",
            {
                "tooltip": "One encoded prompt for each adapter, in their order, joined by Conditioning "
                "Combine. Only needed where prompts cannot be written by themselves."
            },
        ),
        "latent": ("LATENT", {"tooltip": "Its size is used for the few steps. Not connected: a small one."}),
    }


def _choices() -> dict[str, Any]:
    """The widgets of the methods that look at what layers see."""
    return {
        "prompts": (
            "STRING",
            {
                "default": "",
                "multiline": True,
                "tooltip": "For closed-form and gradient: one line for each adapter with a prompt that shows "
                "its concept; several prompts with a vertical bar between them. An empty line: from the "
                "adapter's trigger words.",
            },
        ),
        "sample_steps": (
            "INT",
            {
                "default": 4,
                "min": 1,
                "max": 100,
                "tooltip": "For closed-form and gradient: denoising steps for each prompt. A few are enough.",
            },
        ),
        "sample_cfg": (
            "FLOAT",
            {
                "default": 4.0,
                "min": 1.0,
                "max": 30.0,
                "step": 0.1,
                "tooltip": "For closed-form and gradient: guidance of these steps. Take the one that you "
                "draw with; 1 for models without guidance.",
            },
        ),
        "sample_seed": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 2**53 - 1,
                "control_after_generate": False,
                "tooltip": "For closed-form and gradient: the noise of these steps. It hardly matters.",
            },
        ),
        "save_statistics": (
            "STRING",
            {
                "default": "",
                "tooltip": "A name: what the layers saw is kept as files in output/spectral_statistics, for "
                "the command fuse. Empty: it is kept in memory only.",
            },
        ),
        "sample_rounds": (
            "INT",
            {
                "default": _rounds(),
                "min": 1,
                "max": 8,
                "tooltip": "For closed-form and gradient: how often each concept is drawn. First with its "
                "own adapter; then with what was fused so far, whose layers see something else, and fused "
                "anew. More than 2 rarely helps.",
            },
        ),
    }


class FuseAdapters:
    """Two adapters and an optional list of more, fused into one."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Fuses two or more adapters into one that holds all their concepts, and shows beforehand how much "
        "they get into each other's way. Third and further ones come as a list from Adapter Strength."
    )
    SEARCH_ALIASES = [
        "merge lora",
        "combine adapters",
        "merge",
        "combine",
        "concept",
        "fusion",
        "closed form",
        "spectral adapters",
    ]
    RETURN_TYPES = (inputs.ADAPTER, "STRING", "IMAGE")
    RETURN_NAMES = ("ADAPTER", "report", "overlap")
    OUTPUT_TOOLTIPS = (
        "The fused adapter.",
        "What was fused by which rule, what is kept of each concept, ranks, errors and warnings.",
        "How much the adapters overlap and bleed, and what is kept: in all, and layer by layer.",
    )
    FUNCTION = "fuse"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {"required": _required(), "optional": {**_sockets(), **_choices()}}

    def fuse(
        self,
        adapter_1: Any = None,
        adapter_2: Any = None,
        method: str = "sum",
        weight_1: float = 1.0,
        weight_2: float = 1.0,
        target_rank: int = 0,
        freeze_gates: bool = False,
        adapters: Any = None,
        model: Any = None,
        clip: Any = None,
        conditioning: Any = None,
        latent: Any = None,
        prompts: str = "",
        sample_steps: int = 4,
        sample_cfg: float = 4.0,
        sample_seed: int = 0,
        save_statistics: str = "",
        sample_rounds: int = 2,
    ) -> dict[str, Any]:
        from ..spectral_core.analysis import overlap_picture as overlap_sheet

        given, weights = collected((adapter_1, adapter_2), (weight_1, weight_2), adapters)
        looking = (latent, sample_steps, sample_cfg, sample_seed, sample_rounds)
        connected = (model, clip, conditioning)
        done = made(method, given, weights, connected, prompts, looking, target_rank, freeze_gates)
        lines = [*done.lines, *_saved(save_statistics, given, done.statistics or ())]
        with tensors.lasting():
            found = overlap_sheet.examine(given, weights, done.statistics)
            picture = overlap_sheet.draw(given, found, done.fused.report)
        report = results.lines(done.fused.report.text, *lines, *(f"before: {w}" for w in found.warnings))
        ui = images.preview(picture, "fuse_adapters")
        ui["spectral_bleed"] = (bleed_of(found, done.fused.report),)
        return results.shown(report, done.fused.adapter, report, images.to_image(picture), **ui)


def bleed_of(found: Any, report: Any) -> dict[str, Any]:
    """For the page, which draws it in its own colours: who bleeds into whom, and what is kept of each."""
    kept = [None if c.retention is None else round(c.retention, 3) for c in report.concepts]
    return {"concepts": list(found.concepts), "bleed": found.table, "kept": kept}


@dataclass(frozen=True)
class Made:
    """A fusion; what its layers saw, where it looked (else None); lines for the report."""

    fused: Any
    statistics: Any
    lines: list[str]


def made(
    method: str,
    given: Sequence[Any],
    weights: Sequence[float],
    connected: tuple[Any, Any, Any],
    prompts: str,
    looking: tuple[Any, int, float, int, int],
    rank: int = 0,
    freeze_gates: bool = False,
) -> Made:
    """The adapters fused; drawn for a few steps first where the method wants that. connected: MODEL, CLIP,
    CONDITIONING; looking: LATENT, steps, guidance, seed, rounds; rank 0: nothing is compressed."""
    from ..spectral_core import fusion
    from ..spectral_core.fusion import rounds

    def once(statistics: Any) -> Any:
        with tensors.lasting():
            return fusion.fuse(
                given,
                method,
                weights,
                rank=rank or None,
                freeze_gates=freeze_gates,
                statistics=statistics,
            )

    if not fusion.FUSIONS[method].needs_statistics:
        return Made(once(None), None, [])
    look, lines = looker(method, given, weights, connected, prompts, looking)
    done = rounds.fuse_in_rounds(look, once, looking[-1])
    return Made(done.fused, done.statistics, lines)


def collected(
    single: tuple[Any, Any], weights: tuple[float, float], adapters: Any
) -> tuple[list[Any], list[float]]:
    """The adapters that are connected, singly or as a list, and their weights.

    Raises SpectralAdapterError for fewer than two.
    """
    from ..spectral_core.errors import SpectralAdapterError

    pairs = [
        (results.need_adapter(adapter, f"adapter_{n + 1}"), weight)
        for n, (adapter, weight) in enumerate(zip(single, weights, strict=True))
        if adapter is not None
    ]
    pairs += [(adapter, 1.0) for adapter in results.need_adapters(adapters)]
    if len(pairs) < 2:
        raise SpectralAdapterError(
            f"{len(pairs)} adapters are connected: expected two or more; connect adapter_1 and adapter_2, or "
            "a list to adapters"
        )
    return [adapter for adapter, _ in pairs], [weight for _, weight in pairs]


def looker(
    method: str,
    given: Sequence[Any],
    weights: Sequence[float],
    connected: tuple[Any, Any, Any],
    prompts: str,
    looking: tuple[Any, int, float, int, int],
) -> tuple[Any, list[str]]:
    """What draws every concept and returns their statistics, and a list that gets lines for the report.

    Raises SpectralAdapterError that says what to connect where something is not.
    """
    from ..spectral_core.errors import SpectralAdapterError
    from ..spectral_core.fusion import FUSIONS
    from ..spectral_core.fusion.sources import labels_of
    from ..spectral_core.statistics import prompts as concept_prompts

    model, clip, conditioning = connected
    if model is None or (clip is None and conditioning is None):
        free = ", ".join(name for name, fusion in FUSIONS.items() if not fusion.needs_statistics)
        missing = "a MODEL to 'model'" if model is None else ""
        words = "the CLIP to 'clip'" if clip is None and conditioning is None else ""
        raise SpectralAdapterError(
            f"method {method} draws a few steps of each concept to see what it does: connect "
            f"{' and '.join(filter(None, (missing, words)))}, or choose one of {free}"
        )
    from .host.fusing import statistics

    labels, signs = labels_of(given), [_sign(w * a.strength) for w, a in zip(weights, given, strict=True)]
    encoded = statistics.conditionings(conditioning, given)
    texts: list[tuple[str, ...]] = [()] * len(given)
    if not encoded:
        texts = concept_prompts.read(prompts, labels, given)
        concept_prompts.require([t or (s == 0) for t, s in zip(texts, signs, strict=True)], labels, "prompts")
    latent, steps, cfg, seed, rounds = looking
    space = "rank" if method == "closed-form-rank" else "auto"
    request = statistics.Request(model, clip, texts, encoded, signs, latent, steps, cfg, seed, space, rounds)
    lines: list[str] = []

    def look(under: Any) -> Any:
        seen = statistics.collected(given, request, under)
        lines.extend(line for line in seen.lines if line not in lines)
        return seen.statistics

    return look, lines


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _saved(name: str, given: Sequence[Any], found: Sequence[Any]) -> list[str]:
    """Write every concept's statistics, where a name is given; lines for the report."""
    if not name.strip():
        return []
    from ..spectral_core.fusion.sources import labels_of
    from ..spectral_core.statistics import file as statistics_file
    from .host.files import paths

    lines = []
    for label, statistics in zip(labels_of(given), found, strict=True):
        if statistics:
            path = paths.new_file(f"spectral_statistics/{name.strip()}", in_saved=False)
            statistics_file.save(statistics, path)
            lines.append(f"statistics of {label}: {paths.below_output(path)}")
    return lines
