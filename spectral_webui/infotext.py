"""The adapters' hashes in a picture's parameters, and tags of renamed files found again by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace

from . import request

KEY = "Spectral adapters"
PROBLEMS = "Spectral adapters problems"
_TAKEN = str.maketrans("", "", ':,"')  # what divides entries


def entry(hashes: Mapping[str, str]) -> str:
    """``name: hash, name: hash``."""
    return ", ".join(f"{name.translate(_TAKEN)}: {digits}" for name, digits in hashes.items())


def read(text: str) -> dict[str, str]:
    """Name -> hash; pieces that are none are left out."""
    pairs = (piece.partition(":") for piece in text.split(","))
    return {name.strip(): digits.strip() for name, colon, digits in pairs if colon and digits.strip()}


def pasted(parameters: MutableMapping[str, str], name_of: Callable[[str], str | None]) -> None:
    """Change the pasted prompt's tags to the names that the files with their hashes have now.

    name_of: hash -> the present name, None where there is no such file.
    """
    hashes = read(parameters.get(KEY, ""))
    if not hashes or "Prompt" not in parameters:
        return

    def renamed(found: request.Request) -> request.Request:
        digits = hashes.get(found.name.translate(_TAKEN), "")
        present = name_of(digits) if digits else None
        return replace(found, name=present) if present else found

    for key in ("Prompt", "Hires prompt"):
        if key in parameters:
            parameters[key] = request.rewritten(parameters[key], renamed)
