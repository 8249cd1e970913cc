"""What people read, said the same way everywhere: choices that do not exist, and values in one line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from .errors import SpectralAdapterError

Choice = TypeVar("Choice", bound=str)


def expected(word: object, known: Iterable[str]) -> str:
    """What to take instead of an unknown word: the nearest known one, and all of them.

    >>> expected("clsed-form", ["sum", "closed-form"])
    "did you mean 'closed-form'? expected one of sum, closed-form"
    """
    words = [str(each) for each in known]
    near = difflib.get_close_matches(word.lower(), words, 1) if isinstance(word, str) else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}expected one of {', '.join(words)}"


def chosen(word: object, choices: Sequence[Choice], what: str) -> Choice:
    """``word`` as one of the choices; ``what`` it chooses is named where it is none of them.

    >>> chosen("dct", ("dct", "dft"), "transform")
    'dct'
    """
    for choice in choices:
        if isinstance(word, str) and word == choice:
            return choice
    raise SpectralAdapterError(f"{what} {word!r}: {expected(word, choices)}")


class _Short(reprlib.Repr):
    """Long values by their kind and size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxtuple = self.maxlist = self.maxdict = 2

    def repr1(self, x: Any, level: int) -> str:
        if hasattr(x, "dtype") and hasattr(x, "shape"):  # a tensor; its numbers are not what one looks for
            return f"<{'×'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}>"
        if isinstance(x, Mapping) and len(x) > self.maxdict:
            return f"<{len(x)} entries>"
        if isinstance(x, list | tuple) and len(x) > 4:
            return f"<{len(x)} entries>"
        return " ".join(super().repr1(x, level).split())


class OneLine:
    """For frozen dataclasses (``repr=False``) that may hold thousands of things: ``repr()`` is one line."""

    def __repr__(self) -> str:
        short = _Short()
        shown = (f"{field.name}={short.repr(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"
