"""Write the help pages of the Training nodes (web/docs) from the table of settings.

    python -m tools.option_pages

A test says when they are out of date.
"""

from __future__ import annotations

from typing import Any

from tools.node_locales import ROOT, load_pack

FOLDER = ROOT / "web" / "docs"
KINDS = ("Layers", "Optimiser", "NoiseAndLoss", "Gate", "TextEncoder", "Memory", "Regularisation")
KINDS += ("Validation",)
PICTURES = {  # of what, in words: what ``tools.draw_help`` has drawn
    "Adapter": "a star learned for the words of a moon (first row), after 10, 30 and 100 steps; the others "
    "show what it leaves alone.",
    "Gate": "target_open 0.25, 0.5 and 0.9, 40 steps each; a star learned for the words of a moon.",
    "Optimiser": "learning_rate 0.001, 0.006 and 0.03, 60 steps each; a star learned for the words of a "
    "moon.",
}
SHOWN = {"Optimiser": "Optimiser", "Gate": "Gate"}  # of a group; the others show a training's steps
MISTAKES = {
    "Layers": (
        "**Columns given by hand overlap.** Leave columns empty: the lowest free ones are taken.",
        "**The file is large.** More layers are not always better; *attention* is enough for most concepts.",
    ),
    "Optimiser": (
        "**Nothing is learned.** A rate of another method or model. Leave learning_rate at 0.",
        "**The loss explodes.** The run stops and keeps its last good state. Lower learning_rate.",
        "**schedulefree, prodigy, adamw8bit** need packages of their own; the error says how to install "
        "them. prodigy finds the rate itself: leave learning_rate at 0.",
    ),
    "NoiseAndLoss": (
        "**min-snr on a flow model.** It is for models with a noise schedule; the error says so.",
        "**timestep_mean without effect.** Only *logit-normal* reads it.",
    ),
    "Gate": (
        "**Connected for another method.** Only foura has gates; the report says what was not read.",
        "**The adapter does not merge.** Set freeze_gates: open gates are then kept for good.",
    ),
    "TextEncoder": (
        "**init_words without a trigger_word.** It is the trigger_word of Train Adapter that is learned.",
        "**The word means nothing in the prompt.** It lives in the adapter: connect CLIP to the node that "
        "applies it.",
    ),
    "Memory": (
        "**Out of memory.** batch_size 1 with accumulation, then checkpointing *selective* or *full*.",
        "**Another resolution than the model's.** It learns badly there; the report warns. 0 is the model's.",
    ),
    "Regularisation": (
        "**The folder shows the concept itself.** prior_images are others of its class: other dogs, for your "
        "dog.",
        "**No captions are dropped.** Without clip there is no empty caption; the report says so.",
        "**A style shall be everywhere.** Leave trigger_word empty: nothing is preserved then.",
    ),
    "Validation": (
        "**One picture.** A share needs two: one to train on and one to judge by.",
        "**The best is not what the node gives.** With patience 0 it gives the last; the report names the "
        "best one's file.",
    ),
}


def page(kind: str, node: Any, title: str) -> str:
    """The help page of one option node."""
    given = node.INPUT_TYPES()["optional"]
    inputs = [f"| {name} | {_words(name, options)} |" for name, (_, options) in given.items()]
    mistakes = [f"- {line}" for line in MISTAKES[kind]]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"{node.DESCRIPTION} Connect its *options* to Train Adapter, or to another Training node before "
            "it: of a setting in several nodes the last one counts.",
            "",
            *_picture(kind),
            "## Inputs",
            "",
            "| input | what it does |",
            "|---|---|",
            *inputs,
            "",
            "## Outputs",
            "",
            "**options**, for the socket of that name.",
            "",
            "## Typical mistakes",
            "",
            *mistakes,
            "",
        ]
    )


def _picture(kind: str) -> list[str]:
    shown = SHOWN.get(kind, "Adapter")
    words = f"*The demo model: {PICTURES[shown]}*"
    return [f"![what the numbers do](SpectralAdapters_Train{shown}.jpg)", "", words, ""]


def _words(name: str, options: dict[str, Any]) -> str:
    if "default" not in options:
        return str(options["tooltip"])
    default = options["default"]
    shown = "empty" if default == "" else "off" if default is False else "on" if default is True else default
    return f"{options['tooltip']} Default: {shown}."


def pages() -> dict[str, str]:
    """File name -> text."""
    pack = load_pack()
    found = {}
    for kind in KINDS:
        name = f"SpectralAdapters_Train{kind}"
        node, title = pack.NODE_CLASS_MAPPINGS[name], pack.NODE_DISPLAY_NAME_MAPPINGS[name]
        found[f"{name}.md"] = page(kind, node, title)
    return found


def main() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
