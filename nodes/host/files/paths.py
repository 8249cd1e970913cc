"""Where adapter files lie: the folders, their list, a file by its name, and names for new files.

Adapters: ``models/spectral_adapters`` with the user's extra paths, and ``output/spectral_adapters``, where
Save Adapter writes. Outside the host there are no folders and every list is empty.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....spectral_core.errors import SpectralAdapterError
from . import examples, names
from . import parsed_cache as store

KEY = "spectral_adapters"
LORAS = "loras"
EXTENSIONS = {".safetensors"}
NO_ADAPTER = "(no adapter yet: put files into models/spectral_adapters)"
NO_LORA = "none"
UNFINISHED = "unfinished"  # a folder below output/spectral_adapters


@dataclass(frozen=True)
class Found:
    """A file, and what to tell the user where it was not simply there."""

    path: Path
    note: str = ""


def register() -> None:
    """Tell the host about our folders: a key of our own, with its extensions (a new key has none)."""
    import folder_paths

    ours = [os.path.join(folder_paths.models_dir, KEY), _saved(folder_paths)]
    known, _ = folder_paths.folder_names_and_paths.get(KEY, ([], set()))
    folders = list(dict.fromkeys([*known, *ours]))  # the user's extra_model_paths.yaml comes first
    folder_paths.folder_names_and_paths[KEY] = (folders, set(EXTENSIONS))


def _saved(folder_paths: Any) -> str:
    return os.path.join(folder_paths.get_output_directory(), KEY)


def folders(key: str = KEY) -> list[Path]:
    """The host's folders of a kind, in the order in which they are searched."""
    host = sys.modules.get("folder_paths")
    if host is None:
        return []
    found = [*host.get_folder_paths(key)]
    if key == KEY:
        found.append(_saved(host))  # the output folder may have been moved since the start
    if key in examples.FOLDERS:
        found.append(str(examples.FOLDERS[key]))
    return [Path(folder) for folder in dict.fromkeys(found)]


def listing(key: str = KEY) -> list[str]:
    """Names of the safetensors files of a kind, with ``/`` between folders."""
    host = sys.modules.get("folder_paths")
    if host is None:
        return []
    try:
        found = host.get_filename_list(key)
    except OSError:  # its cache stumbles over a folder that was removed
        found = host.get_filename_list_(key)[0]
    own = {name.replace("\\", "/") for name in found if Path(name).suffix.lower() in EXTENSIONS}
    own = {name for name in own if "/." not in f"/{name}"}  # hidden folders, such as those of trainings
    return sorted(own | examples.names(key))


def list_adapters() -> list[str]:
    """What a loader offers: the files, or one entry that says where to put them."""
    return listing() or [NO_ADAPTER]


def list_loras() -> list[str]:
    return [NO_LORA, *listing(LORAS)]


class NotHashed(SpectralAdapterError):
    """A file is told by its content only, and the contents have not been read yet."""


def resolve(name: str, key: str = KEY, may_hash: bool = False) -> Found:
    """The file that a workflow means: by its name, else by its base name, else by its content.

    may_hash: read files for their hash, which takes seconds; where nodes run, not on the event loop. Raises
    SpectralAdapterError for a name that leaves the folders, and for a file that is not there, with names that
    are near; NotHashed where only files' contents could tell and may not be read.
    """
    if name == NO_ADAPTER:
        raise SpectralAdapterError(
            "no adapter is chosen: put .safetensors files into models/spectral_adapters, refresh the page "
            "(key r) and choose one"
        )
    parts = names.safe_parts(name)
    places = folders(key)
    exact = next((path for folder in places if (path := folder.joinpath(*parts)).is_file()), None)
    if exact is not None:
        return Found(exact)
    wanted = "/".join(parts)
    offered = {shown: found for shown in listing(key) if (found := _path_of(places, shown))}
    same_base = names.with_base(wanted, list(offered))
    digest = names.wanted_digest(wanted)
    if len(same_base) > 1 and digest:
        same_base = [shown for shown in same_base if _digest(offered[shown], may_hash) == digest]
    if len(same_base) == 1:
        return Found(offered[same_base[0]], f"{wanted} is not there; {same_base[0]} has the same name")
    if digest and not same_base:
        same = next((shown for shown, path in offered.items() if _digest(path, may_hash) == digest), "")
        if same:
            note = f"{wanted} is not there; {same} has the content that the workflow names"
            return Found(offered[same], note)
    raise SpectralAdapterError(names.missing(wanted, same_base, list(offered), [str(p) for p in places]))


def _digest(path: Path, may_hash: bool) -> str:
    if may_hash:
        return store.digest(path, interrupted)
    if not (known := store.known_digest(path)):
        raise NotHashed(f"{path}: its content is compared when the node runs")
    return known


def interrupted() -> None:
    """Raises the host's interrupt where the user has pressed Stop; does nothing outside the host."""
    host = sys.modules.get("comfy.model_management")
    if host is not None:
        host.throw_exception_if_processing_interrupted()


def _path_of(places: list[Path], shown: str) -> Path | None:
    return next((path for folder in places if (path := folder / shown).is_file()), None)


def new_file(prefix: str, in_saved: bool) -> Path:
    """A free numbered name ``<prefix>_00001_.safetensors`` as the host's own savers make them.

    in_saved: below output/spectral_adapters, else below output. The folder is made. Raises
    SpectralAdapterError for a prefix that leaves it.
    """
    import folder_paths

    root = os.path.abspath(_saved(folder_paths) if in_saved else folder_paths.get_output_directory())
    parts = names.safe_parts(prefix, "file name")
    if in_saved and len(parts) > 1 and parts[0] == KEY:
        parts = parts[1:]
    try:
        os.makedirs(root, exist_ok=True)
        folder, stem, counter, *_ = folder_paths.get_save_image_path(os.path.join(*parts), root)
    except OSError as error:
        raise SpectralAdapterError(
            f"{error.filename or root}: cannot be written ({error.strerror or error}); nothing was saved"
        ) from error
    while (path := Path(folder, f"{stem}_{counter:05}_.safetensors")).exists():
        counter += 1
    return path


def runs() -> Path:
    """Where trainings keep their checkpoints: beside the adapters' folder and not in it, because the host
    lists all that is below."""
    import folder_paths

    return Path(folder_paths.get_output_directory(), f"{KEY}_runs")


def unfinished_file(run: str, step: int) -> Path:
    """Where an adapter goes that is taken from a training before its end; the loaders list it."""
    import folder_paths

    return Path(_saved(folder_paths), UNFINISHED, f"{run}-step-{step}.safetensors")


def unfinished_files(run: str) -> list[Path]:
    """Those of a run that are there."""
    folder, start = unfinished_file(run, 0).parent, f"{run}-step-"
    found = folder.glob("*.safetensors") if folder.is_dir() else ()
    return [p for p in found if p.stem.startswith(start) and p.stem.removeprefix(start).isdecimal()]


def step_of(path: Path) -> int:
    """Of an :func:`unfinished_file`."""
    return int(path.stem.rpartition("-")[2])


def finished_file(run: str) -> Path:
    """Where a run's finished adapter is, unless somebody else had the name."""
    import folder_paths

    return Path(_saved(folder_paths), f"{run}.safetensors")


def below_output(path: Path) -> str:
    """A file's name relative to the output folder, with ``/``."""
    import folder_paths

    return Path(os.path.relpath(path, folder_paths.get_output_directory())).as_posix()


def new_preview(stem: str) -> Path | None:
    """A free name in the host's folder for previews; None outside the host."""
    host = sys.modules.get("folder_paths")
    if host is None:
        return None
    folder, name, counter, *_ = host.get_save_image_path(stem, os.path.abspath(host.get_temp_directory()))
    return Path(folder, f"{name}_{counter:05}_.png")
