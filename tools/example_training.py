"""The example workflow that trains: the demo model learns from its own pictures, so no file is needed."""

from __future__ import annotations

from tools.example_graphs import PREFIX, Node, node, note, picture, start

TRAINING = {  # the widgets of Train Adapter that the example leaves as they are
    "columns": "",
    "targets": "attention",
    "trigger_word": "",
    "resolution": 64,
    "keep_proportions": False,
    "accumulation": 1,
    "optimiser": "adamw",
    "schedule": "constant",
    "warmup": 10,
    "caption_dropout": 0.0,
    "timesteps": "uniform",
    "weighting": "none",
    "precision": "auto",
    "gradient_checkpointing": "none",
    "gate": "adaptive",
    "target_open": 0.5,
    "freeze_gates": False,
    "train_scale": False,
    "ema": 0.0,
    "checkpoint_every": 100,
    "init_words": "",
    "text_targets": "",
    "text_learning_rate": 0.0,
    "sample_every": 0,
    "sample_prompt": "",
    "prior_images": "none",
    "prior_weight": 1.0,
}


def train_and_use() -> dict[str, Node]:
    prompt = "a small white moon on a black background"
    taught = "a large red striped star on a blue background"
    nodes = start(0, 0)
    nodes |= picture("taught", 420, 0, ("demo", 0), ("demo", 1), taught, "The pictures to learn from")
    nodes["words"] = node(
        "CLIPTextEncode", (420, 380, 330, 110), "Caption, for the training", clip=("demo", 1), text=prompt
    )
    nodes["train"] = node(
        PREFIX + "TrainAdapter",
        (780, 400, 420, 900),
        model=("demo", 0),
        latents=("taught_sampler", 0),
        conditioning=("words", 0),
        run_name="star_for_moon",
        images="none",
        method="foura",
        rank=4,
        steps=60,
        learning_rate=0.006,
        batch_size=2,
        seed=0,
        **TRAINING,
    )
    nodes["apply"] = node(
        PREFIX + "ApplyAdapter",
        (1240, 400, 380, 400),
        adapter=("train", 0),
        model=("demo", 0),
        clip=("demo", 1),
        strength_model=1.0,
        strength_clip=1.0,
        mode="auto",
        base_mismatch="delta",
    )
    on = ("apply", 0), ("apply", 1)
    nodes |= picture("trained", 1660, 0, *on, prompt, "The caption, with the trained adapter")
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


TRAINING_WORKFLOWS = {"train_and_use": train_and_use}
