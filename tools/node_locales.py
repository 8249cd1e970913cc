#!/usr/bin/env python3
"""Write locales/<language>: names and tooltips from the node classes, the page's own words from its code.

    python tools/node_locales.py

Other languages: ``tools/translations/<language>.json`` has a text for each English one, which is said once
however often it occurs. Tests say when a file is out of date, and which texts have none.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRANSLATIONS = ROOT / "tools" / "translations"
PAGE = ROOT / "web" / "js"
SECTION = "spectral_adapters"  # of the page's words in main.json; web/js/lib/words.mjs reads it
_WORD = re.compile(r'(?<![\w.])(?:t|word)\(\s*"((?:[^"\\]|\\.)*)"')


def target(language: str, name: str = "nodeDefs") -> Path:
    return ROOT / "locales" / language / f"{name}.json"


def page_words() -> set[str]:
    """What the page's code says: the texts in ``t("…")`` and ``word("…")``."""
    files = [*PAGE.glob("*.js"), *PAGE.glob("lib/*.mjs")]
    return {json.loads(f'"{text}"') for file in files for text in _WORD.findall(file.read_text("utf-8"))}


def languages() -> list[str]:
    """Those besides English."""
    return sorted(path.stem for path in TRANSLATIONS.glob("*.json"))


def texts(table: Any) -> set[str]:
    """Every text of a table."""
    return set().union(*map(texts, table.values())) if isinstance(table, dict) else {table}


def memory(language: str) -> dict[str, str]:
    """English text -> its translation."""
    found: dict[str, str] = json.loads((TRANSLATIONS / f"{language}.json").read_text(encoding="utf-8"))
    return found


def translated(table: Any, known: dict[str, str]) -> Any:
    """The table in another language; a text without a translation stays English."""
    if isinstance(table, dict):
        return {key: translated(value, known) for key, value in table.items()}
    return known.get(table, table)


def locale(classes: dict[str, type], display_names: dict[str, str]) -> dict[str, Any]:
    """The page's table: node id -> names and tooltips of the node, its inputs and outputs."""
    return {name: _node(node, display_names[name]) for name, node in sorted(classes.items())}


def _node(node: Any, display_name: str) -> dict[str, Any]:
    types = node.INPUT_TYPES()
    inputs = {**types.get("required", {}), **types.get("optional", {})}
    outputs = zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
    return {
        "display_name": display_name,
        "description": node.DESCRIPTION,
        "inputs": {
            name: {
                "name": options.get("display_name", name.replace("_", " ")),
                "tooltip": options["tooltip"],
            }
            for name, (_, options) in inputs.items()
        },
        "outputs": {str(i): {"name": name, "tooltip": tip} for i, (name, tip) in enumerate(outputs)},
    }


def as_text(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def load_pack() -> Any:
    """The pack, imported as the host does it."""
    spec = importlib.util.spec_from_file_location("pack_for_locales", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    pack = load_pack()
    nodes = locale(pack.NODE_CLASS_MAPPINGS, pack.NODE_DISPLAY_NAME_MAPPINGS)
    target("en").write_text(as_text(nodes), encoding="utf-8")
    page = {SECTION: {text: text for text in sorted(page_words())}}
    for language in languages():
        known = memory(language)
        target(language).parent.mkdir(parents=True, exist_ok=True)
        target(language).write_text(as_text(translated(nodes, known)), encoding="utf-8")
        target(language, "main").write_text(as_text(translated(page, known)), encoding="utf-8")
        missing = sorted((texts(nodes) | page_words()) - set(known))
        print(f"{language}: {len(nodes)} nodes, {len(missing)} texts are still English")
        for text in missing:
            print(f"  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
