"""Automatic1111's model: its modules, its embeddings, its noise levels.

Shapes: sigma or timestep (B,).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from spectral_core.errors import SpectralAdapterError

from .active import rows_of
from .freezing import frozen
from .open_clip import OpenCLIPTree
from .pipeline import EXPECTED, HostPipeline, OpenTokens, Parts, TextPart

_LAST_STEP = 999  # of the 1000 that Stable Diffusion is trained on


def unet(sd_model: Any) -> nn.Module:
    """The picture's model."""
    found: nn.Module = sd_model.model.diffusion_model
    return found


def text_encoders(sd_model: Any) -> dict[str, nn.Module]:
    """Part -> a tree whose layers have transformers' names; OpenCLIP's (SD 2, SDXL's second) made for it."""
    found: list[nn.Module] = []
    for embedder in _embedders(sd_model):
        transformer, opened = getattr(embedder, "transformer", None), getattr(embedder, "model", None)
        if isinstance(transformer, nn.Module):
            found.append(transformer)
        elif isinstance(opened, nn.Module) and hasattr(opened, "transformer"):
            found.append(OpenCLIPTree(opened))
    return dict(zip(("text_encoder", "text_encoder_2"), found, strict=False))


def known_names(sd_model: Any) -> Mapping[str, Any]:
    """This host has no map of names that could be asked."""
    return {}


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
            if former is not None:  # the host forgets only by name, and only when told so
                database.register_embedding_by_name(None, sd_model, word)
            database.register_embedding(embedding, sd_model)
            stack.callback(_forget, database, sd_model, embedding, former)
        return stack.pop_all().close


def _forget(database: Any, sd_model: Any, embedding: Any, former: Any) -> None:
    """Take a word out, unless the host has read all of them anew for another model, as a refiner's."""
    word = embedding.name
    if database.word_embeddings.get(word) is embedding:
        database.register_embedding_by_name(None, sd_model, word)
        if former is not None:
            database.register_embedding_by_name(former, sd_model, word)


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


@contextmanager
def pipeline(sd_model: Any) -> Iterator[HostPipeline]:
    """The model ready to train: nobody else's LoRA in its weights, everything in it differentiable."""
    from modules import lowvram, sd_hijack

    if lowvram.is_enabled(sd_model):
        raise SpectralAdapterError(
            "this webui was started with --medvram or --lowvram, which moves the model's parts while they "
            "run: training needs it started without"
        )
    with ExitStack() as undo:
        sd_hijack.undo_optimizations()  # some of them write in place
        undo.callback(sd_hijack.model_hijack.apply_optimizations)
        undo.enter_context(_without_checkpoints(sd_model.model.diffusion_model))
        roots = [m for m in (sd_model, *_embedders(sd_model)) if isinstance(m, nn.Module)]
        undo.enter_context(frozen(roots))
        _take_loras_off(roots)
        parts = _parts(sd_model)
        for text in parts.text:
            if isinstance(text.tree, OpenCLIPTree):
                undo.enter_context(text.tree.rerouted())
        yield HostPipeline(parts)


@contextmanager
def _without_checkpoints(root: nn.Module) -> Iterator[None]:
    """The model's own way to save memory wants gradients of its weights."""
    former = []
    try:
        for module in root.modules():
            for name in ("checkpoint", "use_checkpoint"):
                if getattr(module, name, None) is True:
                    former.append((module, name))
                    setattr(module, name, False)
        yield
    finally:
        for module, name in former:
            setattr(module, name, True)


def _take_loras_off(roots: Iterable[nn.Module]) -> None:
    """The host writes LoRAs into weights when a layer runs, and takes them out only when it runs again."""
    networks: Any = sys.modules.get("networks")
    if networks is None or not hasattr(networks, "network_apply_weights"):
        return
    networks.loaded_networks.clear()
    for root in roots:
        for module in root.modules():
            if getattr(module, "network_current_names", ()):
                networks.network_apply_weights(module)


def _embedders(sd_model: Any) -> list[Any]:
    """The text encoders, without what the host has put around them."""
    embedders = getattr(getattr(sd_model, "conditioner", None), "embedders", None)
    stages = [sd_model.cond_stage_model] if embedders is None else list(embedders)
    return [getattr(stage, "wrapped", stage) for stage in stages]


def _parts(sd_model: Any) -> Parts:
    from modules import devices

    model, autoencoder = unet(sd_model), sd_model.first_stage_model
    kind = next(model.parameters()).dtype
    scale = float(sd_model.scale_factor)

    def predict(noisy: Tensor, steps: Tensor, states: Tensor, vector: Tensor | None) -> Tensor:
        given = {} if vector is None else {"y": vector.to(kind)}
        with devices.autocast():
            found: Tensor = model(noisy.to(kind), steps, context=states.to(kind), **given)
        return found

    def encode(pictures: Tensor) -> Tensor:
        own = next(autoencoder.parameters())
        with devices.autocast():
            moments = autoencoder.quant_conv(autoencoder.encoder(pictures.to(own)))
        return moments.float().chunk(2, 1)[0] * scale

    def decode(latents: Tensor) -> Tensor:
        own = next(autoencoder.parameters())
        with devices.autocast():
            found: Tensor = autoencoder.decode((latents / scale).to(own))
        return found.float().clamp(-1, 1)

    text = [part for embedder in _embedders(sd_model) if (part := _text_part(embedder)) is not None]
    if not text or not hasattr(sd_model, "alphas_cumprod"):
        raise SpectralAdapterError(f"{type(sd_model).__name__}: {EXPECTED}")
    prediction = "v_prediction" if sd_model.parameterization == "v" else "epsilon"
    levels = len(autoencoder.encoder.down)
    return Parts(model, predict, sd_model.alphas_cumprod, prediction, text, encode, decode, levels)


def _text_part(embedder: Any) -> TextPart | None:
    """None for what embeds something else than text."""
    transformer: Any = getattr(embedder, "transformer", None)
    opened: Any = getattr(embedder, "model", None)
    if hasattr(transformer, "text_model"):
        middle = getattr(embedder, "layer", "last") == "hidden"  # SDXL's first

        def encode(ids: Tensor) -> tuple[Tensor, Tensor | None]:
            out = transformer(ids, output_hidden_states=True)
            return (out.hidden_states[embedder.layer_idx] if middle else out.last_hidden_state), None

        embedding = transformer.text_model.embeddings.token_embedding
        return TextPart(embedder.tokenizer, encode, getattr(embedding, "wrapped", embedding), transformer)
    if opened is None or not hasattr(opened, "token_embedding"):
        return None

    def encode_open(ids: Tensor) -> tuple[Tensor, Tensor | None]:
        out = embedder.encode_with_transformer(ids)
        return (out[embedder.layer], out["pooled"]) if isinstance(out, dict) else (out, None)

    from open_clip.tokenizer import _tokenizer as known

    tokens = OpenTokens(known.encode, known.encoder, 0)
    inner = getattr(opened.token_embedding, "wrapped", opened.token_embedding)
    return TextPart(tokens, encode_open, inner, OpenCLIPTree(opened))
