"""Text encoders and new words that train along with the model: captions are encoded anew in every step.

The text encoders of a CLIP are made ready as :mod:`.model` does it with the model. A new word is rows that
the host's tokenizers hand through to the text model (:mod:`..model.words`), so that gradients reach them.

Shapes: a word has one row (1, dim) per text encoder; states (B, 77, dim).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ....spectral_core.attach.targets import find_targets
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.maths.layers import LayerShape
from ....spectral_core.training.engine.checkpointing import checkpointed
from ..model import compat
from ..model.words import PARTS, WordTokenizer
from . import model as training_model

Words = Mapping[str, Mapping[str, nn.Parameter]]


def trees(root: nn.Module) -> dict[str, nn.Module]:
    """part -> the CLIP text model below the host's ``cond_stage_model``; other encoders do not train."""
    found = {}
    for name, part in PARTS.items():
        tree = getattr(getattr(root, name, None), "transformer", None)
        if isinstance(tree, nn.Module):
            found[part] = tree
    return found


def choose(clip: Any, targets: str) -> dict[str, LayerShape]:
    """Name and shape of every text layer that ``targets`` names; SpectralAdapterError where there is none."""
    found: dict[str, Tensor] = {}
    for part, tree in trees(clip.patcher.model).items():
        found |= find_targets(tree, part, targets)[0]
    if not found:
        raise SpectralAdapterError(
            f"text_targets {targets!r}: only CLIP's own text encoders train ({', '.join(PARTS)}), and this "
            f"CLIP has {', '.join(_others(clip)) or 'none'}; leave text_targets empty"
        )
    return {name: LayerShape.of(weight) for name, weight in found.items()}


def _others(clip: Any) -> list[str]:
    """The host's names of the CLIP's text encoders that cannot train: T5, Qwen, Llama and others."""
    named = clip.patcher.model.named_children()
    return [name for name, child in named if name not in PARTS and hasattr(child, "transformer")]


def stay(clip: Any) -> list[str]:
    """What to say about text encoders beside those that train."""
    others = _others(clip)
    return [f"text encoders that stay as they are: {', '.join(others)}"] if others else []


def initial_rows(clip: Any, word: str, init_words: str) -> dict[str, Tensor]:
    """part -> (1, dim): the mean embedding of known words, from which a new one starts."""
    rows: dict[str, Tensor] = {}
    texts: dict[str, Any] = dict(trees(clip.patcher.model))
    for name, part in PARTS.items():
        tokenizer = getattr(clip.tokenizer, name, None)
        if part not in texts or tokenizer is None:
            continue
        inner = tokenizer.tokenizer
        if isinstance(inner, WordTokenizer) and inner.known(word) is not None:
            raise SpectralAdapterError(
                f"trigger_word {word!r}: an adapter on this CLIP brings this word already; choose another"
            )
        if len(inner(word)["input_ids"]) == 3:  # a start, one token, an end
            raise SpectralAdapterError(
                f"trigger_word {word!r} is a word that this CLIP knows, and init_words would give it another "
                f"meaning: choose a new one, such as <{word}>"
            )
        ids = [i for i in inner(init_words)["input_ids"][1:-1] if isinstance(i, int)]
        weight = texts[part].get_input_embeddings().weight.detach().float().cpu()
        if not ids:
            raise SpectralAdapterError(f"init_words {init_words!r}: expected words that the CLIP knows")
        rows[part] = weight[ids].mean(0, keepdim=True).clone()
    if not rows:
        raise SpectralAdapterError("init_words: this CLIP has no text encoder that can learn a word")
    return rows


@dataclass(frozen=True)
class Text:
    """Text encoders that can train, and the words that do.

    patcher, layer: as the CLIP has them. tokenizer: its own, which knows nothing of the words.
    """

    patcher: Any
    tokenizer: Any
    layer: int | None
    words: Words = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for rows in self.words.values() for p in rows.values()]

    def values(self) -> dict[str, dict[str, Tensor]]:
        """The rows as they are now: word -> part -> (1, dim)."""
        return {w: {p: v.detach().clone().cpu() for p, v in rows.items()} for w, rows in self.words.items()}

    def encode(self, caption: str) -> Any:
        """[states, options] of a caption, with gradients where they are on."""
        model, device = self.patcher.model, self.patcher.load_device
        model.reset_clip_options()
        if self.layer is not None:
            model.set_clip_options({"layer": self.layer})
        model.set_clip_options({"execution_device": device})
        states, pooled, *more = model.encode_token_weights(self._tokenized(caption))
        return [states, {"pooled_output": pooled, **(more[0] if more else {})}]

    def _tokenized(self, caption: str) -> Any:
        """With the words' rows as they are now: the host reads them when it encodes."""
        tokenizer = copy.copy(self.tokenizer)
        for name, part in PARTS.items():
            rows = {word: parts[part] for word, parts in self.words.items() if part in parts}
            if rows and getattr(tokenizer, name, None) is not None:
                own = copy.copy(getattr(tokenizer, name))
                own.tokenizer = WordTokenizer(own.tokenizer, rows)
                setattr(tokenizer, name, own)
        return tokenizer.tokenize_with_weights(caption)


@contextmanager
def ready(clip: Any, words: Mapping[str, Mapping[str, Tensor]], beside: Any) -> Iterator[Text]:
    """The CLIP, loaded beside a patcher and frozen, with gradients; unloaded again at the end. Inside of
    :func:`.model.ready`, which leaves inference mode."""
    with torch.inference_mode():
        training_model.unload(clip.patcher)  # in the mode in which it was loaded
    with ExitStack() as undo:
        own = compat.with_own_weights(clip.patcher)
        made: training_model.Replaced = []
        undo.callback(training_model.as_loaded, made)
        undo.callback(training_model.unload, own)
        undo.callback(training_model.unload, clip.patcher)
        made += training_model.make_normal(own.model)
        patcher = own.clone()
        undo.callback(training_model.unload, patcher)
        comfy.model_management.load_models_gpu([beside, patcher], force_full_load=True)
        undo.enter_context(training_model.frozen(patcher.model))
        undo.enter_context(checkpointed(trees(patcher.model).values(), "none"))
        device = patcher.load_device
        rows_of = {
            word: {part: nn.Parameter(rows.detach().clone().to(device)) for part, rows in parts.items()}
            for word, parts in words.items()
        }
        yield Text(patcher, clip.tokenizer, clip.layer_idx, rows_of)


class Conditions:
    """The model's keyword arguments for the examples' captions, encoded with what has been learned so far."""

    def __init__(self, patcher: Any, text: Text, captions: Mapping[int | None, str]) -> None:
        self._patcher, self._text, self._captions = patcher, text, captions

    def rows(self, indices: Sequence[int | None], shape: tuple[int, ...]) -> dict[str, Any]:
        """Keyword arguments for a batch; each caption in it is encoded once."""
        captions = [self._captions[index] for index in indices]
        found = {
            caption: training_model.encoded(self._patcher, self._text.encode(caption), shape)
            for caption in dict.fromkeys(captions)
        }
        rows = [found[caption] for caption in captions]
        return training_model.joined(rows, indices, self._patcher.load_device)
