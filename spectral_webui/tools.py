"""Fuse, report and export by the names of files: what the tab and the routes do, without the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from spectral_core.adapter.adapter import Adapter
from spectral_core.analysis import findings, findings_picture, overlap_picture
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.files.lora_export import export_lora
from spectral_core.fusion import FUSIONS, fuse
from spectral_core.names.unet_blocks import UNetLayout

from .library import Library

METHODS = tuple(name for name, fusion in FUSIONS.items() if not fusion.needs_statistics)
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_FORBIDDEN = set('<>:"|?*\\')


@dataclass(frozen=True)
class FuseSettings:
    """weights: none, or one for each name. rank 0: everything is kept. prompts: a line for each name, for
    what looks at layers. name: of the new file. size: (width, height) of what is drawn to look at layers,
    None for the model's own."""

    names: Sequence[str]
    weights: Sequence[float] = ()
    method: str = "sum"
    rank: int = 0
    freeze_gates: bool = False
    prompts: str = ""
    name: str = ""
    size: tuple[int, int] | None = None

    def weight_of_each(self) -> list[float]:
        """1 where none is given. Raises SpectralAdapterError for another number of them."""
        if len(self.names) < 2:
            raise SpectralAdapterError(f"found {len(self.names)} adapters to fuse, expected two or more")
        if self.weights and len(self.weights) != len(self.names):
            raise SpectralAdapterError(
                f"found {len(self.weights)} weights for {len(self.names)} adapters: expected one each"
            )
        return list(self.weights) or [1.0] * len(self.names)


def fused(library: Library, asked: FuseSettings) -> tuple[str, str, Image.Image]:
    """Fuse files to a new one in the library's first folder: its name, the report, the overlap picture."""
    given = asked.weight_of_each()
    if asked.method not in METHODS:
        raise SpectralAdapterError(f"method {asked.method!r}: expected one of {', '.join(METHODS)}")
    with torch.inference_mode(False), torch.no_grad():
        adapters = [_loaded(library, each) for each in asked.names]
        path = new_file(library.folders[0], asked.name or "fused")
        result = fuse(
            adapters,
            asked.method,
            given,
            rank=asked.rank or None,
            freeze_gates=asked.freeze_gates,
            name=path.stem,
        )
        adapter_file.save(result.adapter, path)
        found = overlap_picture.examine(adapters, given)
        picture = overlap_picture.draw(adapters, found, result.report)
    shown = shown_name(path, library)
    text = "\n".join([f"saved as {shown}", result.report.text, *(f"before: {w}" for w in found.warnings)])
    return shown, text, picture


def shown_name(path: Path, library: Library) -> str:
    """As on the cards."""
    return path.relative_to(library.folders[0]).with_suffix("").as_posix()


def report(library: Library, name: str) -> tuple[str, Image.Image]:
    """What there is to say about a file, in words and as a picture."""
    with torch.inference_mode(False), torch.no_grad():
        found = findings.examine(_loaded(library, name))
        return findings.text(found), findings_picture.draw(found)


def exported(
    library: Library,
    name: str,
    folder: Path,
    precision: str = "fp16",
    drop_schedule: bool = False,
    layout: UNetLayout | None = None,
) -> tuple[Path, str]:
    """Write a file as an ordinary LoRA into ``folder``; layout: of the model that is loaded."""
    if precision not in PRECISIONS:
        raise SpectralAdapterError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    with torch.inference_mode(False), torch.no_grad():
        adapter = _loaded(library, name)
        path = new_file(folder, name.rpartition("/")[2] + "_lora")
        done = export_lora(
            adapter,
            path,
            "kohya",
            PRECISIONS[precision],
            drop_schedule=drop_schedule,
            layout=layout,
            words=bool(adapter.tokens),
        )
    return path, str(done)


def _loaded(library: Library, name: str) -> Adapter:
    return library.load(library.find(name))


def file_name(name: str, folder: Path) -> str:
    """A name with its folders below ``folder``. Raises SpectralAdapterError for one that leaves it."""
    wanted = name.replace("\\", "/").strip().removesuffix(".safetensors")
    parts = [part for part in wanted.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or wanted.startswith("/") or set(wanted) & _FORBIDDEN:
        raise SpectralAdapterError(f"name {name!r}: expected a file name, with / for folders below {folder}")
    return "/".join(parts)


def new_file(folder: Path, name: str) -> Path:
    """A free name below ``folder``."""
    stem = folder.joinpath(*file_name(name, folder).split("/"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    path, number = stem.with_name(stem.name + ".safetensors"), 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}_{number}.safetensors"), number + 1
    return path


def card(library: Library, name: str) -> dict[str, object]:
    """What a card says: method, family, trigger words, rank; read from the file's header."""
    entry = library.find(name)
    if not entry.ours:
        return {"methods": ["lora"], "family": "", "words": [], "description": "LoRA", "metadata": {}}
    found = adapter_file.inspect(entry.path)
    words = list(dict.fromkeys([*found.trigger_words, *found.tokens]))
    low, high = found.ranks
    said = [", ".join(found.methods), f"rank {low}" if low == high else f"rank {low} to {high}"]
    said += [found.family] if found.family else []
    said += [f"words: {', '.join(words)}"] if words else []
    metadata = {key: value for key, value in found.metadata.items() if len(value) < 2000}
    return {
        "methods": list(found.methods),
        "family": found.family,
        "words": words,
        "description": ". ".join(said),
        "metadata": metadata,
    }
