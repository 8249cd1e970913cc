"""Options, most of them from the settings' table: one table for the command line and for configuration files.

A configuration file is JSON, or TOML where Python reads it (3.11): a flat table of the options' names with
underscores. What the command line says goes before what the file says.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SpectralAdapterError
from ..files.container import strict_json
from ..files.reading import read_text
from ..training.config.reading import reader_of
from ..training.config.setting import Setting, one_of, settings_of

MOST_TOML = 1 << 20  # letters of a file
MOST_DOTS = 100  # of a line


@dataclass(frozen=True)
class Option:
    """One option. ``read`` turns its text into the value; ``many``: it may be given several times."""

    name: str
    help: str
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    many: bool = False
    metavar: str = ""
    default: Any = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def from_settings(classes: Sequence[type[Any]], group: str) -> list[Option]:
    """The options that are these classes' settings of the group."""
    return [of_setting(row) for row in settings_of(*classes).values() if row.words.group == group]


def of_setting(row: Setting) -> Option:
    many = row.kind is tuple and row.item is str
    read = reader_of(row)
    return Option(row.name, row.short_help, read, row.choices, many, row.words.metavar, row.default)


def add_command(
    commands: Any,
    name: str,
    line: str,
    usage: str,
    description: str,
    groups: Mapping[str, Sequence[Option]],
    run: Callable[[argparse.Namespace], int],
) -> None:
    """A command that takes the options of these groups, from a file too, and tells of a run."""
    build = commands.add_parser(
        name,
        help=line,
        usage=f"python -m spectral_core {name} {usage} [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--config", type=Path, metavar="FILE", help="JSON or TOML with these options' names")
    build.add_argument(
        "--json", action="store_true", help="print every event as one JSON line instead of a bar"
    )
    for title, found in groups.items():
        add(build, title, found)
    build.set_defaults(run=run)


def given(
    namespace: argparse.Namespace, groups: Mapping[str, Sequence[Option]], needed: Sequence[str]
) -> dict[str, Any] | None:
    """The values of :func:`add_command`'s options that are given; None, said on stderr, when a needed one is
    missing."""
    values = gather(namespace, namespace.config, [option for found in groups.values() for option in found])
    if missing := [name for name in needed if name not in values]:
        print(f"error: --{' --'.join(missing)} missing; see {namespace.command} --help", file=sys.stderr)
        return None
    return values


def add(parser: argparse.ArgumentParser, title: str, options: Sequence[Option]) -> None:
    """The options as a group of the command's help. None is set unless it is given."""
    group = parser.add_argument_group(title)
    for option in options:
        said = option.help
        if option.default and option.default is not True and "default" not in said:
            said += f" (default: {_shown(option.default)})"
        shared: dict[str, Any] = {"dest": option.name, "help": said, "default": argparse.SUPPRESS}
        if isinstance(option.default, bool):
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **shared)
            continue
        if option.choices:
            shared["choices"] = option.choices
        else:
            shared["metavar"] = option.metavar or option.read.__name__.upper()
        action = "append" if option.many else "store"
        group.add_argument(option.flag, action=action, type=_typed(option.read), **shared)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader whose complaints argparse shows."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except SpectralAdapterError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    typed.__name__ = read.__name__
    return typed


def gather(namespace: argparse.Namespace, path: Path | None, options: Sequence[Option]) -> dict[str, Any]:
    """The values that are given, the command line before the file."""
    known = {option.name: option for option in options}
    found = {} if path is None else _from_file(path, known)
    return found | {name: value for name, value in vars(namespace).items() if name in known}


def _from_file(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    values = read_table(path)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name[:100], known, 1)  # it takes the square of a long one
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
            raise SpectralAdapterError(f"{path}: unknown setting {name!r}: {hint}")
        option = known[name]
        if option.choices:
            one_of(f"{path}: {name}", value, option.choices)
        values[name] = _checked(path, option, value)
    return values


def _checked(path: Path, option: Option, value: Any) -> Any:
    """A file's value in the option's type: text is read as on the command line, lists become tuples."""
    if isinstance(option.default, bool):
        if not isinstance(value, bool):
            raise SpectralAdapterError(f"{path}: {option.name} {value!r}: expected true or false")
        return value
    if option.many:
        return [option.read(str(v)) for v in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, bool) or value is None:
        raise SpectralAdapterError(f"{path}: {option.name} {value!r}: expected a number or text")
    try:
        return option.read(str(value))
    except ValueError as error:
        raise SpectralAdapterError(f"{path}: {option.name} {value!r}: {error}") from error


def read_table(path: Path) -> dict[str, Any]:
    """A JSON or TOML file's table."""
    text = read_text(path)
    try:
        values = _toml(path, text) if path.suffix == ".toml" else strict_json(text)
    except (ValueError, RecursionError) as error:
        raise SpectralAdapterError(
            f"{path}: not valid {path.suffix.lstrip('.') or 'JSON'}: {error}"
        ) from error
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise SpectralAdapterError(f"{path}: expected a table of settings")
    return values


def _toml(path: Path, text: str) -> Any:
    try:
        import tomllib
    except ImportError as error:
        raise SpectralAdapterError(
            f"{path}: TOML needs Python 3.11 or newer; write the file as JSON"
        ) from error
    if len(text) > MOST_TOML or max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
        raise SpectralAdapterError(  # Python's parser takes the square of a key's parts
            f"more than {MOST_TOML >> 20} MiB, or more than {MOST_DOTS} dots in a line; write it as JSON"
        )
    return tomllib.loads(text)
