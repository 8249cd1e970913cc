"""The adapters' file hashes in saved images: put into ``extra_pnginfo`` when a prompt arrives.

A loader that the host has cached does not run, so the nodes cannot do it. What is not hashed yet is hashed
beside the loader when it runs: a prompt that only arrives reads no file. The entry is for people and for
programs that read hashes as Automatic1111 and Civitai write them (``hashes``: ``lora:<name>`` -> the first
ten digits). The same hashes go into the workflow's ``extra``, so that a workflow loaded from a picture still
finds its file when that has been renamed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ....spectral_core.errors import SpectralAdapterError
from . import names, paths
from . import parsed_cache as store

ENTRY = "spectral_adapters"

# For the whole process on purpose: prompts whose files are not all hashed, the oldest dropped first, and one
# file hashed at a time.
_WAITING: deque[dict[str, Any]] = deque(maxlen=64)
_HASHING = threading.Lock()
_WIDGETS = {  # node id -> (widget, kind of file)
    "SpectralAdapters_LoadFouRA": ("adapter_name", paths.KEY),
    "SpectralAdapters_LoadSpectralAdapter": ("adapter_name", paths.KEY),
    "SpectralAdapters_LoadLoRAAsAdapter": ("lora_name", paths.LORAS),
}


def install() -> None:
    """Have the host call :func:`on_prompt`."""
    import server

    instance = getattr(server.PromptServer, "instance", None)
    if instance is not None:
        instance.add_on_prompt_handler(on_prompt)


def on_prompt(request: Any) -> Any:
    """The request with our entry, where our loaders are in its prompt; it is returned in any case.

    The host takes what comes back for the prompt itself, so nothing that a request holds may make this fail.
    """
    if not isinstance(request, dict):
        return request
    info = _table(request, "extra_data", "extra_pnginfo")
    _learn(info)
    _fill(request)
    if _unknown(request):
        _WAITING.append(request)
    return request


def file_opened(path: Path) -> None:
    """A loader reads this file: its hash is computed beside, and put into the prompts that wait for it.

    So a prompt's files are hashed only once it runs, and neither the server nor the loader waits for it.
    """
    is_wanted = any(path in _unknown(request) for request in list(_WAITING))
    if is_wanted and not store.known_digest(path):
        threading.Thread(target=_hash, args=(path,), daemon=True).start()


def _hash(path: Path) -> None:
    try:
        with _HASHING:  # one file at a time
            store.digest(path)
    except (SpectralAdapterError, OSError, ValueError) as error:
        logging.debug("spectral adapters: no hash for %s: %s", path, error)
        return
    for request in list(_WAITING):
        _fill(request)
        if not _unknown(request):
            with contextlib.suppress(ValueError):  # another thread has taken it away
                _WAITING.remove(request)


def _unknown(request: dict[str, Any]) -> set[Path]:
    """The prompt's files whose hashes are missing still."""
    found = set()
    for name, key in files_of(request.get("prompt")):
        with contextlib.suppress(SpectralAdapterError, OSError, ValueError):
            path = paths.resolve(name, key).path
            if not store.known_digest(path):
                found.add(path)
    return found


def _fill(request: dict[str, Any]) -> None:
    """Write what is known of the prompt's files into it."""
    used = [entry for name, key in files_of(request.get("prompt")) if (entry := _entry(name, key))]
    if used:
        _write(request, {entry["name"]: entry for entry in used if entry["sha256"]})


def files_of(prompt: Any) -> Iterator[tuple[str, str]]:
    """(file name, kind) of every loader of ours in a prompt, whatever shape the prompt has."""
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
            continue
        kind = node.get("class_type")
        widget, key = _WIDGETS.get(kind, ("", "")) if isinstance(kind, str) else ("", "")
        name = node["inputs"].get(widget)
        if isinstance(name, dict):  # the host's wrapped form of a value
            name = name.get("__value__")
        if isinstance(name, str) and name not in (paths.NO_ADAPTER, paths.NO_LORA):
            yield name, key


def _entry(name: str, key: str) -> dict[str, str] | None:
    """Name, file and hash, empty where it is not known yet; None where the file cannot be found (its node
    will say so)."""
    try:
        path = paths.resolve(name, key).path
        sha256 = store.known_digest(path)
    except (SpectralAdapterError, OSError, ValueError) as error:
        logging.debug("spectral adapters: no hash for %r: %s", name, error)
        return None
    return {"name": names.key_of(name), "file": path.name, "sha256": sha256, "autov2": sha256[:10]}


def _write(request: dict[str, Any], used: dict[str, dict[str, str]]) -> None:
    info = _made_table(request, "extra_data", "extra_pnginfo")
    if info is None:
        return
    stems = {name: PurePosixPath(name).stem for name in used}
    info[ENTRY] = {
        "adapters": list(used.values()),
        "hashes": {f"lora:{stems[name]}": entry["autov2"] for name, entry in used.items()},
    }
    extra = _made_table(info, "workflow", "extra") if isinstance(info.get("workflow"), dict) else None
    if extra is not None:
        extra[ENTRY] = {name: entry["sha256"] for name, entry in used.items()}


def _learn(info: dict[str, Any]) -> None:
    """Remember what the workflow and an earlier picture's entry say about the files' contents."""
    for name, sha256 in _table(info, "workflow", "extra", ENTRY).items():
        names.remember_digest(name, sha256)
    entries = _table(info, ENTRY).get("adapters")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            names.remember_digest(entry.get("name"), entry.get("sha256"))


def _table(start: Any, *keys: str) -> dict[str, Any]:
    """The dictionary at the end of a path of keys; an empty one where anything else is on the way."""
    for key in keys:
        start = start.get(key) if isinstance(start, dict) else None
    return start if isinstance(start, dict) else {}


def _made_table(start: dict[str, Any], *keys: str) -> dict[str, Any] | None:
    """The same, made where nothing is there yet; None where something else is."""
    for key in keys:
        if start.get(key) is None:
            start[key] = {}
        start = start[key]
        if not isinstance(start, dict):
            return None
    return start
