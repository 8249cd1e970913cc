"""The arrows between the rooms, read from the syntax tree; nothing is imported.

A room imports itself and the rooms before it in its list, whether for the type checker, inside a function or
at the top; and no module imports itself by way of others.

nodes -> nodes/host -> spectral_core, never back; spectral_webui -> spectral_core
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Folders (and the modules that stand alone), each importing only what stands before it.
CORE = ("errors", "words", "whole_file", "maths", "names", "gates", "methods", "adapter", "plots", "files")
CORE += ("attach", "statistics", "fusion", "analysis", "training", "pipelines", "demo", "cli", "__main__")
TRAINING = ("config", "data", "objectives", "runs", "engine")
IN_HOST = ("model", "files", "apply", "training", "fusing", "page", "demo", "startup")  # below nodes/host
WEBUI = ("request", "infotext", "library", "freezing", "open_clip", "places", "pipeline", "active")
WEBUI += ("a1111", "forge", "tools", "jobs", "training", "extension", "work", "folders", "page", "api")
WEBUI += ("tab", "registration")
# imported inside functions
WEBUI_HOST = frozenset({"modules", "modules_forge", "backend", "gradio", "fastapi", "open_clip"})
APART = {("demo", room) for room in IN_HOST[1:5]}  # nodes/host/demo builds on the model room alone
RUNTIME = frozenset({"torch", "safetensors", "numpy", "PIL", "tqdm", "filelock"})
HOST = frozenset({"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server"})
HOST |= {"execution", "nodes", "node_helpers", "latent_preview", "aiohttp"}
# Optional libraries, and the only parts that may import them, inside a function.
OPTIONAL = {
    "diffusers": {"pipelines"},
    "transformers": {"pipelines"},
    "tokenizers": {"pipelines"},
    "peft": {"pipelines"},
    "accelerate": {"training", "pipelines"},
    "huggingface_hub": {"pipelines"},
    "schedulefree": {"training"},
    "bitsandbytes": {"training"},
    "prodigyopt": {"training"},
}
PICKLES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})


@dataclass(frozen=True)
class Import:
    """One imported name. ``target`` starts at the repository root for a relative import."""

    target: tuple[str, ...]
    relative: bool
    lazy: bool  # inside a function, or for the type checker only
    line: int


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inner = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        inner = inner or _is_type_checking(child)
        yield child, inner
        yield from _walk(child, inner)


def imports(source: str, path: Path) -> Iterator[Import]:
    """Every import of the file ``path`` (from the root); ``from x import a, b`` counts for each name."""
    for node, lazy in _walk(ast.parse(source), False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(tuple(alias.name.split(".")), False, lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            stem = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield Import((*stem, alias.name), node.level > 0, lazy, node.lineno)


def room_of(parts: tuple[str, ...], depth: int = 1) -> str:
    """The room below ``depth`` folders; ``""`` for the front door of these folders."""
    found = parts[depth].removesuffix(".py") if len(parts) > depth else ""
    return "" if found == "__init__" else found


def against(own: str, other: str, rooms: tuple[str, ...]) -> str | None:
    """Why a module of one room may not import another; None where it may."""
    if own == other or own == "" or other == "":  # a front door shows the rooms behind it
        return None
    missing = [room for room in (own, other) if room not in rooms]
    if missing:
        return f"{missing[0]} is no room of {', '.join(rooms)}"
    if rooms.index(other) > rooms.index(own):
        return f"{own} imports {other}, against the arrow"
    return None


def core_violations(source: str, path: Path) -> Iterator[str]:
    """What a file of ``spectral_core`` imports and may not."""
    part = room_of(path.parts)
    for found in imports(source, path):
        where, top = f"{path}:{found.line}", found.target[0]
        if found.relative:
            yield from _arrow(found, path, where)
        elif top == "spectral_core":
            yield f"{where}: imports inside the package are relative"
        elif top in OPTIONAL:
            if part not in OPTIONAL[top]:
                yield f"{where}: {top} belongs to {sorted(OPTIONAL[top])} only"
            elif not found.lazy:
                yield f"{where}: {top} is optional and imported inside a function"
        elif top == "demo_model" and part == "demo" and found.lazy:
            continue  # the demo's own model and pictures, a folder beside the core
        elif top not in RUNTIME and top not in sys.stdlib_module_names:
            yield f"{where}: the core may not import {top}"


def _arrow(found: Import, path: Path, where: str) -> Iterator[str]:
    if found.target[0] != "spectral_core":
        yield f"{where}: the core imports {'.'.join(found.target)}, outside of itself"
        return
    part, other = room_of(path.parts), room_of(found.target)
    if other == part == "methods" and path.name != "__init__.py":
        if found.target[2:3] not in [("common",), ("protocol",), ()]:
            yield f"{where}: methods never import each other"
    elif why := against(part, other, CORE):
        yield f"{where}: {why}"
    elif other == part == "training" and (
        why := against(room_of(path.parts, 2), room_of(found.target, 2), TRAINING)
    ):
        yield f"{where}: training: {why}"


def node_violations(source: str, path: Path) -> Iterator[str]:
    """What a file of ``nodes`` imports and may not."""
    in_host = path.parts[:2] == ("nodes", "host")
    for found in imports(source, path):
        where, top = f"{path}:{found.line}", found.target[0]
        if found.relative:
            if top not in ("nodes", "spectral_core"):
                yield f"{where}: nodes import spectral_core and each other, not {top}"
            elif in_host and top == "nodes" and found.target[1:2] != ("host",):
                yield f"{where}: nodes/host imports the core, never a node"
            elif top == "spectral_core" and room_of(found.target) in ("cli", "demo"):
                yield f"{where}: a node calls the core, not its commands"
            elif in_host and top == "nodes":
                own, other = room_of(path.parts, 2), room_of(found.target, 2)
                why = against(own, other, IN_HOST)
                if why or (own, other) in APART:
                    yield f"{where}: nodes/host: {why or f'{own} imports {other}'}"
        elif top in HOST:
            if not in_host:
                yield f"{where}: only nodes/host imports {top}"
        elif top in ("spectral_core", "demo_model"):
            yield f"{where}: inside the host the root is not on sys.path: import relatively"
        elif top not in RUNTIME and top not in sys.stdlib_module_names:
            yield f"{where}: a node may not import {top}"


def webui_violations(source: str, path: Path) -> Iterator[str]:
    """What a file of ``spectral_webui`` imports and may not; it takes the core by its absolute name."""
    part = room_of(path.parts)
    for found in imports(source, path):
        where, top = f"{path}:{found.line}", found.target[0]
        if found.relative:
            if top != "spectral_webui":
                yield f"{where}: outside of itself it imports by absolute names, not {'.'.join(found.target)}"
            elif why := against(part, room_of(found.target), WEBUI):
                yield f"{where}: {why}"
        elif top in WEBUI_HOST:
            if not found.lazy:
                yield f"{where}: {top} is the host's and imported inside a function"
        elif top == "spectral_core":
            if room_of(found.target) in ("cli", "demo"):
                yield f"{where}: the webui calls the core, not its commands"
        elif top not in RUNTIME and top not in sys.stdlib_module_names:
            yield f"{where}: the webui may not import {top}"


def cycles(sources: Mapping[Path, str]) -> Iterator[str]:
    """Modules that import themselves by way of others, whatever kind of import it is."""
    modules = {path.with_suffix("").parts: path for path in sources}
    modules |= {path.parent.parts: path for path in sources if path.name == "__init__.py"}
    arrows: dict[Path, set[Path]] = {path: set() for path in sources}
    for path, source in sources.items():
        for found in imports(source, path):
            # ``from a.b import c``: c is a module of b, or a name in it.
            target = modules.get(found.target) or modules.get(found.target[:-1])
            if found.relative and target is not None and target != path:
                arrows[path].add(target)
    left = set(arrows)
    while free := {path for path in left if not arrows[path] & left}:  # those that nothing left holds up
        left -= free
    while idle := {path for path in left if not any(path in arrows[other] for other in left)}:
        left -= idle  # what only leads to a cycle
    if left:
        yield "import cycle among " + ", ".join(sorted(str(path) for path in left))


def danger(source: str, path: Path) -> Iterator[str]:
    """eval, exec, pickles and catch-alls, which neither the core nor the nodes may contain."""
    for found in imports(source, path):
        if not found.relative and found.target[0] in PICKLES:
            yield f"{path}:{found.line}: {found.target[0]}: no pickle, ever"
        if found.target[:2] == ("torch", "load"):
            yield f"{path}:{found.line}: torch.load reads pickles; use safetensors"
    for node in ast.walk(ast.parse(source)):
        line = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__"):
                yield f"{line}: {called}() is refused by the registry"
            if called in ("torch.load", "th.load", "torch.serialization.load"):
                yield f"{line}: torch.load reads pickles; use safetensors"
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                yield f"{line}: allow_pickle"
        if isinstance(node, ast.ExceptHandler) and _swallows_everything(node):
            yield f"{line}: a catch-all that does not raise again"


def _swallows_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is not None and ast.unparse(handler.type) not in ("Exception", "BaseException"):
        return False
    return not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(handler))
