"""Automatic1111's model: its modules, its embeddings, its noise levels.

Shapes: sigma or timestep (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from spectral_core.errors import SpectralAdapterError

from .active import rows_of

_LAST_STEP = 999  # of the 1000 that Stable Diffusion is trained on


def unet(sd_model: Any) -> nn.Module:
    """The picture's model."""
    found: nn.Module = sd_model.model.diffusion_model
    return found


def text_encoders(sd_model: Any) -> dict[str, nn.Module]:
    """Part -> the module whose layers have transformers' names. OpenCLIP's (SD 2, SDXL's second) have not."""
    embedders = getattr(getattr(sd_model, "conditioner", None), "embedders", None)
    stages = [sd_model.cond_stage_model] if embedders is None else list(embedders)
    inner = [getattr(stage, "wrapped", stage) for stage in stages]
    found = [t for e in inner if isinstance(t := getattr(e, "transformer", None), nn.Module)]
    return {"text_encoder": found[0]} if found else {}


def add_words(sd_model: Any, words: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]:
    """Register trained words as the host's embeddings; call the result to have the former ones again."""
    from modules import devices, sd_hijack
    from modules.textual_inversion.textual_inversion import Embedding

    database = sd_hijack.model_hijack.embedding_db
    two = getattr(sd_model, "is_sdxl", False)
    with ExitStack() as stack:
        for word, rows in words.items():
            on_device = {part: value.detach().to(devices.device).float() for part, value in rows.items()}
            first = (
                on_device["text_encoder"] if "text_encoder" in on_device else next(iter(on_device.values()))
            )
            vectors: Any = first
            if two:
                if set(on_device) != {"text_encoder", "text_encoder_2"}:
                    raise SpectralAdapterError(f"word {word!r}: this model needs rows for both text encoders")
                vectors = {"clip_l": on_device["text_encoder"], "clip_g": on_device["text_encoder_2"]}
            _check_width(word, vectors, database.get_expected_shape())
            embedding = Embedding(vectors, word)
            embedding.vectors = len(first)
            embedding.shape = sum(v.shape[1] for v in vectors.values()) if two else first.shape[1]
            former = database.word_embeddings.get(word)
            stack.callback(database.register_embedding_by_name, former, sd_model, word)
            if former is not None:  # the host forgets only by name, and only when told so
                database.register_embedding_by_name(None, sd_model, word)
            database.register_embedding(embedding, sd_model)
            stack.callback(database.register_embedding_by_name, None, sd_model, word)
        return stack.pop_all().close


def _check_width(word: str, vectors: Any, expected: int) -> None:
    found = sum(v.shape[1] for v in vectors.values()) if isinstance(vectors, dict) else vectors.shape[1]
    if found != expected:
        raise SpectralAdapterError(
            f"word {word!r}: found rows of {found} numbers, expected {expected} for this model; the adapter "
            "was trained with another text encoder"
        )


def progress(sd_model: Any, params: Any) -> float | Tensor:
    """From the noise level of ``on_cfg_denoiser``: σ for most samplers, the timestep itself for some."""
    inner = getattr(params.denoiser, "inner_model", None)
    to_step = getattr(inner, "sigma_to_t", None)
    steps = params.sigma if to_step is None else to_step(params.sigma)
    return rows_of(1 - float(step) / _LAST_STEP for step in steps.detach().flatten().tolist())
