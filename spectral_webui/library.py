"""Where adapters lie, what they are called in prompts, and their files read once per state.

Names are paths below their folder with ``/`` and without ``.safetensors``, as on the cards.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectral_core.adapter.adapter import Adapter
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.files.lora_import import read_lora
from spectral_core.names.unet_blocks import UNetLayout

_KEPT = 4  # adapters kept in memory
_HASH = 12  # digits in the infotext
_Stamp = tuple[str, int, int]


@dataclass(frozen=True)
class Entry:
    """A file and its name. ours: an adapter of this project, otherwise an ordinary LoRA."""

    name: str
    path: Path
    ours: bool


class Library:
    """Folders of adapters, and the host's folders of LoRAs, in which only our own files are listed."""

    def __init__(self, folders: Sequence[Path], lora_folders: Sequence[Path] = ()) -> None:
        self.folders, self.lora_folders = tuple(folders), tuple(lora_folders)
        self._ours: dict[_Stamp, bool] = {}
        self._hashes: dict[_Stamp, str] = {}
        self._adapters: OrderedDict[tuple[_Stamp, UNetLayout | None], Adapter] = OrderedDict()

    def entries(self) -> list[Entry]:
        """What cards show, by name; of two files with one name the first folder's."""
        found: dict[str, Entry] = {}
        for entry in self._all():
            if entry.ours or entry.path.is_relative_to(self.folders[0]):
                found.setdefault(entry.name, entry)
        return [found[name] for name in sorted(found, key=str.casefold)]

    def _all(self) -> Iterator[Entry]:
        for folder in (*self.folders, *self.lora_folders):
            for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
                name = path.relative_to(folder).with_suffix("").as_posix()
                if not any(part.startswith(".") for part in name.split("/")):
                    yield Entry(name, path, self._is_ours(path))

    def _is_ours(self, path: Path) -> bool:
        stamp = _stamp(path)
        if stamp not in self._ours:
            self._ours[stamp] = adapter_file.is_adapter_file(path)
        return self._ours[stamp]

    def find(self, name: str) -> Entry:
        """By its name, else by its base name. Raises SpectralAdapterError with near names."""
        wanted = name.replace("\\", "/").strip().removesuffix(".safetensors")
        entries = list(self._all())
        for match in (
            [e for e in entries if e.name == wanted],
            [e for e in entries if e.name.casefold() == wanted.casefold()],
            [e for e in entries if e.name.rpartition("/")[2] == wanted.rpartition("/")[2]],
        ):
            if match:
                return match[0]
        offered = [e.name for e in entries]
        near = difflib.get_close_matches(wanted, offered, n=3, cutoff=0.5)
        if near:
            advice = f"did you mean {' or '.join(near)}?"
        else:
            advice = f"there are {', '.join(offered[:5])}." if offered else "there are no adapters at all."
        # The end of each path only: this is written into pictures.
        looked = ", ".join("/".join(f.parts[-2:]) for f in (*self.folders, *self.lora_folders))
        raise SpectralAdapterError(f"adapter {name!r} is not there: {advice} Looked in {looked}")

    def by_hash(self, digits: str) -> Entry | None:
        """The file whose hash begins so."""
        return next((e for e in self._all() if digits and self.hash_of(e).startswith(digits)), None)

    def hash_of(self, entry: Entry) -> str:
        """The first digits of the file's SHA-256."""
        stamp = _stamp(entry.path)
        if stamp not in self._hashes:
            digest = hashlib.sha256()
            with open(entry.path, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            self._hashes[stamp] = digest.hexdigest()[:_HASH]
        return self._hashes[stamp]

    def load(self, entry: Entry, layout: UNetLayout | None = None) -> Adapter:
        """The file's adapter. layout: of the model's UNet, for LoRA files with native block names."""
        key = (_stamp(entry.path), None if entry.ours else layout)
        if key not in self._adapters:
            with torch.inference_mode(False):
                self._adapters[key] = (
                    adapter_file.load(entry.path) if entry.ours else read_lora(entry.path, layout).adapter
                )
            while len(self._adapters) > _KEPT:
                self._adapters.popitem(last=False)
        self._adapters.move_to_end(key)
        return self._adapters[key]

    def state_of(self, entry: Entry) -> _Stamp:
        """Changes when the file does."""
        return _stamp(entry.path)


def _stamp(path: Path) -> _Stamp:
    try:
        state = path.stat()
    except OSError as error:
        raise SpectralAdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    return str(path), state.st_mtime_ns, state.st_size
