"""Train Adapter: pictures and a MODEL in, an ADAPTER out: a named run, resumed and never repeated."""

from __future__ import annotations

import math
from typing import Any

from . import images as pictures
from . import inputs, results

_METHODS = ("foura", "spectral_a", "spectral_r", "lora")
_SHOWN_NOTES = 12


def _first(value: Any) -> Any:
    """The host gives every input as a list, because latents may come as one."""
    return value[0] if isinstance(value, list) and value else value


def _folders() -> list[str]:
    from .host import training_data

    return training_data.folders()


def _number(kind: str, default: float, least: float, most: float, tooltip: str, **more: Any) -> inputs.Input:
    return (kind, {"default": default, "min": least, "max": most, "tooltip": tooltip, **more})


def _advanced(given: inputs.Input) -> inputs.Input:
    kind, options = given
    return (kind, {**options, "advanced": True})


def _required() -> dict[str, Any]:
    return {
        "model": inputs.model("The base model. It is not changed; the adapter is trained beside it."),
        "run_name": (
            "STRING",
            {
                "default": "my_adapter",
                "tooltip": "The name of the run and of the adapter's file. The same name with the same "
                "settings resumes a stopped run, or returns the finished file; other settings begin name-2.",
            },
        ),
        "images": inputs.combo(
            _folders(),
            "A folder of pictures with captions (cat.jpg with cat.txt) inside ComfyUI's input folder. Needs "
            "vae and clip. none: latents and conditioning are connected instead.",
        ),
        "method": inputs.combo(
            _METHODS,
            "foura: low rank in frequency space with gates that adapt to the step. spectral_a: adds to the "
            "strongest singular columns. spectral_r: only rotates them, with very few numbers. lora: plain.",
        ),
        "rank": _number(
            "INT", 8, 1, 4096, "How much the adapter can learn. Spectral methods: how many columns."
        ),
        "steps": _number("INT", 500, 1, 1_000_000, "How many times the adapter is improved."),
        "learning_rate": _number(
            "FLOAT",
            0.0,
            0.0,
            100.0,
            "How large each improvement is. 0 takes the method's default (spectral_r needs about a hundred "
            "times lora's).",
            step=0.000001,
            round=False,
        ),
        "batch_size": _number("INT", 1, 1, 1024, "Pictures per step. More is smoother and needs memory."),
        "seed": _number(
            "INT",
            0,
            0,
            0xFFFFFFFF,
            "The same seed and settings give the same adapter. It never changes by itself.",
            control_after_generate=False,
        ),
    }


def _sockets() -> dict[str, Any]:
    return {
        "latents": (
            "LATENT",
            {"tooltip": "Encoded pictures, one batch or a list; used when images is none."},
        ),
        "conditioning": (
            "CONDITIONING",
            {"tooltip": "Encoded captions, one for each latent or one for all; used when images is none."},
        ),
        "vae": ("VAE", {"tooltip": "The model's VAE, which encodes the pictures of the folder."}),
        "clip": inputs.clip("The model's CLIP, which encodes the captions. It is not trained."),
        "adapter": inputs.adapter("An adapter to go on with; it brings its own method, rank and layers."),
    }


def _choices() -> dict[str, Any]:
    """The advanced widgets."""
    return {
        "columns": (
            "STRING",
            {
                "default": "",
                "tooltip": "Singular columns of the spectral methods, such as 0-7. Empty: the lowest that no "
                "other adapter of this model uses, so that concepts fuse without overlap.",
            },
        ),
        "targets": (
            "STRING",
            {
                "default": "attention",
                "tooltip": "Layers to train: attention, attention+mlp, all-linear, all, or name patterns "
                "such as *attn2.to_k, separated by commas.",
            },
        ),
        "trigger_word": (
            "STRING",
            {
                "default": "",
                "tooltip": "A word for the concept, put in front of captions that lack it. Only for images.",
            },
        ),
        "resolution": _number("INT", 512, 16, 4096, "Size in pixels of the pictures of a folder.", step=8),
        "keep_proportions": (
            "BOOLEAN",
            {"default": False, "tooltip": "Keep the pictures' proportions instead of cropping to a square."},
        ),
        "accumulation": _number("INT", 1, 1, 1024, "Batches per step: a larger batch without the memory."),
        "optimiser": inputs.combo(
            ("adamw", "adafactor", "sgd", "schedulefree", "prodigy"),
            "How improvements are computed. schedulefree and prodigy need their Python packages.",
        ),
        "schedule": inputs.combo(
            ("constant", "cosine", "linear"), "The learning rate over the run: level, or falling to zero."
        ),
        "warmup": _number("INT", 10, 0, 100_000, "Steps over which the learning rate rises at the start."),
        "caption_dropout": _number(
            "FLOAT", 0.1, 0.0, 0.9, "Share of pictures shown without their caption. Needs clip.", step=0.01
        ),
        "timesteps": inputs.combo(
            ("uniform", "logit-normal"), "Which noise levels are trained: all alike, or the middle ones more."
        ),
        "weighting": inputs.combo(
            ("none", "min-snr"), "min-snr: nearly clean pictures count less (not for flow models)."
        ),
        "precision": inputs.combo(
            ("auto", "fp32", "bf16", "fp16"),
            "What the model computes in; auto leaves it as it is. The adapter itself is always fp32.",
        ),
        "gradient_checkpointing": inputs.combo(
            ("none", "selective", "full"), "Less memory for more time; the result is the same."
        ),
        "gate": inputs.combo(("adaptive", "none"), "FouRA's gates, which choose the rank for each step."),
        "target_open": _number(
            "FLOAT", 0.0, 0.0, 1.0, "Share of gates that may stay open, for FouRA. 0: no limit.", step=0.05
        ),
        "freeze_gates": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "Fix FouRA's gates at the end, so that the adapter merges exactly.",
            },
        ),
        "train_scale": (
            "BOOLEAN",
            {"default": False, "tooltip": "Spectral methods: train the singular values as well."},
        ),
        "ema": _number("FLOAT", 0.0, 0.0, 0.9999, "Decay of an average of the steps; 0 is off.", step=0.0001),
        "checkpoint_every": _number(
            "INT", 100, 0, 100_000, "Steps between checkpoints. One is always written when the run ends."
        ),
    }


class TrainAdapter:
    """A named training run on the host's own model."""

    CATEGORY = inputs.CATEGORY
    DESCRIPTION = (
        "Trains a FouRA, a Spectral Adapter or a LoRA on pictures. The finished adapter can be used at once "
        "and is saved where the loaders list it. A stopped run goes on where it stopped."
    )
    SEARCH_ALIASES = ["train lora", "finetune", "dreambooth", "training", "spectral adapters"]
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
        choices = {name: _advanced(given) for name, given in _choices().items()}
        return {"required": _required(), "optional": {**_sockets(), **choices}}

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
        target_open: Any = 0.0,
        freeze_gates: Any = False,
        train_scale: Any = False,
        ema: Any = 0.0,
        checkpoint_every: Any = 100,
    ) -> dict[str, Any]:
        given = {name: _first(value) for name, value in locals().items() if name != "self"}
        given |= {"latents": _listed(latents), "conditioning": _conditionings(conditioning)}
        from .host import training

        with_adapter = None if given["adapter"] is None else results.need_adapter(given["adapter"])
        connected = training.Inputs(
            given["model"], given["latents"], given["conditioning"], given["vae"], given["clip"]
        )
        done = training.run(job_of(given, with_adapter), connected)
        return _shown(done, int(given["steps"]))

    @classmethod
    def VALIDATE_INPUTS(cls, images: Any = None) -> bool | str:
        from ..spectral_core.errors import SpectralAdapterError
        from .host import training_data

        name = _first(images)
        if not isinstance(name, str) or name == training_data.NO_FOLDER:
            return True
        try:
            training_data.folder_named(name)
        except SpectralAdapterError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, images: Any = None, **_others: Any) -> str:
        from ..spectral_core.errors import SpectralAdapterError
        from .host import training_data

        name = _first(images)
        if not isinstance(name, str) or name == training_data.NO_FOLDER:
            return ""
        try:
            return training_data.state_of_folder(name)
        except SpectralAdapterError as error:
            return str(error)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _conditionings(value: Any) -> list[Any]:
    """CONDITIONINGs as a list, also where a single one comes without the host's list around it."""
    if value is None:
        return []
    is_single = bool(value) and isinstance(value[0], list | tuple) and len(value[0]) == 2
    return [value] if is_single and isinstance(value[0][1], dict) else list(value)


def job_of(given: dict[str, Any], adapter: Any = None) -> Any:
    """The widgets' values as a :class:`.host.training_job.Job`; SpectralAdapterError for what cannot be."""
    from ..spectral_core.training.config import TrainConfig
    from .host import training_data
    from .host.training_job import Job, parse_columns

    config = TrainConfig(
        steps=given["steps"],
        batch_size=given["batch_size"],
        accumulation=given["accumulation"],
        learning_rate=given["learning_rate"],
        optimiser=given["optimiser"],
        warmup=given["warmup"],
        schedule=given["schedule"],
        ema=given["ema"],
        checkpointing=given["gradient_checkpointing"],
        caption_dropout=given["caption_dropout"],
        timesteps=given["timesteps"],
        weighting=given["weighting"],
        target_open=given["target_open"] or None,
        freeze_gates=given["freeze_gates"],
        seed=given["seed"],
    )
    same = ("run_name", "method", "rank", "train_scale", "gate", "targets", "trigger_word", "resolution")
    same += ("keep_proportions", "precision", "checkpoint_every")
    return Job(
        config=config,
        columns=parse_columns(given["columns"]),
        images="" if given["images"] == training_data.NO_FOLDER else given["images"],
        continued=adapter,
        **{name: given[name] for name in same},
    )


def _shown(done: Any, steps: int) -> dict[str, Any]:
    from ..spectral_core.analysis import summary_text
    from .host import paths, training_progress

    known = [loss for loss in done.losses if math.isfinite(loss)] or [0.0]
    picture = training_progress.curve(known, f"{done.name}: loss of {len(done.losses)} steps")
    report = report_of(done, steps, paths.below_output(done.path), summary_text(done.adapter))
    ui = pictures.preview(picture, "train_adapter")
    return results.shown(report, done.adapter, pictures.to_image(picture), report, **ui)


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
