"""The words: a byte-level BPE tokenizer trained on the captions, and the configuration of the text encoder.

The vocabulary holds every byte, plain and as the end of a word, so any caption and new token can be written.
"""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo_model import pictures

from .common import MODEL, SEED, known

START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
LENGTH = 77
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_merges(captions: list[str], size: int) -> list[tuple[str, str]]:
    """The BPE merges over the captions, in order, with CLIP's normalisation and word pattern."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix=SUFFIX, show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def train_tokenizer(size: int = 480) -> None:
    """Train the tokenizer and write the model's ``tokenizer``."""
    rng = np.random.default_rng(SEED + 1)
    captions = [pictures.caption(p, rng) for p in known()]
    merges = learn_merges(captions, size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + SUFFIX for c in alphabet] + [a + b for a, b in merges] + [START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder = MODEL / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, unk_token=END, bos_token=START, eos_token=END, pad_token=END,
        model_max_length=LENGTH,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    print(f"tokenizer: {len(vocabulary)} tokens, {len(merges)} merges", flush=True)


def load_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL / "tokenizer")


def text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh text encoder: two layers, width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=128,
            hidden_act="quick_gelu",
            initializer_factor=1.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
