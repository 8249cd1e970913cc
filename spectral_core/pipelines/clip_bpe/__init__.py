"""CLIP's tokenizer without a download: its vocabulary follows from its list of byte-pair merges.

Source: OpenAI CLIP (Radford et al. 2021), byte-level BPE as in GPT-2 with the end-of-word mark ``</w>``. The
merges are in ``merges.txt.gz``; their licence is in ``LICENSE`` beside it.

Shapes: 49,408 tokens = 256 bytes, the same 256 at the end of a word, 48,894 merges, start and end of text.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

__all__ = ["build_vocabulary", "byte_symbols", "clip_tokenizer", "read_merges"]

MERGES = Path(__file__).with_name("merges.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def read_merges() -> list[str]:
    """The 48,894 merges in order, each the two symbols that it joins, with one space between them."""
    return gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()


def byte_symbols() -> list[str]:
    """One visible character per byte, in the order of CLIP's ids.

    The printable bytes of Latin-1 stand for themselves and come first; the others take U+0100 and onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(hidden)]


def build_vocabulary(merges: list[str]) -> dict[str, int]:
    """Token -> id for the given merges."""
    symbols = byte_symbols()
    joined = (merge.replace(" ", "") for merge in merges)
    tokens = chain(symbols, (s + WORD_END for s in symbols), joined, (START, END))
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(settings: Path) -> Any:
    """A transformers ``CLIPTokenizer`` with the settings of a ``tokenizer_config.json``.

    The padding token is only given its role, not added as a special word: OpenCLIP's encoders pad with ``!``
    (id 0), and a ``!`` in a prompt must stay the ordinary ``!</w>`` (id 256), as in the original models and
    in ComfyUI.
    """
    from transformers import CLIPTokenizer

    config = json.loads(settings.read_text(encoding="utf-8"))
    merges = read_merges()
    with tempfile.TemporaryDirectory() as folder:  # transformers reads files; it keeps nothing of them open
        files = Path(folder)
        vocabulary = json.dumps(build_vocabulary(merges), ensure_ascii=False)
        (files / "vocab.json").write_text(vocabulary, encoding="utf-8", newline="\n")
        lines = "\n".join(["#version: 0.2", *merges, ""])
        (files / "merges.txt").write_text(lines, encoding="utf-8", newline="\n")
        first = json.dumps({**config, "pad_token": END})
        (files / "tokenizer_config.json").write_text(first, encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(files, local_files_only=True)
    tokenizer.name_or_path = "clip"  # not the folder that is gone
    tokenizer.pad_token = config["pad_token"]
    return tokenizer
