"""A setting: a dataclass field that says its range, its words and where it is offered.

A dataclass whose fields are made by :func:`setting` is a part of the table of all settings. From it come the
check of the values, the command's options, the configuration file's check, the nodes' widgets, their
translations and the table in the documentation. Types and choices are the fields' annotations.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...errors import SpectralAdapterError
from ...words import chosen

_KEY = "setting"
Ends = Literal["[]", "[)", "(]", "()"]


@dataclass(frozen=True)
class Words:
    """What a field's annotation does not say; see :func:`setting`."""

    help: str
    group: str
    least: float | None
    most: float | None
    ends: Ends
    step: float
    methods: tuple[str, ...]
    label: str
    metavar: str
    command_only: bool
    advanced: bool


def setting(
    default: Any,
    help: str,
    group: str,
    *,
    least: float | None = None,
    most: float | None = None,
    ends: Ends = "[]",
    step: float = 0.0,
    methods: Sequence[str] = (),
    label: str = "",
    metavar: str = "",
    command_only: bool = False,
    advanced: bool = False,
) -> Any:
    """A dataclass field that is a setting.

    help: its first sentence stands in the command's help and in the documentation, all of it in the node's
    tooltip. group: the part of the command's help and the option node. least, most, ends: the range, ``)``
    and ``(`` exclude an end; of a tuple, of each of its numbers. step: of the widget. methods: those that
    read it, none for all. label: the widget's words, by default the name. metavar: stands for its value in
    the command's help. command_only: no node offers it. advanced: few set it.
    """
    words = Words(
        help, group, least, most, ends, step, tuple(methods), label, metavar, command_only, advanced
    )
    return field(default=default, metadata={_KEY: words})


def like(cls: type[Any], name: str, default: Any) -> Any:
    """The setting of another class, with another default."""
    found = next(of for of in fields(cls) if of.name == name)
    return field(default=default, metadata=dict(found.metadata))


@dataclass(frozen=True)
class Setting:
    """A row of the table. kind: bool, int, float, str or tuple. optional: None is a value.
    item, length: of a tuple, 0 for any number of them."""

    name: str
    kind: type
    item: type
    default: Any
    choices: tuple[str, ...]
    optional: bool
    length: int
    words: Words

    @property
    def short_help(self) -> str:
        return self.words.help.split(". ")[0].rstrip(".")

    @property
    def label(self) -> str:
        return self.words.label or self.name.replace("_", " ")

    @property
    def range(self) -> str:
        """The range in words; empty where there is none."""
        least, most, (first, last) = self.words.least, self.words.most, self.words.ends
        low = "" if least is None else f"{least:g} {'≤' if first == '[' else '<'} "
        high = "" if most is None else f" {'≤' if last == ']' else '<'} {most:g}"
        if low and high:
            return f"{low}x{high}"
        if least is not None:
            return f"at least {least:g}" if first == "[" else f"above {least:g}"
        return "" if most is None else f"at most {most:g}" if last == "]" else f"below {most:g}"

    def check(self, value: Any) -> None:
        """SpectralAdapterError, naming the setting, for a value that it cannot have."""
        if value is None and self.optional:
            return
        if self.choices:
            one_of(self.name, value, self.choices)
        elif self.kind is tuple:
            if not isinstance(value, tuple) or (self.length and len(value) != self.length):
                raise self._wrong(value)
            for number in value if self.words.least is not None else ():
                self._check_number(number, value)
        elif self.kind in (int, float):
            self._check_number(value, value)
        elif not isinstance(value, self.kind):
            raise self._wrong(value)

    def _check_number(self, number: Any, value: Any) -> None:
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise self._wrong(value)
        if self.kind is int and not isinstance(number, int):
            raise self._wrong(value)
        least, most, (first, last) = self.words.least, self.words.most, self.words.ends
        too_low = least is not None and (number < least or (first == "(" and number == least))
        too_high = most is not None and (number > most or (last == ")" and number == most))
        if too_low or too_high:
            raise self._wrong(value)

    def _wrong(self, value: Any) -> SpectralAdapterError:
        what = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        of = f"{self.length} numbers" if self.length else "several values"
        expected = what.get(self.kind, of)
        if self.range:
            expected += (" of " if self.range.startswith("at ") else ", ") + self.range
        return SpectralAdapterError(
            f"{self.name} {value!r}: expected {expected}{', or nothing' if self.optional else ''}"
        )


def settings_of(*classes: type[Any]) -> dict[str, Setting]:
    """Name -> row of the classes' settings; what a later class says of a name goes first."""
    found: dict[str, Setting] = {}
    for cls in classes:
        hints = get_type_hints(cls)
        for of in fields(cls):
            if _KEY in of.metadata:
                found[of.name] = _row(of.name, hints[of.name], of.default, of.metadata[_KEY])
    return found


def _row(name: str, hint: Any, default: Any, words: Words) -> Setting:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [of for of in get_args(hint) if of is not type(None)]
        assert len(inner) == 1, (name, hint)
        hint, optional = inner[0], True
    if get_origin(hint) is Literal:
        return Setting(name, str, str, default, get_args(hint), optional, 0, words)
    if get_origin(hint) is tuple:
        inside = get_args(hint)
        length = 0 if Ellipsis in inside else len(inside)
        return Setting(name, tuple, inside[0], default, (), optional, length, words)
    assert hint in (bool, int, float, str), (name, hint)
    return Setting(name, hint, hint, default, (), optional, 0, words)


def check_settings(values: Any) -> None:
    """Every setting of a frozen dataclass; lists become tuples first."""
    for name, row in settings_of(type(values)).items():
        if row.kind is tuple and isinstance(getattr(values, name), list):
            object.__setattr__(values, name, tuple(getattr(values, name)))
        row.check(getattr(values, name))


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """SpectralAdapterError, with the nearest word, unless ``value`` is one of the choices."""
    chosen(value, choices, name)
