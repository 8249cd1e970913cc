"""Names of files as workflows hold them: made safe, compared, and explained when nothing has them."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import PurePosixPath

from ....spectral_core.errors import SpectralAdapterError

_KEPT = 1024

# For the whole process on purpose: prompts bring what their files' contents were, loaders look it up. A name
# may have been used for several files; the last prompt counts.
_DIGESTS: OrderedDict[str, str] = OrderedDict()
_SHA256 = re.compile(r"[0-9a-f]{64}")


def safe_parts(name: str, what: str = "adapter") -> list[str]:
    r"""The folders and the base name of a relative name; ``\`` and ``/`` both divide.

    Raises SpectralAdapterError for an empty name, an absolute one, and one with ``..``.
    """
    shown = f"{what} {name!r:.200}"
    if not isinstance(name, str) or "\0" in name:
        raise SpectralAdapterError(f"{shown}: expected the name of a file")
    slashed = name.replace("\\", "/")
    if slashed.startswith("/") or re.match(r"[A-Za-z]:", slashed):
        raise SpectralAdapterError(
            f"{shown}: is an absolute path; expected a name relative to its folder, such as sub/name"
        )
    parts = [part for part in slashed.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise SpectralAdapterError(f"{shown}: '..' leaves the folder; expected a name inside it")
    if not "".join(parts).strip():
        raise SpectralAdapterError(f"{shown}: is empty; expected a name")
    return parts


def key_of(name: str) -> str:
    """One spelling for both slashes."""
    return name.replace("\\", "/").removeprefix("./")


def with_base(wanted: str, offered: Sequence[str]) -> list[str]:
    """The offered names with the same base name; without regard to case where no other has it."""
    base = wanted.rpartition("/")[2]
    same = [name for name in offered if name.rpartition("/")[2] == base]
    return same or [name for name in offered if name.rpartition("/")[2].casefold() == base.casefold()]


def missing(wanted: str, same_base: Sequence[str], offered: Sequence[str], folders: Sequence[str]) -> str:
    """What to say when a name stands for no file, or for several."""
    if same_base:
        return (
            f"file {wanted!r} is not there, and {len(same_base)} files have its base name: "
            f"{', '.join(same_base)}. Choose one of them"
        )
    by_stem = {PurePosixPath(name).stem: name for name in reversed(offered)}
    near = difflib.get_close_matches(PurePosixPath(wanted).stem, by_stem, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(by_stem[stem] for stem in near)}?" if near else ""
    if not advice:
        some = ", ".join(offered[:5]) + (", …" if len(offered) > 5 else "")
        advice = f"there are {some}." if offered else "there are no files at all."
    searched = ", ".join(folders) or "no folder: this is not the host"
    return f"file {wanted!r} is not there: {advice} Looked in {searched}; after adding it, refresh (key r)"


def remember_digest(name: object, digest: object) -> None:
    """Note what a workflow says about a file's content (SHA-256); anything else is ignored."""
    if isinstance(name, str) and isinstance(digest, str) and _SHA256.fullmatch(digest.lower()):
        _DIGESTS[key_of(name)] = digest.lower()
        _DIGESTS.move_to_end(key_of(name))
        while len(_DIGESTS) > _KEPT:
            _DIGESTS.popitem(last=False)


def wanted_digest(name: str) -> str:
    """What the last prompt said about the content of the file of this name; empty where it said nothing."""
    return _DIGESTS.get(key_of(name), "")
