"""Train Adapter: pictures and a MODEL in, an ADAPTER out: a named run, resumed and never repeated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import images as pictures
from . import inputs, results, train_inputs, train_options

_SHOWN_NOTES = 12


def _first(value: Any) -> Any:
    """The host gives every input as a list, because latents may come as one."""
    return value[0] if isinstance(value, list) and value else value


class TrainAdapter:
    """A named training run on the host's own model."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Trains a FouRA, a Spectral Adapter or a LoRA on pictures. The finished adapter can be used at once "
        "and is saved where the loaders list it. A stopped run goes on where it stopped."
    )
    SEARCH_ALIASES = [
        "train lora",
        "finetune",
        "dreambooth",
        "train",
        "concept",
        "style",
        "trigger",
        "training",
        "spectral adapters",
    ]
    RETURN_TYPES = (inputs.ADAPTER, "IMAGE", "STRING")
    RETURN_NAMES = ("ADAPTER", "loss curve", "report")
    OUTPUT_TOOLTIPS = (
        "The trained adapter, for Apply Adapter in the same workflow.",
        "The loss of every step, as it is and smoothed. Lower is better learned.",
        "The file, the loss, the time, and everything worth knowing about the run.",
    )
    FUNCTION = "train"
    OUTPUT_NODE = True
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return train_inputs.input_types()

    def train(
        self,
        model: Any,
        images: Any,
        trigger_word: Any,
        preset: Any,
        method: Any,
        rank: Any,
        steps: Any,
        sample_every: Any,
        run_name: Any,
        clip: Any = None,
        vae: Any = None,
        latents: Any = None,
        conditioning: Any = None,
        adapter: Any = None,
        options: Any = None,
    ) -> dict[str, Any]:
        from .host.training import run as training

        widgets = {
            "images": _first(images),
            "trigger_word": _first(trigger_word),
            "method": _first(method),
            "rank": _first(rank),
            "steps": _first(steps),
            "sample_every": _first(sample_every),
            "run_name": _first(run_name),
        }
        continued = None if _first(adapter) is None else results.need_adapter(_first(adapter))
        chosen = train_options.need_options(_first(options))
        job, notes = job_of(widgets, _first(preset), chosen, continued)
        connected = training.Inputs(
            _first(model), _listed(latents), _conditionings(conditioning), _first(vae), _first(clip)
        )
        done = training.run(job, connected, notes)
        return shown(done, job.config.steps)

    @classmethod
    def VALIDATE_INPUTS(cls, images: Any = None) -> bool | str:
        return train_options.folder_error([_first(images)])

    @classmethod
    def IS_CHANGED(cls, images: Any = None, **_others: Any) -> str:
        return train_options.folder_state([_first(images)])


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _conditionings(value: Any) -> list[Any]:
    """CONDITIONINGs as a list, also where a single one comes without the host's list around it."""
    if value is None:
        return []
    is_single = bool(value) and isinstance(value[0], list | tuple) and len(value[0]) == 2
    return [value] if is_single and isinstance(value[0][1], dict) else list(value)


def job_of(
    widgets: Mapping[str, Any], preset: str, options: Mapping[str, Any], adapter: Any = None
) -> tuple[Any, list[str]]:
    """What the node is told as a :class:`.host.training.job.Job`, and what to say about it.

    The options go before the preset, and the node's own widgets before both where they are not 0.
    SpectralAdapterError for what cannot be.
    """
    from ..spectral_core.training.config.config import TrainConfig
    from ..spectral_core.training.config.presets import NAMES, PRESETS
    from ..spectral_core.training.config.setting import one_of, settings_of
    from .host.training.job import Job

    one_of("preset", preset, NAMES)
    table, of_job = train_inputs.rows(), settings_of(Job)
    for name in options:
        one_of("training option", name, tuple(table))
    own = {name: value for name, value in widgets.items() if name not in ("rank", "steps") or value}
    given = {**PRESETS[preset], **options, **own}
    given = {name: train_inputs.value_of(table[name], v) if name in table else v for name, v in given.items()}
    for name in ("images", "prior_images", "validation_images"):
        given[name] = train_options.chosen(given.get(name, ""))
    config = TrainConfig(**{n: v for n, v in given.items() if n in table and n not in of_job})
    told = {n: v for n, v in given.items() if n in of_job or n not in table}
    job = Job(config=config, continued=adapter, **told)
    taken = {n: v for n, v in PRESETS[preset].items() if n not in own and n not in options}
    notes = (
        [f"from the preset {preset!r}: {', '.join(f'{n} {v}' for n, v in taken.items())}"] if taken else []
    )
    return job, notes + unread(job.method, options, table)


def unread(method: str, options: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """What is set away from its default and the method does not read."""
    names = [
        name
        for name, value in options.items()
        if (methods := table[name].words.methods) and method not in methods
        if train_inputs.value_of(table[name], value) != table[name].default
    ]
    return [f"{', '.join(names)}: not read by {method}"] if names else []


def shown(done: Any, steps: int) -> dict[str, Any]:
    """A finished run as a node's results; the page draws its curves itself, from ``spectral_run``."""
    from ..spectral_core.analysis.spectra import summary_text
    from .host.files import paths
    from .host.training import progress as training_progress

    losses, name = done.result.losses, done.place.name
    known = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    title = f"{name}: loss of {len(losses)} steps"
    picture = training_progress.curve(known, title, held_out=done.result.held_out)
    report = report_of(done, steps, paths.below_output(done.path), summary_text(done.adapter))
    return results.shown(report, done.adapter, pictures.to_image(picture), report, spectral_run=(name,))


def report_of(done: Any, steps: int, file: str, summary: str) -> str:
    """What the node says about a finished run."""
    losses, name = done.result.losses, done.place.name
    few = max(1, len(losses) // 10)
    lines = []
    if done.reused:
        lines.append(f"run {name} was finished before: nothing was trained. Another run_name trains anew")
    else:
        resumed = f", resumed at step {done.result.resumed_at}" if done.result.resumed_at else ""
        lines.append(f"run {name}: {steps} steps in {done.result.seconds:.0f} s{resumed}")
    lines.append(f"saved as {file}")
    if losses:
        first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
        lines.append(f"loss {first:.4f} at first, {last:.4f} at last (means of {few} steps)")
    if held_out := done.result.held_out:
        step, last = list(held_out.items())[-1]
        best = min(held_out, key=lambda at: held_out[at])
        lines.append(f"held-out loss {last:.4f} at step {step}, lowest {held_out[best]:.4f} at step {best}")
    lines += [f"note: {note}" for note in done.notes[:_SHOWN_NOTES]]
    return results.lines(*lines, summary)
