"""Write the help pages of the Training nodes (web/docs) from the table of settings, in every language.

    python -m tools.option_pages

A test says when they are out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.node_locales import ROOT, languages, load_pack, memory

FOLDER = ROOT / "web" / "docs"
KINDS = ("Layers", "Optimiser", "NoiseAndLoss", "Gate", "TextEncoder", "Memory", "Regularisation")
KINDS += ("Validation",)
PICTURES = {  # of what, in words: what ``tools.draw_help`` has drawn with the demo model
    "Layers": "The demo model: targets `*attn2.to_k`, attention and attention+mlp, 40 steps each; a star "
    "learned for the words of a moon (first row). The other rows show what else changes.",
    "Optimiser": "The demo model: learning_rate 0.001, 0.006 and 0.03, 60 steps each; a star learned for the "
    "words of a moon.",
    "NoiseAndLoss": "The demo model: timesteps uniform and logit-normal, 40 steps each; a star learned for "
    "the words of a moon (first row).",
    "Gate": "The demo model: target_open 0.25, 0.5 and 0.9, 40 steps each; a star learned for the words of a "
    "moon.",
    "TextEncoder": "The demo model: `<bot>` learned from ten pictures in 200 steps, without init_words and "
    "as a new word that starts from 'creature'.",
    "Memory": "The demo model: batch_size 1 and 4, 40 steps each; a star learned for the words of a moon "
    "(first row).",
    "Regularisation": "The demo model: `<bot>` learned from ten pictures in 200 steps, with preserve_every 0 "
    "and 4. The last two rows are prompts without it.",
    "Validation": "The demo model: `<bot>` learned from ten pictures with validation_share 0.3; the held-out "
    "loss is drawn beside the others.",
}
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


CHAIN = (
    "{what} Connect its *options* to Train Adapter, or to another Training node before it: of a setting in "
    "several nodes the last one counts."
)
SHOWN_DEFAULTS = {"": "empty", False: "off", True: "on"}
Say = Callable[[str], str]  # a text in the page's language


def page(kind: str, node: Any, title: str, say: Say) -> str:
    """The help page of one option node."""
    given = node.INPUT_TYPES()["optional"]
    inputs = [
        f"| {_name(name, options, say)} | {_words(options, say)} |" for name, (_, options) in given.items()
    ]
    mistakes = [f"- {say(line)}" for line in MISTAKES[kind]]
    return "\n".join(
        [
            f"# {say(title)}",
            "",
            say(CHAIN).replace("{what}", say(node.DESCRIPTION)),
            "",
            *_picture(kind, say),
            f"## {say('Inputs')}",
            "",
            f"| {say('input')} | {say('what it does')} |",
            "|---|---|",
            *inputs,
            "",
            f"## {say('Outputs')}",
            "",
            say("**options**, for the socket of that name."),
            "",
            f"## {say('Typical mistakes')}",
            "",
            *mistakes,
            "",
        ]
    )


def _picture(kind: str, say: Say) -> list[str]:
    words = f"*{say(PICTURES[kind])}*"
    return [f"![{say('what the numbers do')}](SpectralAdapters_Train{kind}.jpg)", "", words, ""]


def _name(name: str, options: dict[str, Any], say: Say) -> str:
    """A widget's name, and how the page calls it where that is another language's."""
    label = options.get("display_name", name.replace("_", " "))
    return name if say(label) in (label, name) else f"{name}（{say(label)}）"


def _words(options: dict[str, Any], say: Say) -> str:
    tip = say(options["tooltip"])
    if "default" not in options:
        return tip
    default = options["default"]
    is_said = default == "" or isinstance(default, bool)
    shown = say(SHOWN_DEFAULTS[default]) if is_said else str(default)
    return say("{tip} Default: {value}.").replace("{tip}", tip).replace("{value}", shown)


def pages(say: Say = str) -> dict[str, str]:
    """Node -> text."""
    pack = load_pack()
    found = {}
    for kind in KINDS:
        name = f"SpectralAdapters_Train{kind}"
        found[name] = page(kind, pack.NODE_CLASS_MAPPINGS[name], pack.NODE_DISPLAY_NAME_MAPPINGS[name], say)
    return found


def texts() -> set[str]:
    """Every English text of these pages."""
    asked: set[str] = set()

    def say(text: str) -> str:
        asked.add(text)
        return text

    pages(say)
    return asked


def translated(language: str) -> dict[str, str]:
    """Node -> text in another language; what has no translation stays English."""
    known = memory(language)
    return pages(lambda text: known.get(text, text))


def main() -> None:
    for name, text in pages().items():
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")
    for language in languages():
        for name, text in translated(language).items():
            (FOLDER / name).mkdir(exist_ok=True)
            (FOLDER / name / f"{language}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
