"""Trained words in the host's tokenizers, without a host: stand-ins have what its classes have."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from spectral_core.adapter.adapter import Adapter
from tests.host.booted import ROOT

START, END = 1, 2


class Letters:
    """A tokenizer: one id per letter, spaces dropped, lower case."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [START, *(ord(c) for c in text.lower() if c != " "), END]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 97}


@dataclass
class Clip:
    tokenizer: Any = field(
        default_factory=lambda: SimpleNamespace(
            clip_l=SimpleNamespace(tokenizer=Letters(), embedding_size=4),
            clip_g=SimpleNamespace(tokenizer=Letters(), embedding_size=6),
        )
    )

    def clone(self) -> Clip:
        return Clip(self.tokenizer)


@pytest.fixture(scope="module")
def tokens(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.nodes.host.model.words")


def adapter(
    word: str = "<bot>", rows: int = 1, width: int = 4, value: float = 1.0, part: str = ""
) -> Adapter:
    values = value * torch.arange(rows * width, dtype=torch.float32).reshape(rows, width)
    return Adapter({}, tokens={word: {part or "text_encoder": values}})


def plain(ids: list[Any]) -> list[Any]:
    return [i if isinstance(i, int) else i.tolist() for i in ids]


def ids_of(clip: Any, text: str, encoder: str = "clip_l") -> list[Any]:
    return plain(getattr(clip.tokenizer, encoder).tokenizer(text)["input_ids"])


def test_a_word_becomes_its_rows_and_the_rest_stays(tokens: ModuleType) -> None:
    before = Clip()
    after, lines = tokens.add(before, adapter(rows=2))
    rows = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    assert ids_of(after, "a <bot> b") == [START, 97, *rows, 98, END]
    assert ids_of(after, "<BOT><bot>") == [START, *rows, *rows, END]
    assert ids_of(after, "a b") == ids_of(before, "a b") == [START, 97, 98, END]
    assert ids_of(after, "") == [START, END]
    assert "<bot>" in lines[0]
    assert all(isinstance(i, int) for i in ids_of(before, "a <bot> b")), "the first CLIP is untouched"
    assert ids_of(after, "<bot>", "clip_g") == ids_of(before, "<bot>", "clip_g")


def test_words_of_several_adapters_and_the_longest_wins(tokens: ModuleType) -> None:
    clip, _ = tokens.add(Clip(), adapter("<bot>"))
    clip, _ = tokens.add(clip, adapter("<bot>s", value=2.0))
    clip, _ = tokens.add(clip, adapter("(x)", width=6, part="text_encoder_2"))
    one, two = [0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 4.0, 6.0]
    assert ids_of(clip, "<bot> <bot>s") == [START, one, two, END]
    assert ids_of(clip, "(x)", "clip_g") == [START, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], END]
    assert clip.tokenizer.clip_l.tokenizer.get_vocab() == {"a": 97}
    assert ids_of(copy.copy(clip), "<bot>") == [START, one, END]


def test_the_same_word_twice_must_mean_the_same(tokens: ModuleType, pack: ModuleType) -> None:
    error = importlib.import_module(f"{pack.__name__}.spectral_core.errors").SpectralAdapterError
    clip, _ = tokens.add(Clip(), adapter())
    again, _ = tokens.add(clip, adapter())
    assert ids_of(again, "<bot>") == ids_of(clip, "<bot>")
    with pytest.raises(error, match="different meanings"):
        tokens.add(clip, adapter(value=3.0))
    with pytest.raises(error, match="another text encoder"):
        tokens.add(Clip(), adapter(width=5))


def test_no_words_no_clone_and_missing_encoders_are_told(tokens: ModuleType) -> None:
    clip = Clip()
    assert tokens.add(clip, Adapter({})) == (clip, [])
    same, lines = tokens.add(clip, adapter(part="text_encoder_3"))
    assert same is clip
    assert "<bot>" in lines[0] and "left out" in lines[0]


def test_as_in_diffusers(tokens: ModuleType) -> None:
    """The demo tokenizer with an added token, as the pipelines add it, cuts prompts at the same places."""
    transformers = pytest.importorskip("transformers")
    inner = transformers.CLIPTokenizer.from_pretrained(ROOT / "demo_model" / "tokenizer")
    grown = copy.deepcopy(inner)
    grown.add_tokens(["<bot>"])
    new = len(inner)
    clip = Clip(SimpleNamespace(clip_l=SimpleNamespace(tokenizer=inner, embedding_size=4)))
    clip, _ = tokens.add(clip, adapter())
    for prompt in ("a <bot> on a blue background", "<bot>", "red<bot>blue,  <bot>s", "no word", "<bo t>"):
        ids = clip.tokenizer.clip_l.tokenizer(prompt)["input_ids"]
        assert [i if isinstance(i, int) else new for i in ids] == grown(prompt).input_ids, prompt
