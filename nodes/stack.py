"""Adapter Stack: many adapter files in one node, each with its strengths and a schedule; a list comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import inputs, results

LORA = "lora:"  # before the name of a file in models/loras
OFF = "#"
_PARTS = "file | strength_model | strength_clip | schedule"


@dataclass(frozen=True)
class Row:
    """One line of the stack. ``schedule``: a curve's name, points such as 0:1, 1:0, or empty."""

    file: str
    strength_model: float = 1.0
    strength_clip: float = 1.0
    schedule: str = ""
    is_on: bool = True


def read_rows(text: str) -> list[Row]:
    """The lines of the widget. Raises SpectralAdapterError that quotes the line that cannot be read."""
    return [_row(line.strip(), n + 1) for n, line in enumerate(text.splitlines()) if line.strip()]


def _row(line: str, number: int) -> Row:
    from ..spectral_core.errors import SpectralAdapterError

    parts = [part.strip() for part in line.removeprefix(OFF).split("|")]
    file, first, second, schedule = (*parts, "", "", "")[:4]
    try:
        model = float(first or 1)
        clip = float(second or model)
    except ValueError:
        model = clip = float("nan")
    if not file or len(parts) > 4 or not (abs(model) <= 100 and abs(clip) <= 100):
        raise SpectralAdapterError(
            f"line {number}, {line!r:.120}: expected {_PARTS}, such as bot.safetensors | 0.8 | 0.5 | bell; "
            f"all but the file may be left out, and a {OFF} before it turns the line off"
        )
    return Row(file, model, clip, schedule, not line.startswith(OFF))


class AdapterStack:
    """Rows of adapter files, switched on and off, in an order, as a list of ADAPTERs."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Many adapters in one node: each row has a file, its strengths for model and text encoder, and when "
        "in the denoising it acts. Rows can be switched off. The list goes to Apply, Fuse or Distil Adapters."
    )
    SEARCH_ALIASES = ["lora stack", "power lora loader", "multi lora", "combine", "schedule", "load adapters"]
    RETURN_TYPES = (inputs.ADAPTER_LIST, "STRING", "STRING")
    RETURN_NAMES = ("adapters", "trigger words", "report")
    OUTPUT_TOOLTIPS = (
        "The adapters of the rows that are on, after those connected, each at its strength.",
        "The trigger words of these adapters, with commas between, for a prompt.",
        "What every row holds, and its strengths.",
    )
    FUNCTION = "collect"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "rows": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "One adapter in a line: its file, strength_model, strength_clip and "
                        f"schedule, with vertical bars between. {LORA} before a name takes it from "
                        f"models/loras, {OFF} turns a line off. Schedule: linear in, linear out, cosine in, "
                        "cosine out, bell, or points such as 0:1, 0.5:0.",
                    },
                )
            },
            "optional": {
                "adapters": inputs.adapter_list("Adapters collected so far; the rows are appended."),
                "model": inputs.model(
                    "Only for files that need their model to be read (compact files, unusual LoRAs); it is "
                    "not changed."
                ),
                "clip": inputs.clip("The same for the text encoder; it is not changed."),
            },
        }

    def collect(self, rows: str, adapters: Any = None, model: Any = None, clip: Any = None) -> dict[str, Any]:
        from ..spectral_core.errors import SpectralAdapterError

        chain, lines = list(results.need_adapters(adapters)), list[str]()
        self._opened = []  # held while the host keeps this node
        for row in read_rows(rows):
            if not row.is_on:
                lines.append(f"off: {row.file}")
                continue
            try:
                opened, adapter = _opened(row, model, clip)
                chain.append(_scaled(row, adapter))
            except SpectralAdapterError as error:
                raise SpectralAdapterError(f"{row.file}: {error}") from error
            self._opened.append(opened)
            lines.append(f"{row.file}: {row.strength_model:g}, {row.strength_clip:g} {row.schedule}".rstrip())
            lines += [f"  {note}" for note in opened.notes]
        if not chain:
            lines.append("no row is on: the list is empty")
        report = results.lines(*lines)
        return results.shown(report, tuple(chain), results.words_of(*chain), report)

    @classmethod
    def VALIDATE_INPUTS(cls, rows: Any = None) -> bool | str:
        from ..spectral_core.errors import SpectralAdapterError
        from .host.files import adapters as files

        if not isinstance(rows, str):
            return True
        try:
            found = [_place(row.file) for row in read_rows(rows) if row.is_on]
        except SpectralAdapterError as error:
            return str(error)
        return next(filter(None, (files.problem_with(*place) for place in found)), "") or True

    @classmethod
    def IS_CHANGED(cls, rows: Any = None, **_others: Any) -> str:
        from ..spectral_core.errors import SpectralAdapterError
        from .host.files import adapters as files

        try:
            return "\n".join(files.state_of(*_place(r.file)) for r in read_rows(rows or "") if r.is_on)
        except SpectralAdapterError as error:
            return str(error)


def _place(file: str) -> tuple[str, str]:
    """A row's file name, and which of the host's folders it is in."""
    from .host.files import paths

    is_lora = file.startswith(LORA)
    return file.removeprefix(LORA).strip(), paths.LORAS if is_lora else paths.KEY


def _opened(row: Row, model: Any, clip: Any) -> tuple[Any, Any]:
    """What holds the file's tensors, and its adapter."""
    from .host.files import adapters as files
    from .host.files import loras

    name, _ = _place(row.file)
    opened: Any
    if row.file.startswith(LORA):
        opened = loras.open_lora(name, None, model, clip)
    else:
        opened = files.open_adapter(name, model, clip)
    return opened, opened.adapter


def _scaled(row: Row, adapter: Any) -> Any:
    from ..spectral_core.adapter import schedule_words, strengths

    curve, points = (row.schedule or "constant"), ""
    if ":" in curve:
        curve, points = schedule_words.CUSTOM, curve
    window = schedule_words.named(curve, 0.0, 1.0, points)
    scaled = strengths.on_sides(adapter, row.strength_model, row.strength_clip)
    return strengths.over_denoising(scaled, window)
