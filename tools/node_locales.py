#!/usr/bin/env python3
"""Write locales/en/nodeDefs.json from the node classes, where names and tooltips are kept.

    python tools/node_locales.py

Other languages are translations of that file. A test says when it is out of date.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "locales" / "en" / "nodeDefs.json"


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
    text = as_text(locale(pack.NODE_CLASS_MAPPINGS, pack.NODE_DISPLAY_NAME_MAPPINGS))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {len(pack.NODE_CLASS_MAPPINGS)} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
