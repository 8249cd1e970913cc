"""The inputs of Train Adapter. Their order is that of saved workflows: new ones stand at the end."""

from __future__ import annotations

from typing import Any

from . import inputs

METHODS = ("foura", "spectral_a", "spectral_r", "lora")


def input_types() -> inputs.Inputs:
    """What the host asks a node class for."""
    choices = {name: _advanced(given) for name, given in _choices().items()}
    return {"required": _required(), "optional": {**_sockets(), **choices}}


def _folders() -> list[str]:
    from .host.training import data as training_data

    return training_data.folders()


def number(kind: str, default: float, least: float, most: float, tooltip: str, **more: Any) -> inputs.Input:
    """A widget for a number with its limits."""
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
            METHODS,
            "foura: low rank in frequency space with gates that adapt to the step. spectral_a: adds to the "
            "strongest singular columns. spectral_r: only rotates them, with very few numbers. lora: plain.",
        ),
        "rank": number(
            "INT", 8, 1, 4096, "How much the adapter can learn. Spectral methods: how many columns."
        ),
        "steps": number("INT", 500, 1, 1_000_000, "How many times the adapter is improved."),
        "learning_rate": number(
            "FLOAT",
            0.0,
            0.0,
            100.0,
            "How large each improvement is. 0 takes the method's default (spectral_r needs about a hundred "
            "times lora's).",
            step=0.000001,
            round=False,
        ),
        "batch_size": number("INT", 1, 1, 1024, "Pictures per step. More is smoother and needs memory."),
        "seed": number(
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
        "clip": inputs.clip(
            "The model's CLIP, which encodes the captions. It is trained only where that is set."
        ),
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
        "resolution": number("INT", 512, 16, 4096, "Size in pixels of the pictures of a folder.", step=8),
        "keep_proportions": (
            "BOOLEAN",
            {"default": False, "tooltip": "Keep the pictures' proportions instead of cropping to a square."},
        ),
        "accumulation": number("INT", 1, 1, 1024, "Batches per step: a larger batch without the memory."),
        "optimiser": inputs.combo(
            ("adamw", "adafactor", "sgd", "schedulefree", "prodigy"),
            "How improvements are computed. schedulefree and prodigy need their Python packages.",
        ),
        "schedule": inputs.combo(
            ("constant", "cosine", "linear"), "The learning rate over the run: level, or falling to zero."
        ),
        "warmup": number("INT", 10, 0, 100_000, "Steps over which the learning rate rises at the start."),
        "caption_dropout": number(
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
        "target_open": number(
            "FLOAT",
            0.5,
            0.0,
            1.0,
            "Share of FouRA's gates that shall be open at the end. 0: no target.",
            step=0.05,
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
        "ema": number("FLOAT", 0.0, 0.0, 0.9999, "Decay of an average of the steps; 0 is off.", step=0.0001),
        "checkpoint_every": number(
            "INT", 100, 0, 100_000, "Steps between checkpoints. One is always written when the run ends."
        ),
        "init_words": (
            "STRING",
            {
                "default": "",
                "tooltip": "Makes trigger_word a new word that is learned along, starting from the meaning "
                "of these known words, such as dog. Empty: it stays as the CLIP reads it.",
            },
        ),
        "text_targets": (
            "STRING",
            {
                "default": "",
                "tooltip": "Layers of the text encoders to train as well: attention, attention+mlp or name "
                "patterns. Empty: they are not trained.",
            },
        ),
        "text_learning_rate": number(
            "FLOAT",
            0.0,
            0.0,
            100.0,
            "Learning rate of the text encoders. 0: half of the other.",
            step=0.000001,
            round=False,
        ),
        "sample_every": number(
            "INT",
            0,
            0,
            100_000,
            "Steps between sample pictures, which stand beside the loss curve while it trains and are "
            "kept in the folder of the run. 0: none.",
        ),
        "sample_prompt": (
            "STRING",
            {
                "default": "",
                "tooltip": "What the samples show. Empty: the first caption. Needs clip.",
            },
        ),
        "prior_images": inputs.combo(
            _folders(),
            "A folder of pictures of the concept's class (dogs, for your dog), so that the model goes on "
            "drawing those. Uncaptioned ones are called 'a picture of' init_words. Needs vae and clip.",
        ),
        "prior_weight": number(
            "FLOAT", 1.0, 0.0, 100.0, "How much the prior_images count beside the concept's.", step=0.05
        ),
    }
