"""The option nodes of Train Adapter: one for each group of the settings, chained into one socket.

What a node gives out is a plain dictionary of settings. Of a setting in several nodes the last one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import inputs, train_inputs

Options = dict[str, Any]
_ON_THE_NODE = ("method", "rank", "steps", "sample_every")
_FOLDERS = ("prior_images", "validation_images")
# Stored workflows know a widget by its place: these come last.
_LATER: tuple[str, ...] = ("gate_budget", "compare_ungated")
_LATER += ("class_words", "preserve_prompts", "preserve_every", "preserve_weight", "offload", "sample_prompt")


class _TrainOptions:
    """Widgets from the table of settings; ``GROUPS`` says which."""

    CATEGORY = inputs.CATEGORY
    GROUPS: tuple[str, ...]
    SEARCH_ALIASES = ["training options", "train lora", "finetune", "spectral adapters"]
    RETURN_TYPES = (train_inputs.OPTIONS,)
    RETURN_NAMES = ("options",)
    OUTPUT_TOOLTIPS = ("For the socket options of Train Adapter, or of another one of these nodes.",)
    FUNCTION = "collect"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        widgets = {}
        for row in train_inputs.rows().values():
            if row.words.group in cls.GROUPS and row.name not in _ON_THE_NODE and not row.words.command_only:
                is_folder = row.name in _FOLDERS
                widgets[row.name] = train_inputs.folder(row) if is_folder else train_inputs.widget(row)
        if "seed" in widgets:
            widgets["seed"][1].update(max=0xFFFFFFFF, control_after_generate=False)
        later = {name: widgets.pop(name) for name in _LATER if name in widgets}
        return {"required": {}, "optional": {**widgets, "options": train_inputs.options(), **later}}

    def collect(self, options: Options | None = None, **widgets: Any) -> tuple[Options]:
        return ({**(options or {}), **widgets},)


class TrainLayers(_TrainOptions):
    GROUPS = ("adapter",)
    DESCRIPTION = "Which layers of the model are trained, and what of a layer."


class TrainOptimiser(_TrainOptions):
    GROUPS = ("optimiser",)
    DESCRIPTION = "Learning rate, optimiser and seed of a training."


class TrainNoiseAndLoss(_TrainOptions):
    GROUPS = ("noise",)
    DESCRIPTION = "Which noise levels a training sees, and how the loss counts them."


class TrainGate(_TrainOptions):
    GROUPS = ("gate",)
    DESCRIPTION = "The gates of FouRA, which choose the rank for each step. Other methods have none."


class TrainTextEncoder(_TrainOptions):
    GROUPS = ("text encoder",)
    DESCRIPTION = "Training the text encoders as well: their layers, or a new word. Needs a folder of images."


class TrainMemory(_TrainOptions):
    GROUPS = ("pictures", "memory", "run")
    DESCRIPTION = "Size and number of the pictures of a step, precision and checkpoints: memory against time."


class TrainRegularisation(_TrainOptions):
    GROUPS = ("regularisation",)
    DESCRIPTION = "What keeps the model as it is besides the concept: pictures of its class, empty captions."

    @classmethod
    def VALIDATE_INPUTS(cls, prior_images: Any = None) -> bool | str:
        return folder_error([prior_images])

    @classmethod
    def IS_CHANGED(cls, prior_images: Any = None, **_others: Any) -> str:
        return folder_state([prior_images])


class TrainValidation(_TrainOptions):
    GROUPS = ("validation",)
    DESCRIPTION = (
        "Pictures that judge the training: held-out ones by their loss, with its best state and an early "
        "end, and what the samples show."
    )

    @classmethod
    def VALIDATE_INPUTS(cls, validation_images: Any = None) -> bool | str:
        return folder_error([validation_images])

    @classmethod
    def IS_CHANGED(cls, validation_images: Any = None, **_others: Any) -> str:
        return folder_state([validation_images])


def folder_error(names: list[Any]) -> bool | str:
    """True, or what is wrong with a folder among the widgets' values."""
    from ..spectral_core.errors import SpectralAdapterError
    from .host.training import data as training_data

    try:
        for name in names:
            if isinstance(name, str) and chosen(name):
                training_data.folder_named(name)
    except SpectralAdapterError as error:
        return str(error)
    return True


def folder_state(names: list[Any]) -> str:
    """Changes with the folders' files."""
    from ..spectral_core.errors import SpectralAdapterError
    from .host.training import data as training_data

    try:
        found = [name for name in names if isinstance(name, str) and chosen(name)]
        return " ".join(training_data.state_of_folder(name) for name in found)
    except SpectralAdapterError as error:
        return str(error)


def chosen(name: str) -> str:
    """A folder's name, empty for the choice of none."""
    from .host.training import data as training_data

    return "" if name == training_data.NO_FOLDER else name


def need_options(value: Any) -> Mapping[str, Any]:
    """The options that are connected. Raises SpectralAdapterError for anything else."""
    from ..spectral_core.errors import SpectralAdapterError

    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SpectralAdapterError(
            f"options is a {type(value).__name__}: expected the output of a Training node, such as Training: "
            "Optimiser"
        )
    return value
