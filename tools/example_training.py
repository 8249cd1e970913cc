"""The example workflow that trains: the demo model learns from its own pictures, so no file is needed."""

from __future__ import annotations

from tools.example_graphs import PREFIX, Node, node, note, picture, start

OPTIMISER = {  # the widgets of Training: Optimiser that the example leaves as they are
    "optimiser": "adamw",
    "betas": "0.9, 0.99",
    "weight_decay": 0.01,
    "warmup": 10,
    "schedule": "constant",
    "gradient_clip": 1.0,
    "ema": 0.0,
    "seed": 0,
}


def train_and_use() -> dict[str, Node]:
    prompt = "a small white moon on a black background"
    taught = "a large red striped star on a blue background"
    nodes = start(0, 0)
    nodes |= picture("taught", 420, 0, ("demo", 0), ("demo", 1), taught, "The pictures to learn from")
    nodes["words"] = node(
        "CLIPTextEncode", (420, 380, 330, 110), "Caption, for the training", clip=("demo", 1), text=prompt
    )
    nodes["faster"] = node(PREFIX + "TrainOptimiser", (420, 530, 330, 300), learning_rate=0.006, **OPTIMISER)
    nodes["train"] = node(
        PREFIX + "TrainAdapter",
        (780, 400, 420, 700),
        model=("demo", 0),
        latents=("taught_sampler", 0),
        conditioning=("words", 0),
        options=("faster", 0),
        images="none",
        trigger_word="",
        preset="an object",
        method="foura",
        rank=4,
        steps=100,
        sample_every=0,
        sample_prompt="",
        run_name="star_for_moon",
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
