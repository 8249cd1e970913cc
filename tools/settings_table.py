"""Write the table of settings in docs/training.md from the dataclasses where they are kept.

    python -m tools.settings_table

A test says when it is out of date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_core.pipelines.job import Job
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.config.setting import Setting, settings_of
from spectral_core.training.engine.named_run import Output

TARGET = Path(__file__).resolve().parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- settings -->\n", "<!-- /settings -->\n"
GROUPS = ("adapter", "run", "pictures", "optimiser", "noise", "gate", "text encoder")
GROUPS += ("memory", "regularisation", "validation")


def table() -> str:
    """The settings by group, as Markdown."""
    rows = settings_of(Job, TrainConfig, Output).values()
    assert {row.words.group for row in rows} == set(GROUPS)
    parts = []
    for group in GROUPS:
        lines = [_line(row) for row in rows if row.words.group == group]
        parts.append(f"\n| {group} | default | values |\n|---|---|---|\n" + "\n".join(lines) + "\n")
    return "".join(parts) + "\n"


def _line(row: Setting) -> str:
    values = ", ".join(row.choices) or row.range
    of = f" ({', '.join(row.words.methods)})" if row.words.methods else ""
    return f"| `{row.name}` {row.short_help}{of} | {_shown(row.default)} | {values} |"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else value or "none"


def written(text: str) -> str:
    """The page with the table as it is now."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:begin] + table() + text[end:]


def main() -> None:
    TARGET.write_text(written(TARGET.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
