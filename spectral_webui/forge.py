"""Forge's and Forge Neo's model: its modules, its embeddings, its noise levels.

Modules are shared by all clones of the host's patchers, so that an adapter on them survives what the host
does to its own objects between batches.

Shapes: sigma (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectral_core.adapter.noise_levels import progress_by, progress_of
from spectral_core.errors import SpectralAdapterError

from .freezing import frozen
from .pipeline import EXPECTED, HostPipeline, Parts, TextPart

_PARTS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
_LATER_PARTS = {"t5xxl": "text_encoder_2"}  # of Flux, which has no clip_g
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v_prediction": "v_prediction"}
_ENGINES = ("text_processing_engine", "text_processing_engine_l", "text_processing_engine_g")


def unet(sd_model: Any) -> nn.Module:
    """The picture's model."""
    found: nn.Module = sd_model.forge_objects.unet.model.diffusion_model
    return found


def text_encoders(sd_model: Any) -> dict[str, nn.Module]:
    """Part -> the module whose layers have transformers' names."""
    stage = sd_model.forge_objects.clip.cond_stage_model
    found: dict[str, nn.Module] = {}
    for name, part in {**_PARTS, **_LATER_PARTS}.items():  # of clip_l and clip_h a model has one
        module = getattr(getattr(stage, name, None), "transformer", None)
        if isinstance(module, nn.Module):
            found.setdefault(part, module)
    return found


def known_names(sd_model: Any) -> Mapping[str, Any]:
    """The host's own map: name in a LoRA file -> weight, or (weight, rows of it, …)."""
    from backend.patcher.lora import model_lora_keys_unet

    found: Mapping[str, Any] = model_lora_keys_unet(sd_model.forge_objects.unet.model, {})
    return found


def add_words(sd_model: Any, words: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]:
    """Register trained words in the host's text engines; call the result to have the former ones again."""
    engines = _engines(sd_model)
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


def _engines(sd_model: Any) -> list[Any]:
    """Of the text encoders whose words can be added to."""
    engines = [engine for name in _ENGINES if (engine := getattr(sd_model, name, None)) is not None]
    return [engine for engine in engines if getattr(engine, "embeddings", None) is not None]


def _register(engine: Any, word: str, rows: Tensor) -> Callable[[], None]:
    database = engine.embeddings
    width = _width(engine)
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


def _width(engine: Any) -> int:
    """Of the encoder's own embedding: the host's ``expected_shape`` is for SDXL's two together."""
    found = engine.text_encoder.transformer.text_model.embeddings.token_embedding.weight
    return int(found.shape[1])


class _Embedding:
    """What the host's engine reads of an embedding."""

    def __init__(self, vec: Tensor, name: str) -> None:
        self.vec, self.name = vec, name
        self.vectors, self.shape = vec.shape
        self.step = self.sd_checkpoint = self.sd_checkpoint_name = None
        self.filename = self.hash = self.shorthash = None


def progress(sd_model: Any, params: Any) -> float | Tensor:
    """From the σ of ``on_cfg_denoiser``, by the model's own noise levels."""
    predictor = sd_model.forge_objects.unet.model.predictor
    if getattr(predictor, "prediction_type", "") != "const":
        return progress_of(predictor, params.sigma)
    # A flow's percent_to_sigma is without its shift in Forge, and Neo changes the shift of the same
    # predictor: the levels themselves say it, and they are replaced with it.
    levels = predictor.sigmas
    return progress_by(levels, lambda progress: _sigma_at(levels, progress), params.sigma)


def _sigma_at(levels: Tensor, progress: float) -> float:
    """σ at a progress by (n,) levels of equal distance in time, cleanest first, linear between."""
    last = len(levels) - 1
    place = min(max((1 - progress) * len(levels) - 1, 0.0), float(last))
    low = min(int(place), last - 1)
    return float(levels[low] + (place - low) * (levels[low + 1] - levels[low]))


@contextmanager
def pipeline(sd_model: Any) -> Iterator[HostPipeline]:
    """The model ready to train: nobody else's LoRA in its weights, everything in it differentiable."""
    from backend import memory_management

    objects = sd_model.forge_objects_original
    patchers = [objects.unet, objects.clip.patcher, objects.vae.patcher]
    with torch.inference_mode():  # in which the host has loaded them
        memory_management.load_models_gpu(patchers)
        for patcher in patchers:
            if hasattr(patcher, "refresh_loras"):
                patcher.refresh_loras()
    roots = [objects.unet.model, objects.clip.cond_stage_model, objects.vae.first_stage_model]
    for root in roots:
        make_normal(root)
    with frozen(roots):
        yield HostPipeline(_parts(sd_model, objects))


def make_normal(root: nn.Module) -> None:
    """Every tensor that was made in inference mode, which autograd cannot keep, by one with the same
    numbers."""
    copies: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in root.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is None or not value.is_inference():
                        continue
                    if id(value) not in copies:
                        copy = value.detach().clone()
                        is_parameter = isinstance(value, nn.Parameter)
                        copies[id(value)] = nn.Parameter(copy, False) if is_parameter else copy
                    table[name] = copies[id(value)]  # type: ignore[assignment]


def _parts(sd_model: Any, objects: Any) -> Parts:
    model, predictor = objects.unet.model, objects.unet.model.predictor
    kind, autoencoder = model.computation_dtype, objects.vae.first_stage_model
    known = getattr(predictor, "prediction_type", "") in _PREDICTIONS
    if not known or not hasattr(autoencoder, "quant_conv"):
        raise SpectralAdapterError(f"{type(sd_model).__name__}: {EXPECTED}")

    def predict(noisy: Tensor, steps: Tensor, states: Tensor, vector: Tensor | None) -> Tensor:
        given = {} if vector is None else {"y": vector.to(kind)}
        found: Tensor = model.diffusion_model(
            noisy.to(kind), steps.float(), context=states.to(kind), transformer_options={}, **given
        )
        return found

    def encode(pictures: Tensor) -> Tensor:
        found = autoencoder.encoder(pictures.to(next(autoencoder.parameters())))
        if autoencoder.quant_conv is not None:
            found = autoencoder.quant_conv(found)
        scaled: Tensor = autoencoder.process_in(found.float().chunk(2, 1)[0])
        return scaled

    def decode(latents: Tensor) -> Tensor:
        given = autoencoder.process_out(latents).to(next(autoencoder.parameters()))
        found: Tensor = autoencoder.decode(given)
        return found.float().clamp(-1, 1)

    alphas = 1 / (predictor.sigmas.float() ** 2 + 1)
    text = _text_parts(sd_model, objects.clip)
    levels = len(autoencoder.encoder.down)
    prediction = _PREDICTIONS[predictor.prediction_type]
    return Parts(model.diffusion_model, predict, alphas, prediction, text, encode, decode, levels)


def _text_parts(sd_model: Any, clip: Any) -> Sequence[TextPart]:
    """In the host's order, each read at the layer that its engine reads by default."""
    found = []
    for engine in _engines(sd_model):
        tree = engine.text_encoder.transformer
        embedding = tree.text_model.embeddings.token_embedding

        def encode(ids: Tensor, engine: Any = engine, tree: Any = tree) -> tuple[Tensor, Tensor | None]:
            out = tree(ids, output_hidden_states=True)
            states = out.hidden_states[-engine.minimal_clip_skip]
            if engine.final_layer_norm:
                states = tree.text_model.final_layer_norm(states)
            if not engine.return_pooled:
                return states, None
            pooled = out.pooler_output
            return states, tree.text_projection(pooled) if engine.text_projection else pooled

        inner = getattr(embedding, "wrapped", embedding)
        found.append(TextPart(engine.tokenizer, encode, inner, tree))
    return found
