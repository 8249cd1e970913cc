"""The arrows between the parts, read from the syntax tree; nothing is imported.

errors <- layers, transforms, svd, ... <- gate, methods <- adapter <- attach, fusion, files, ...
       <- training <- pipelines <- cli
nodes -> nodes/host -> spectral_core, never back
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The first name below spectral_core, lowest level first. A module imports its own level and those before it.
# `svd` stands for svd.py, svd/ and svd_*.py; what is not listed works on adapters and stands with attach.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"layers", "lowrank", "products", "transforms", "svd", "cayley", "unet_layout"}),
    frozenset({"gate", "methods"}),
    frozenset({"adapter", "schedule"}),
    frozenset({"attach", "merge", "fusion", "fileformat", "lora", "keys", "analysis", "plots"}),
    frozenset({"training"}),
    frozenset({"pipelines"}),
    frozenset({"cli", "__main__"}),
)
RUNTIME = frozenset({"torch", "safetensors", "einops", "numpy", "PIL", "tqdm"})  # what every host ships
HOST = frozenset({"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server"})
HOST |= {"execution", "nodes", "node_helpers", "latent_preview", "aiohttp"}
# Optional libraries, and the only parts that may import them, inside a function.
OPTIONAL = {
    "diffusers": {"pipelines"},
    "transformers": {"pipelines"},
    "tokenizers": {"pipelines"},
    "peft": {"pipelines"},
    "accelerate": {"training", "pipelines"},
    "schedulefree": {"training"},
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


def level(part: str) -> int:
    """Where a module of the core stands; ``svd_cache`` where ``svd`` stands, unless it is listed itself."""
    for name in (part, part.split("_")[0], "attach"):
        for height, names in enumerate(LEVELS):
            if name in names:
                return height
    raise AssertionError("attach is listed")


def part_of(parts: tuple[str, ...]) -> str:
    """``("spectral_core", "svd.py")`` and ``("spectral_core", "svd", "top_r")`` -> ``"svd"``."""
    return parts[1].removesuffix(".py") if len(parts) > 1 else "__init__"


def core_violations(source: str, path: Path) -> Iterator[str]:
    """What a file of ``spectral_core`` imports and may not."""
    part = part_of(path.parts)
    own = level(part)
    for found in imports(source, path):
        where, top = f"{path}:{found.line}", found.target[0]
        if found.relative:
            yield from _arrow(found, part, own, where)
        elif top == "spectral_core":
            yield f"{where}: imports inside the package are relative"
        elif top in OPTIONAL:
            if part not in OPTIONAL[top]:
                yield f"{where}: {top} belongs to {sorted(OPTIONAL[top])} only"
            elif not found.lazy:
                yield f"{where}: {top} is optional and imported inside a function"
        elif top == "demo_model" and part == "cli" and found.lazy:
            continue  # the demo's own model and pictures, a folder beside the core
        elif top not in RUNTIME and top not in sys.stdlib_module_names:
            yield f"{where}: the core may not import {top}"


def _arrow(found: Import, part: str, own: int, where: str) -> Iterator[str]:
    if found.target[0] != "spectral_core":
        yield f"{where}: the core imports {'.'.join(found.target)}, outside of itself"
        return
    other = part_of(found.target)
    height = level(other)
    if other == part and part == "methods" and "__init__" not in where:
        if found.target[2:3] not in [("common",), ("protocol",), ()]:
            yield f"{where}: methods never import each other"
    elif height > own:
        yield f"{where}: {part} (level {own}) imports {other} (level {height}), against the arrow"


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
            elif top == "spectral_core" and part_of(found.target) == "cli":
                yield f"{where}: a node calls the core, not its commands"
        elif top in HOST:
            if not in_host:
                yield f"{where}: only nodes/host imports {top}"
        elif top in ("spectral_core", "demo_model"):
            yield f"{where}: inside the host the root is not on sys.path: import relatively"
        elif top not in RUNTIME and top not in sys.stdlib_module_names:
            yield f"{where}: a node may not import {top}"


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
