"""The prompts under which a concept is watched before a fusion: given ones, or made of its own words.

Given as text they are one line for each adapter, in their order, with ``|`` between several prompts of one
concept; an empty or missing line means the adapter's own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError

TEMPLATES = ("a {}", "a picture of a {}", "a {} on a white background", "a {} on a dark background")
PRESERVE = (
    "a man",
    "a woman",
    "a dog",
    "a cat",
    "a house",
    "a street in a city",
    "a landscape with mountains",
    "a tree on a field",
    "a car",
    "a table with food",
    "a drawing of an animal",
    "a room with a window",
    "a red circle on a blue background",
    "a portrait of a person",
    "the sea",
    "flowers in a vase",
)
"""Prompts without a concept, under which a model shall stay as it is."""
_WORDS = 2  # trigger words of LoRA files may be a long list of tags


def words_of(adapter: Adapter) -> tuple[str, ...]:
    """The words that stand for the concept: those it has trained, else its trigger words."""
    return tuple(adapter.tokens) or adapter.provenance.trigger_words


def own_prompts(adapter: Adapter) -> tuple[str, ...]:
    """Four prompts with the concept's words; none where it names no word."""
    words = words_of(adapter)[:_WORDS]
    return tuple(template.format(words[i % len(words)]) for i, template in enumerate(TEMPLATES) if words)


def without_concepts(
    preserve: Sequence[str], adapters: Sequence[Adapter], prompts: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[str]]:
    """Prompts to be preserved that show no concept, and a note about the others: one prompt cannot be both.

    A prompt shows a concept when it has the adapter's words in it, or is one of the concept's prompts.
    """
    words = {word.lower().strip() for adapter in adapters for word in words_of(adapter) if word.strip()}
    given = {text.lower().strip() for texts in prompts for text in texts}
    kept = tuple(p for p in preserve if p.lower().strip() not in given and not _has(p.lower(), words))
    dropped = [repr(p) for p in preserve if p not in kept]
    if not dropped:
        return kept, []
    return kept, [f"not preserved, because a concept is in it: {', '.join(dropped)}"]


def _has(prompt: str, words: Iterable[str]) -> bool:
    """Whether one of the words is in the prompt, as a whole."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt) for word in words)


def read(text: str, labels: Sequence[str], adapters: Sequence[Adapter]) -> list[tuple[str, ...]]:
    """The prompts of every adapter; empty for one that has neither a line nor words.

    Raises SpectralAdapterError for more lines than adapters.
    """
    lines = text.rstrip().split("\n") if text.strip() else []
    if len(lines) > len(adapters):
        raise SpectralAdapterError(
            f"{len(lines)} lines of prompts for {len(adapters)} adapters ({', '.join(labels)}): expected one "
            "line for each, several prompts of one concept with | between them"
        )
    lines += [""] * (len(adapters) - len(lines))
    given = [tuple(p.strip() for p in line.split("|") if p.strip()) for line in lines]
    return [found or own_prompts(adapter) for found, adapter in zip(given, adapters, strict=True)]


def require(prompts: Sequence[object], labels: Sequence[str], where: str) -> None:
    """Raises SpectralAdapterError, with the adapter's name, where a concept has no prompt."""
    for number, (found, label) in enumerate(zip(prompts, labels, strict=True), 1):
        if not found:
            raise SpectralAdapterError(
                f"{label} names no trigger word, so nobody can tell which prompt shows it: write its prompt "
                f"as line {number} of {where}"
            )
