"""Prompts of concepts: given by line, or from their own words."""

from __future__ import annotations

import pytest
import torch

from spectral_core.adapter.adapter import Adapter, Provenance
from spectral_core.errors import SpectralAdapterError
from spectral_core.statistics import prompts as concept_prompts


def adapter(words: tuple[str, ...] = (), token: str = "") -> Adapter:
    tokens = {token: {"text_encoder": torch.zeros(1, 4)}} if token else {}
    return Adapter({}, Provenance(trigger_words=words), tokens=tokens)


def test_own_words():
    assert concept_prompts.own_prompts(adapter(("cat", "kitten", "tabby"))) == (
        "a cat",
        "a picture of a kitten",
        "a cat on a white background",
        "a kitten on a dark background",
    )
    assert concept_prompts.words_of(adapter(("cat",), "<bot>")) == ("<bot>",), "what was trained counts first"
    assert concept_prompts.own_prompts(adapter()) == ()


def test_lines():
    given = [adapter(("cat",)), adapter(("dog",)), adapter()]
    read = concept_prompts.read("a red cat | a cat, \n\n a bird\n", "abc", given)
    assert read == [("a red cat", "a cat,"), concept_prompts.own_prompts(given[1]), ("a bird",)]
    assert concept_prompts.read("\na dog", "ab", given[:2])[0] == concept_prompts.own_prompts(given[0])
    assert concept_prompts.read(" \n", "abc", given)[2] == ()
    with pytest.raises(SpectralAdapterError, match=r"4 lines of prompts for 3 adapters \(a, b, c\)"):
        concept_prompts.read("a\nb\nc\nd", "abc", given)


def test_a_concept_without_words_is_named():
    concept_prompts.require([("a",), True], ["cat", "dog"], "prompts")
    with pytest.raises(SpectralAdapterError, match=r"dog names no trigger word.*line 2 of prompts"):
        concept_prompts.require([("a",), ()], ["cat", "dog"], "prompts")


def test_what_shows_a_concept_is_not_preserved():
    one = Adapter({}, Provenance(name="one", trigger_words=("dog", "sks style")))
    two = Adapter({}, Provenance(name="two"), tokens={"<b.t>": {}})
    preserve = ("a Dog on grass", "a dogwood", "in SKS style", "a <b.t>", "a <bxt>", "a house", "", "a Ring ")
    kept, notes = concept_prompts.without_concepts(preserve, [one, two], [("a dog",), ("a ring",)])
    assert kept == ("a dogwood", "a <bxt>", "a house", "")
    assert notes == [
        "not preserved, because a concept is in it: 'a Dog on grass', 'in SKS style', 'a <b.t>', 'a Ring '"
    ]
    assert concept_prompts.without_concepts(("a", ""), [two], [("b",)]) == (("a", ""), [])
