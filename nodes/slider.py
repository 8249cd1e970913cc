"""Concept Slider: two prompts become an adapter whose strength moves a picture from one towards the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import inputs, train, train_inputs, train_options

_BATCH = 2  # both directions in every step
_OWN = ("precision", "checkpoint_every")


class ConceptSlider:
    """A named run that learns a direction between two prompts; no pictures are needed."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Learns a slider from two prompts, without pictures: at strength 1 a picture moves towards the "
        "first, at -1 towards the second, and by degrees between. For every model that "
        "Train Adapter trains, flow models too."
    )
    SEARCH_ALIASES = [
        "slider",
        "concept slider",
        "lora slider",
        "train lora",
        "concept",
        "style",
        "attribute",
        "spectral adapters",
    ]
    RETURN_TYPES = (inputs.ADAPTER, "IMAGE", "STRING")
    RETURN_NAMES = ("ADAPTER", "loss curve", "report")
    OUTPUT_TOOLTIPS = (
        "The slider, for Apply Adapter or Compare Adapters; its strength may be negative.",
        "How far its predictions are from the moved ones, step by step. Lower is closer.",
        "The file, the loss, the time, and everything worth knowing about the run.",
    )
    FUNCTION = "train"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        table, own = train_inputs.rows(), _rows()
        widgets = {
            "sample_steps": train_inputs.widget(own["sample_steps"], 0, "Steps of these pictures; 0: usual."),
            "guidance": train_inputs.widget(
                own["guidance"], 0.0, "Guidance of these pictures; 0 takes what suits the model."
            ),
        }
        return {
            "required": {
                "model": inputs.model("The model that the slider is for. It is not changed."),
                "clip": inputs.clip("Its text encoder. It is not changed."),
                "positive": _prompt(
                    "a very old {}",
                    "Where strength 1 moves to. Curly brackets stand for each line of preserve.",
                ),
                "negative": _prompt("a very young {}", "Where strength -1 moves to, in the same words."),
                "neutral": _prompt("a {}", "What is moved: the prompt without the attribute."),
                "preserve": _prompt(
                    "man\nwoman",
                    "Subjects or words that shall stay as they are, one in a line; the more, the less the "
                    "slider learns of what usually comes with its ends.",
                    True,
                ),
                "method": train_inputs.widget(table["method"]),
                "rank": train_inputs.widget(table["rank"]),
                "steps": train_inputs.widget(table["steps"], 200),
                "run_name": train_inputs.run_name("my_slider"),
            },
            "optional": {
                "options": train_inputs.options(),
                "latent": (
                    "LATENT",
                    {"tooltip": "Its size is used for the pictures to learn on. Not connected: small."},
                ),
                "eta": train_inputs.widget(own["eta"]),
                "start": train_inputs.widget(own["start"], step=0.05),
                "samples": train_inputs.widget(own["samples"], tooltip="Pictures drawn to learn on."),
                **{name: (kind, {**more, "advanced": True}) for name, (kind, more) in widgets.items()},
            },
        }

    def train(
        self,
        model: Any,
        clip: Any,
        positive: str,
        negative: str,
        neutral: str,
        preserve: str,
        method: str,
        rank: int,
        steps: int,
        run_name: str,
        options: Any = None,
        latent: Any = None,
        eta: float = 1.0,
        start: float = 0.2,
        samples: int = 16,
        sample_steps: int = 0,
        guidance: float = 0.0,
    ) -> dict[str, Any]:
        from .host.fusing import slider
        from .host.training.defaults import usual_guidance, usual_steps

        words = {
            "positive": positive.strip(),
            "negative": negative.strip(),
            "neutral": neutral.strip(),
            "preserve": tuple(line.strip() for line in preserve.splitlines() if line.strip()),
            "method": method,
            "rank": rank,
            "eta": eta,
            "start": start,
            "samples": samples,
            "sample_steps": sample_steps or usual_steps(model),
            "guidance": guidance or usual_guidance(model),
            "run_name": run_name.strip(),
        }
        job, notes = job_of(words, steps, train_options.need_options(options))
        done = slider.run(job, slider.Inputs(model, clip, latent), notes)
        return train.shown(done, steps)


def _prompt(default: str, tooltip: str, multiline: bool = False) -> inputs.Input:
    # The host reads braces in such widgets as a choice of words, unless it is told not to.
    options = {"default": default, "multiline": multiline, "dynamicPrompts": False, "tooltip": tooltip}
    return ("STRING", options)


def _rows() -> Mapping[str, Any]:
    from ..spectral_core.training.config.setting import settings_of
    from ..spectral_core.training.objectives.slider import SliderSettings

    return settings_of(SliderSettings)


def job_of(words: Mapping[str, Any], steps: int, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """What the node is told as a :class:`.host.fusing.slider.Job`, and what to say about it."""
    from ..spectral_core.training.config.config import TrainConfig
    from ..spectral_core.training.config.setting import one_of, settings_of
    from .host.fusing.slider_job import Job

    table, own, of_config = train_inputs.rows(), _rows(), settings_of(TrainConfig)
    for name in options:
        one_of("training option", name, tuple(table))
    given = {name: train_inputs.value_of(table[name], value) for name, value in options.items()}
    kept = {n: v for n, v in given.items() if n in _OWN or n in own}
    config = {"batch_size": _BATCH, **{n: v for n, v in given.items() if n in of_config and n not in kept}}
    notes = train.unread(words["method"], options, table)
    if unread := [n for n, v in given.items() if n not in {*config, *kept} and v != table[n].default]:
        notes.append(f"{', '.join(unread)}: not read by a slider, which has no pictures")
    return Job(config=TrainConfig(**{**config, "steps": steps}), **{**kept, **words}), notes
