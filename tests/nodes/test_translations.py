"""The page's other languages have a text for every English one, and no more."""

from __future__ import annotations

import json
import re

import pytest

from tests.nodes.conftest import Pack
from tools import node_locales, option_pages


@pytest.mark.parametrize("language", node_locales.languages())
def test_a_second_language_is_complete(ours: Pack, language: str) -> None:
    table = node_locales.locale(ours.root.NODE_CLASS_MAPPINGS, ours.root.NODE_DISPLAY_NAME_MAPPINGS)
    of_nodes, of_page, of_help = node_locales.texts(table), node_locales.page_words(), option_pages.texts()
    known, wanted = node_locales.memory(language), of_nodes | of_page | of_help
    assert not wanted - set(known), f"tools/translations/{language}.json lacks these"
    assert not set(known) - wanted, (
        f"tools/translations/{language}.json has these, which nothing says any more"
    )
    assert all(text.strip() for text in known.values())
    stored = json.loads(node_locales.target(language).read_text(encoding="utf-8"))
    assert stored == node_locales.translated(table, known), "run: python tools/node_locales.py"
    for text in (known[english] for english in of_nodes):
        assert not set("{}@|") & set(text), f"{text!r}: the page's translator reads these signs as its own"
        assert len(text) < 400


@pytest.mark.parametrize("language", node_locales.languages())
def test_the_pages_own_words_are_translated_with_the_same_values(language: str) -> None:
    words = node_locales.page_words()
    assert len(words) > 80
    stored = json.loads(node_locales.target(language, "main").read_text(encoding="utf-8"))
    assert set(stored[node_locales.SECTION]) == words, "run: python tools/node_locales.py"
    for english, text in stored[node_locales.SECTION].items():
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", text)), text


def test_the_page_says_nothing_that_is_not_marked_for_translation() -> None:
    said = re.compile(
        r"""(?:title|alt|placeholder|"aria-label"): "[A-Za-z]|textContent = "[A-Za-z]|say\("|\}, "[A-Za-z+]"""
    )
    for path in [*node_locales.PAGE.glob("*.js"), *node_locales.PAGE.glob("lib/*.mjs")]:
        assert not said.findall(path.read_text(encoding="utf-8")), path.name
