"""An adapter's trained words in the host's CLIP: the word in a prompt becomes its embedding rows.

The host's tokenizers hand tensors of one token through to the text model, which is how its own ``embedding:``
works. So a prompt is cut at the words, what lies between is tokenized as before, and the rows stand where the
word stood. No weight changes and nothing is shared with the CLIP that came in.

Shapes: a word has k rows (k, dim) per text encoder and takes k of the 77 places.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.errors import SpectralAdapterError

# The host's tokenizers by attribute name, and the part whose rows they take.
PARTS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}


class WordTokenizer:
    """The tokenizer ``inner`` with more words. Like it, answers ``{"input_ids": [...]}`` with a start and an
    end; of a trained word the list holds its rows (dim,) as tensors.
    """

    def __init__(self, inner: Any, words: Mapping[str, Tensor]) -> None:
        self.inner = inner
        self.words = {word.lower(): rows for word, rows in words.items()}  # CLIP writes prompts in lower case
        longest_first = sorted(self.words, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})", re.IGNORECASE)

    def __call__(self, text: str) -> dict[str, list[Any]]:
        start, *_, end = self.inner("")["input_ids"]
        ids: list[Any] = [start]
        for piece in self._cut.split(text):
            rows = self.words.get(piece.lower())
            ids += self.inner(piece)["input_ids"][1:-1] if rows is None else list(rows.unbind(0))
        return {"input_ids": [*ids, end]}

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while a copy of this object is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def known(self, word: str) -> Tensor | None:
        """The rows of a word that was added here or further in."""
        rows = self.words.get(word.lower())
        return self.inner.known(word) if rows is None and isinstance(self.inner, WordTokenizer) else rows


def pieces(clip: Any, word: str) -> list[str]:
    """The known pieces that the CLIP's first tokenizer reads a word as; one for a word that it knows, none
    where the tokenizer does not tell."""
    for tokenizer in vars(clip.tokenizer).values():
        inner, names = getattr(tokenizer, "tokenizer", None), getattr(tokenizer, "inv_vocab", None)
        if not callable(inner) or not isinstance(names, dict):
            continue
        around = set(inner("")["input_ids"])
        found = [i for i in inner(word)["input_ids"] if not isinstance(i, Tensor) and i not in around]
        return [str(names.get(i, "?")).replace("</w>", "") for i in found]
    return []


def add(clip: Any, adapter: Adapter) -> tuple[Any, list[str]]:
    """(a clone of CLIP that knows the adapter's words, lines for the report); CLIP itself where it has none.

    Raises SpectralAdapterError for rows of another text encoder's size, and for a word that another adapter
    on this CLIP brings with another meaning.
    """
    if not adapter.tokens:
        return clip, []
    tokenizer = copy.copy(clip.tokenizer)
    found: set[str] = set()
    for attribute, part in PARTS.items():
        words = {word: rows[part] for word, rows in adapter.tokens.items() if part in rows}
        old = getattr(tokenizer, attribute, None)
        if old is not None and words:
            setattr(tokenizer, attribute, _with_words(old, words))
            found.update(words)
    lines = [f"prompt: new words {', '.join(sorted(found))}"] if found else []
    missing = sorted(set(adapter.tokens) - found)
    if missing:
        lines.append(f"prompt: this CLIP has no text encoder for the words {', '.join(missing)}; left out")
    if not found:
        return clip, lines
    clone = clip.clone()
    clone.tokenizer = tokenizer
    return clone, lines


def _with_words(old: Any, words: Mapping[str, Tensor]) -> Any:
    """A shallow copy of one of the host's SDTokenizers that knows the words."""
    width, inner = old.embedding_size, old.tokenizer
    new = {}
    for word, rows in words.items():
        if rows.dim() != 2 or rows.shape[1] != width:
            raise SpectralAdapterError(
                f"word {word!r}: found rows of shape {tuple(rows.shape)}, expected (k, {width}) for this "
                "CLIP; the adapter was trained with another text encoder"
            )
        known = inner.known(word) if isinstance(inner, WordTokenizer) else None
        if known is None:
            new[word] = rows.detach().to("cpu", torch.float32)
        elif not torch.equal(known, rows.to(known)):
            raise SpectralAdapterError(
                f"two adapters bring the word {word!r} with different meanings: apply one of them, or "
                "retrain one with another token"
            )
    tokenizer = copy.copy(old)
    tokenizer.tokenizer = WordTokenizer(inner, new) if new else inner
    return tokenizer
