"""The page's other languages have a text for every English one, and no more."""

from __future__ import annotations

import json

import pytest

from tests.nodes.conftest import Pack
from tools import node_locales


@pytest.mark.parametrize("language", node_locales.languages())
def test_a_second_language_is_complete(ours: Pack, language: str) -> None:
    table = node_locales.locale(ours.root.NODE_CLASS_MAPPINGS, ours.root.NODE_DISPLAY_NAME_MAPPINGS)
    known, wanted = node_locales.memory(language), node_locales.texts(table)
    assert not wanted - set(known), f"tools/translations/{language}.json lacks these"
    assert not set(known) - wanted, (
        f"tools/translations/{language}.json has these, which nothing says any more"
    )
    assert all(text.strip() for text in known.values())
    stored = json.loads(node_locales.target(language).read_text(encoding="utf-8"))
    assert stored == node_locales.translated(table, known), "run: python tools/node_locales.py"
    for text in known.values():
        assert not set("{}@|") & set(text), f"{text!r}: the page's translator reads these signs as its own"
        assert len(text) < 400
