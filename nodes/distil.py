"""Distil Adapters: several adapters become one that is trained to draw what each of them draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import fuse, inputs, results, train, train_inputs
from .train_inputs import widget

_LOOKING_STEPS = 4  # of the fusion that the training begins with


def _required(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": inputs.model("The model that the concepts are for. It is not changed."),
        "clip": inputs.clip("The text encoder that the concepts are for. It is not changed."),
        "run_name": train_inputs.run_name("my_distilled"),
        "weight_1": inputs.strength("How strong the first concept is in the result; 0 leaves it out."),
        "weight_2": inputs.strength("How strong the second concept is in the result; 0 leaves it out."),
        "steps": widget(table["steps"], 200),
        "learning_rate": widget(
            table["learning_rate"],
            tooltip="How large each improvement is. 0 chooses it from the size of the adapters, which suits "
            "every model.",
        ),
        "batch_size": widget(table["batch_size"], 4, "Samples per step. More is smoother and needs memory."),
        "seed": widget(table["seed"], max=0xFFFFFFFF, control_after_generate=False),
    }


def _sockets() -> dict[str, Any]:
    return {
        "adapter_1": inputs.adapter("The first concept."),
        "adapter_2": inputs.adapter("The second concept."),
        "adapters": inputs.adapter_list(
            "Further concepts, or all of them, from Adapter Stack or Adapter Strength, at the strengths set "
            "there."
        ),
        "fused": inputs.adapter(
            "A fusion of the same concepts to begin with, from Fuse Adapters. Not connected: a closed-form "
            "one is made."
        ),
        "latent": ("LATENT", {"tooltip": "Its size is used for the samples. Not connected: a small one."}),
    }


def _choices(table: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompts": (
            "STRING",
            {
                "default": "",
                "multiline": True,
                "tooltip": "One line for each adapter with a prompt that shows its concept; several prompts "
                "with a vertical bar between them. An empty line: from the adapter's trigger words.",
            },
        ),
        "preserve": (
            "STRING",
            {
                "default": "",
                "multiline": True,
                "tooltip": "Prompts, one in a line, under which the model shall draw what it draws without "
                "adapters. Empty: a list of everyday ones. A single - : none.",
            },
        ),
        "target_rank": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 4096,
                "tooltip": "The rank of every layer. 0: all the adapters' ranks together.",
            },
        ),
        "samples": widget(samples["samples"]),
        "sample_steps": widget(samples["sample_steps"]),
        "sample_cfg": widget(
            samples["guidance"],
            0.0,
            "Guidance of these pictures. Take the one that you draw with; 0: what suits the model.",
        ),
        "accumulation": widget(table["accumulation"]),
        "precision": widget(table["precision"]),
        "checkpointing": widget(table["checkpointing"]),
        "checkpoint_every": widget(table["checkpoint_every"]),
    }


class DistilAdapters:
    """Two adapters and an optional list of more, fused and then trained to be one."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Makes one adapter out of several and trains it to draw what each of them draws, without any "
        "pictures: keeps more of every concept than a fusion alone, and leaves other prompts alone. Takes "
        "minutes; a stopped run goes on where it stopped."
    )
    SEARCH_ALIASES = [
        "distill",
        "distillation",
        "merge lora",
        "combine",
        "combine adapters",
        "concept",
        "spectral adapters",
    ]
    RETURN_TYPES = (inputs.ADAPTER, "IMAGE", "STRING")
    RETURN_NAMES = ("ADAPTER", "loss curve", "report")
    OUTPUT_TOOLTIPS = (
        "The distilled adapter, for Apply Adapter in the same workflow.",
        "How far its predictions are from the concepts' own, step by step. Lower is closer.",
        "The file, the loss, the time, and everything worth knowing about the run.",
    )
    FUNCTION = "distil"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        from ..spectral_core.training.config.adapter import SampleSettings
        from ..spectral_core.training.config.setting import settings_of

        table = train_inputs.rows()
        given = _choices(table, settings_of(SampleSettings))
        choices = {name: (kind, {**more, "advanced": True}) for name, (kind, more) in given.items()}
        return {"required": _required(table), "optional": {**_sockets(), **choices}}

    def distil(
        self,
        model: Any,
        clip: Any,
        adapter_1: Any = None,
        adapter_2: Any = None,
        run_name: str = "my_distilled",
        weight_1: float = 1.0,
        weight_2: float = 1.0,
        steps: int = 200,
        learning_rate: float = 0.0,
        batch_size: int = 4,
        seed: int = 0,
        adapters: Any = None,
        fused: Any = None,
        latent: Any = None,
        prompts: str = "",
        preserve: str = "",
        target_rank: int = 0,
        samples: int = 16,
        sample_steps: int = 20,
        sample_cfg: float = 0.0,
        accumulation: int = 1,
        precision: str = "auto",
        checkpointing: str = "none",
        checkpoint_every: int = 100,
    ) -> dict[str, Any]:
        from ..spectral_core.errors import SpectralAdapterError
        from ..spectral_core.training.objectives.distillation import DISTIL
        from .host.fusing import distil
        from .host.training.defaults import usual_guidance

        connected, weights = fuse.collected((adapter_1, adapter_2), (weight_1, weight_2), adapters)
        given, texts = _concepts(connected, weights, prompts)
        if fused is not None and target_rank:
            raise SpectralAdapterError(
                "fused and target_rank: the rank is that of the fused adapter; set target_rank to 0, or in "
                "Fuse Adapters"
            )
        sample_cfg = sample_cfg or usual_guidance(model)
        begin = None if fused is None else results.need_adapter(fused, "fused")
        looking = (latent, _LOOKING_STEPS, sample_cfg, seed)
        config = replace(
            DISTIL,
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            checkpointing=checkpointing,
            seed=seed,
        )
        job = distil.Job(
            run_name=run_name.strip(),
            config=config,
            samples=samples,
            sample_steps=sample_steps,
            cfg=sample_cfg,
            preserve=_preserved(preserve),
            precision=precision,
            checkpoint_every=checkpoint_every,
        )
        done = distil.run(
            job,
            distil.Inputs(
                model,
                clip,
                given,
                texts,
                latent,
                lambda: begin or _closed_form(model, clip, given, texts, looking, target_rank),
                f"closed-form {target_rank}" if begin is None else begin.content_hash,
            ),
        )
        return train.shown(done, steps)


def _concepts(
    connected: Sequence[Any], weights: Sequence[float], prompts: str
) -> tuple[list[Any], list[tuple[str, ...]]]:
    """The adapters that count, at their strengths, with the prompts that show them."""
    from ..spectral_core.errors import SpectralAdapterError
    from ..spectral_core.fusion.sources import labels_of
    from ..spectral_core.statistics import prompts as concept_prompts

    given = [a.scaled(weight) for a, weight in zip(connected, weights, strict=True)]
    labels = labels_of(given)
    texts = concept_prompts.read(prompts, labels, given)
    counted = [(a, t, label) for a, t, label in zip(given, texts, labels, strict=True) if a.strength]
    if not counted:
        raise SpectralAdapterError("every strength is 0: nothing is left to distil")
    concept_prompts.require(
        [t or not a.strength for a, t in zip(given, texts, strict=True)], labels, "prompts"
    )
    return [a for a, _, _ in counted], [t for _, t, _ in counted]


def _preserved(text: str) -> tuple[str, ...]:
    from ..spectral_core.statistics.prompts import PRESERVE

    if text.strip() == "-":
        return ()
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or PRESERVE


def _closed_form(
    model: Any,
    clip: Any,
    given: Sequence[Any],
    texts: Sequence[Sequence[str]],
    looking: tuple[Any, int, float, int],
    rank: int,
) -> Any:
    """What the training begins with."""
    from ..spectral_core.fusion.rounds import ROUNDS

    prompts = "\n".join(" | ".join(t) for t in texts)
    way = (*looking, ROUNDS)
    weights = [1.0] * len(given)
    return fuse.made("closed-form", given, weights, (model, clip, None), prompts, way, rank).fused.adapter
