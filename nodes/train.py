"""Train Adapter: pictures and a MODEL in, an ADAPTER out: a named run, resumed and never repeated."""

from __future__ import annotations

import math
from typing import Any

from . import images as pictures
from . import inputs, results, train_inputs

_SHOWN_NOTES = 12


def _first(value: Any) -> Any:
    """The host gives every input as a list, because latents may come as one."""
    return value[0] if isinstance(value, list) and value else value


class TrainAdapter:
    """A named training run on the host's own model."""

    CATEGORY = inputs.CATEGORY
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
        run_name: Any,
        images: Any,
        method: Any,
        rank: Any,
        steps: Any,
        learning_rate: Any,
        batch_size: Any,
        seed: Any,
        latents: Any = None,
        conditioning: Any = None,
        vae: Any = None,
        clip: Any = None,
        adapter: Any = None,
        columns: Any = "",
        targets: Any = "attention",
        trigger_word: Any = "",
        resolution: Any = 512,
        keep_proportions: Any = False,
        accumulation: Any = 1,
        optimiser: Any = "adamw",
        schedule: Any = "constant",
        warmup: Any = 10,
        caption_dropout: Any = 0.1,
        timesteps: Any = "uniform",
        weighting: Any = "none",
        precision: Any = "auto",
        gradient_checkpointing: Any = "none",
        gate: Any = "adaptive",
        target_open: Any = 0.5,
        freeze_gates: Any = False,
        train_scale: Any = False,
        ema: Any = 0.0,
        checkpoint_every: Any = 100,
        init_words: Any = "",
        text_targets: Any = "",
        text_learning_rate: Any = 0.0,
        sample_every: Any = 0,
        sample_prompt: Any = "",
        prior_images: Any = "none",
        prior_weight: Any = 1.0,
    ) -> dict[str, Any]:
        given = {name: _first(value) for name, value in locals().items() if name != "self"}
        given |= {"latents": _listed(latents), "conditioning": _conditionings(conditioning)}
        from .host.training import named_run as training

        with_adapter = None if given["adapter"] is None else results.need_adapter(given["adapter"])
        connected = training.Inputs(
            given["model"], given["latents"], given["conditioning"], given["vae"], given["clip"]
        )
        done = training.run(job_of(given, with_adapter), connected)
        return shown(done, int(given["steps"]))

    @classmethod
    def VALIDATE_INPUTS(cls, images: Any = None, prior_images: Any = None) -> bool | str:
        from ..spectral_core.errors import SpectralAdapterError
        from .host.training import data as training_data

        try:
            for name in _folders(images, prior_images):
                training_data.folder_named(name)
        except SpectralAdapterError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, images: Any = None, prior_images: Any = None, **_others: Any) -> str:
        from ..spectral_core.errors import SpectralAdapterError
        from .host.training import data as training_data

        try:
            return " ".join(training_data.state_of_folder(name) for name in _folders(images, prior_images))
        except SpectralAdapterError as error:
            return str(error)


def _folders(*given: Any) -> list[str]:
    """The folders among the values of widgets."""
    names = (_first(value) for value in given)
    return [name for name in names if isinstance(name, str) and _chosen(name)]


def _chosen(name: str) -> str:
    """A folder's name, empty for the choice of none."""
    from .host.training import data as training_data

    return "" if name == training_data.NO_FOLDER else name


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _conditionings(value: Any) -> list[Any]:
    """CONDITIONINGs as a list, also where a single one comes without the host's list around it."""
    if value is None:
        return []
    is_single = bool(value) and isinstance(value[0], list | tuple) and len(value[0]) == 2
    return [value] if is_single and isinstance(value[0][1], dict) else list(value)


def job_of(given: dict[str, Any], adapter: Any = None) -> Any:
    """The widgets' values as a :class:`.host.training.job.Job`; SpectralAdapterError for what cannot be."""
    from ..spectral_core.training.config.config import TrainConfig
    from .host.training.job import Job, parse_columns

    config = TrainConfig(
        steps=given["steps"],
        batch_size=given["batch_size"],
        accumulation=given["accumulation"],
        learning_rate=given["learning_rate"],
        text_learning_rate=given["text_learning_rate"],
        optimiser=given["optimiser"],
        warmup=given["warmup"],
        schedule=given["schedule"],
        ema=given["ema"],
        checkpointing=given["gradient_checkpointing"],
        caption_dropout=given["caption_dropout"],
        timesteps=given["timesteps"],
        weighting=given["weighting"],
        target_open=given["target_open"],
        freeze_gates=given["freeze_gates"],
        prior_weight=given["prior_weight"],
        seed=given["seed"],
    )
    same: tuple[str, ...] = (
        "run_name",
        "method",
        "rank",
        "train_scale",
        "gate",
        "targets",
        "trigger_word",
        "resolution",
    )
    same += ("keep_proportions", "precision", "checkpoint_every", "init_words", "text_targets")
    same += ("sample_every", "sample_prompt")
    return Job(
        config=config,
        columns=parse_columns(given["columns"]),
        images=_chosen(given["images"]),
        prior_images=_chosen(given["prior_images"]),
        continued=adapter,
        **{name: given[name] for name in same},
    )


def shown(done: Any, steps: int) -> dict[str, Any]:
    """A finished run as a node's results; the page draws its curves itself, from ``spectral_run``."""
    from ..spectral_core.analysis.spectra import summary_text
    from .host.files import paths
    from .host.training import progress as training_progress

    known = [loss for loss in done.losses if math.isfinite(loss)] or [0.0]
    picture = training_progress.curve(known, f"{done.name}: loss of {len(done.losses)} steps")
    report = report_of(done, steps, paths.below_output(done.path), summary_text(done.adapter))
    return results.shown(report, done.adapter, pictures.to_image(picture), report, spectral_run=(done.name,))


def report_of(done: Any, steps: int, file: str, summary: str) -> str:
    """What the node says about a finished run."""
    few = max(1, len(done.losses) // 10)
    lines = []
    if done.reused:
        lines.append(
            f"run {done.name} was finished before: nothing was trained. Another run_name trains anew"
        )
    else:
        resumed = f", resumed at step {done.resumed_at}" if done.resumed_at else ""
        lines.append(f"run {done.name}: {steps} steps in {done.seconds:.0f} s{resumed}")
    lines.append(f"saved as {file}")
    if done.losses:
        first, last = (sum(part) / few for part in (done.losses[:few], done.losses[-few:]))
        lines.append(f"loss {first:.4f} at first, {last:.4f} at last (means of {few} steps)")
    lines += [f"note: {note}" for note in done.notes[:_SHOWN_NOTES]]
    return results.lines(*lines, summary)
