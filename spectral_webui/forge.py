"""Forge's and Forge Neo's model: its modules, its embeddings, its noise levels.

Modules are shared by all clones of the host's patchers, so that an adapter on them survives what the host
does to its own objects between batches.

Shapes: sigma (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from spectral_core.adapter.noise_levels import progress_of
from spectral_core.errors import SpectralAdapterError

_PARTS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
_ENGINES = ("text_processing_engine", "text_processing_engine_l", "text_processing_engine_g")


def unet(sd_model: Any) -> nn.Module:
    """The picture's model."""
    found: nn.Module = sd_model.forge_objects.unet.model.diffusion_model
    return found


def text_encoders(sd_model: Any) -> dict[str, nn.Module]:
    """Part -> the module whose layers have transformers' names."""
    stage = sd_model.forge_objects.clip.cond_stage_model
    found: dict[str, nn.Module] = {}
    for name, part in _PARTS.items():  # of clip_l and clip_h a model has one
        module = getattr(getattr(stage, name, None), "transformer", None)
        if isinstance(module, nn.Module):
            found.setdefault(part, module)
    return found


def add_words(sd_model: Any, words: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]:
    """Register trained words in the host's text engines; call the result to have the former ones again."""
    engines = [engine for name in _ENGINES if (engine := getattr(sd_model, name, None)) is not None]
    engines = [engine for engine in engines if getattr(engine, "embeddings", None) is not None]
    with ExitStack() as stack:
        for word, rows in words.items():
            used = False
            for engine in engines:
                part = _PARTS.get(engine.embedding_key, "")
                if part in rows:
                    stack.callback(_register(engine, word, rows[part]))
                    used = True
            if not used:
                raise SpectralAdapterError(f"word {word!r}: this model has no text encoder that takes it")
        return stack.pop_all().close


def _register(engine: Any, word: str, rows: Tensor) -> Callable[[], None]:
    database = engine.embeddings
    width = database.expected_shape
    if width > 0 and rows.shape[1] != width:
        raise SpectralAdapterError(
            f"word {word!r}: found rows of {rows.shape[1]} numbers, expected {width} for this model; the "
            "adapter was trained with another text encoder"
        )
    embedding = _Embedding(rows.detach().float().cpu(), word)
    former = database.word_embeddings.get(word)
    if former is not None:
        database.register_embedding_by_name(None, word)
    database.register_embedding_by_name(embedding, word)

    def undo() -> None:
        database.register_embedding_by_name(None, word)
        if former is not None:
            database.register_embedding_by_name(former, word)

    return undo


class _Embedding:
    """What the host's engine reads of an embedding."""

    def __init__(self, vec: Tensor, name: str) -> None:
        self.vec, self.name = vec, name
        self.vectors, self.shape = vec.shape
        self.step = self.sd_checkpoint = self.sd_checkpoint_name = None
        self.filename = self.hash = self.shorthash = None


def progress(sd_model: Any, params: Any) -> float | Tensor:
    """From the σ of ``on_cfg_denoiser``, by the model's own noise levels."""
    return progress_of(sd_model.forge_objects.unet.model.predictor, params.sigma)
