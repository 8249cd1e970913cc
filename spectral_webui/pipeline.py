"""The webui's loaded Stable Diffusion in the shape of a pipeline, so that the core trains and looks on it.

:class:`HostPipeline` has what :mod:`spectral_core.pipelines` asks of diffusers' pipelines: a denoiser whose
layers have diffusers' names, text encoders with tokenizers, an autoencoder, a noise schedule, and a plain
DDIM sampler (Song et al., ICLR 2021, arXiv 2010.02502) that draws latents and pictures. All of them are the
host's own modules: what is attached here is attached there.

Shapes: latents (B, C, h, w), ids (B, 77), states (B, 77, dim).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spectral_core.errors import SpectralAdapterError
from spectral_core.names.unet_blocks import unet_table
from spectral_core.pipelines.conditioning import encode
from spectral_core.training.config.defaults import NARROW

from . import places

EXPECTED = "expected a Stable Diffusion 1.x, 2.x or XL; other models train in ComfyUI"
_SIZES = {True: 128, False: 64}  # latent cells of a side: SDXL's and the others'
_NARROW_SIZE = 128  # pixels
_EACH = 256  # numbers by which SDXL is told each of six sizes


@dataclass(frozen=True)
class TextPart:
    """A text encoder. tree: with transformers' names, None where its layers have others. encode: ids ->
    (states as the denoiser wants them, pooled or None). embedding: of its tokens."""

    tokenizer: Any
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    embedding: nn.Embedding
    tree: nn.Module | None = None


@dataclass(frozen=True)
class Parts:
    """What a host's model is made of. predict: (noisy, timesteps, states, SDXL's vector or None) -> the
    model's prediction; encode, decode: pictures in [−1, 1] ↔ latents as the denoiser wants them."""

    unet: nn.Module
    predict: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    alphas_cumprod: Tensor
    prediction: str
    text: Sequence[TextPart]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    levels: int = 4  # of the autoencoder: 8 pixels for each latent cell


class HostPipeline:
    """See the module. Raises SpectralAdapterError for models that are no Stable Diffusion 1.x, 2.x or XL."""

    text_encoder_2: TextEncoder | None = None
    tokenizer_2: Any = None

    def __init__(self, parts: Parts) -> None:
        self.unet = Denoiser(parts)
        first, *more = parts.text
        self.text_encoder, self.tokenizer = TextEncoder(first), first.tokenizer
        if more:
            self.text_encoder_2, self.tokenizer_2 = TextEncoder(more[0]), more[0].tokenizer
        self.vae = Autoencoder(parts, self.unet)
        self.vae_scale_factor = 2 ** (parts.levels - 1)
        self.scheduler = SimpleNamespace(
            alphas_cumprod=parts.alphas_cumprod.detach().float().cpu(),
            config=SimpleNamespace(
                prediction_type=parts.prediction, num_train_timesteps=len(parts.alphas_cumprod)
            ),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        generator: Any = None,
        output_type: str = "pil",
        width: int | None = None,
        height: int | None = None,
    ) -> SimpleNamespace:
        """``.images``: latents or pictures of the prompts, by DDIM's steps without noise."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        side = self.unet.config.sample_size * self.vae_scale_factor
        size = (width or side, height or side)
        cells = (size[1] // self.vae_scale_factor, size[0] // self.vae_scale_factor)
        generators = generator if isinstance(generator, list) else [generator] * len(prompts)
        shape = (self.unet.config.in_channels, *cells)
        latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.unet.device)
        guided = guidance_scale != 1
        texts = [*[""] * len(prompts), *prompts] if guided else prompts
        told = encode(self, texts, size)
        alphas = self.scheduler.alphas_cumprod
        steps = torch.linspace(len(alphas) - 1, 0, num_inference_steps + 1).long().tolist()
        for step, after in pairwise(steps):
            given = torch.cat([latents] * 2) if guided else latents
            found = self.unet(given, torch.full((len(given),), step, device=given.device), **told).sample
            if guided:
                without, with_text = found.float().chunk(2)
                found = without + guidance_scale * (with_text - without)
            latents = self._next(latents, found.float(), step, after)
        if output_type == "latent":
            return SimpleNamespace(images=latents)
        return SimpleNamespace(images=[_picture(p) for p in self.vae.decode(latents)])

    def _next(self, x: Tensor, predicted: Tensor, step: int, after: int) -> Tensor:
        """x₀ and ε from the prediction; √ᾱ'·x₀ + √(1−ᾱ')·ε, and x₀ itself at the end."""
        alphas = self.scheduler.alphas_cumprod
        signal, spread = float(alphas[step].sqrt()), float((1 - alphas[step]).sqrt())
        if self.scheduler.config.prediction_type == "epsilon":
            noise, clean = predicted, (x - spread * predicted) / max(signal, 1e-6)
        else:
            noise, clean = signal * predicted + spread * x, signal * x - spread * predicted
        if after == 0:
            return clean
        return float(alphas[after].sqrt()) * clean + float((1 - alphas[after]).sqrt()) * noise


class Denoiser(nn.Module):
    """The host's UNet under diffusers' names, called as diffusers' is."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        layout = places.layout_of(parts.unet)
        if layout is None:
            raise SpectralAdapterError(f"{type(parts.unet).__name__}: {EXPECTED}")
        host = dict(parts.unet.named_modules())
        for path, native in unet_table(layout).items():
            if native in host:
                _put(self, path, host[native])
        self.native = parts.unet  # behind the others, so that a layer's first name is diffusers'
        self._predict = parts.predict
        first: Any = host["input_blocks.0.0"]
        if first.in_channels != 4:
            raise SpectralAdapterError(
                f"a UNet with {first.in_channels} input channels: expected 4; inpainting and editing models "
                "cannot be trained on"
            )
        cross = next((m for p, m in host.items() if p.endswith("attn2.to_k")), None)
        is_xl = len(parts.text) > 1
        narrow = first.out_channels < NARROW
        self.config = SimpleNamespace(
            in_channels=4,
            sample_size=_NARROW_SIZE >> (parts.levels - 1) if narrow else _SIZES[is_xl],
            cross_attention_dim=None if cross is None else int(cross.in_features),  # type: ignore[arg-type]
        )
        self._first = first

    @property
    def dtype(self) -> torch.dtype:
        return self._first.weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self._first.weight.device  # type: ignore[no-any-return]

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> SimpleNamespace:
        steps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        vector = None
        if added_cond_kwargs is not None:
            pooled, sizes = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            told = sinusoids(sizes.flatten(), _EACH).reshape(len(sizes), -1)
            vector = torch.cat([pooled.float(), told], 1).to(pooled.dtype)
        return SimpleNamespace(sample=self._predict(sample, steps, encoder_hidden_states, vector))


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): cosines, then sines, of wavelengths up to 10000."""
    half = width // 2
    rates = torch.exp(-torch.arange(half, device=values.device) * (torch.log(torch.tensor(10000.0)) / half))
    angles = values.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *folders, last = path.split(".")
    for step in folders:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        inner = root._modules[step]
        assert inner is not None
        root = inner
    root.add_module(last, module)


class _Words(nn.Module):
    """The host's embedding of tokens, in front of which new words can be put."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.inner = embedding

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.inner.weight)


class TextEncoder(nn.Module):
    """A host's text encoder, called as transformers' is."""

    def __init__(self, part: TextPart) -> None:
        super().__init__()
        if part.tree is not None:
            for name, child in part.tree.named_children():
                self.add_module(name, child)
        self.words = _Words(part.embedding)
        self._encode = part.encode

    def get_input_embeddings(self) -> _Words:
        return self.words

    def forward(self, ids: Tensor, output_hidden_states: bool = False) -> _Encoded:
        embedding = self.words.inner
        known = ids < embedding.num_embeddings
        with _called(embedding, lambda _: self.words(ids).to(embedding.weight.dtype)):
            # The host looks for the end of the text by its number, which a new word's must not be above.
            states, pooled = self._encode(torch.where(known, ids, torch.zeros_like(ids)))
        return _Encoded(states, pooled)


class _Encoded:
    """``[0]``: the states, or what is pooled from them where there is that; ``hidden_states[-2]``: states."""

    def __init__(self, states: Tensor, pooled: Tensor | None) -> None:
        self._first = states if pooled is None else pooled
        self.hidden_states = (states, states)

    def __getitem__(self, place: int) -> Tensor:
        return (self._first,)[place]


@contextmanager
def _called(module: nn.Module, instead: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``instead`` in place of a module's forward."""
    had_own, own = "forward" in vars(module), module.forward
    module.forward = instead  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had_own:
            module.forward = own  # type: ignore[method-assign]
        else:
            vars(module).pop("forward", None)


class Autoencoder:
    """Pictures to latents as the denoiser wants them, which is why there is no scale left, and back."""

    def __init__(self, parts: Parts, unet: Denoiser) -> None:
        self._parts, self._unet = parts, unet
        self.config = SimpleNamespace(
            scaling_factor=1.0, shift_factor=0.0, block_out_channels=(0,) * parts.levels
        )
        self.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return self._unet.device

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        latents = self._parts.encode(pictures)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents: Tensor) -> Tensor:
        return self._parts.decode(latents)


def _picture(pixels: Tensor) -> Image.Image:
    """From (3, H, W) in [−1, 1]."""
    values = ((pixels.float().cpu().permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
    return Image.fromarray(values.to(torch.uint8).numpy())


class OpenTokens:
    """A tokenizer of open_clip's kind as transformers' are called; new words can be added."""

    model_max_length = 77

    def __init__(self, encode: Callable[[str], list[int]], vocabulary: Mapping[str, int], pad: int) -> None:
        self._encode, self._vocabulary, self._pad = encode, vocabulary, pad
        self._added: dict[str, int] = {}
        self.bos_token_id = vocabulary["<start_of_text>"]
        self.eos_token_id = vocabulary["<end_of_text>"]

    def __deepcopy__(self, memo: Any) -> OpenTokens:
        other = copy.copy(self)
        other._added = dict(self._added)
        return other

    def __len__(self) -> int:
        return len(self._vocabulary) + len(self._added)

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary, **self._added}

    def add_tokens(self, names: Sequence[str]) -> None:
        for name in names:
            self._added.setdefault(name, len(self))

    def convert_tokens_to_ids(self, name: str) -> int:
        return self.get_vocab()[name]

    def __call__(
        self,
        texts: str | Sequence[str],
        add_special_tokens: bool = True,
        max_length: int = model_max_length,
        **_: Any,
    ) -> SimpleNamespace:
        if not add_special_tokens:
            assert isinstance(texts, str)
            return SimpleNamespace(input_ids=self._ids(texts))
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = [self.bos_token_id, *self._ids(text)[: max_length - 2], self.eos_token_id]
            rows.append(ids + [self._pad] * (max_length - len(ids)))
        return SimpleNamespace(input_ids=torch.tensor(rows))

    def _ids(self, text: str) -> list[int]:
        """With the added words taken out first, longest before those that they begin with."""
        for word in sorted(self._added, key=len, reverse=True):
            before, found, after = text.partition(word)
            if found:
                return [*self._ids(before), self._added[word], *self._ids(after)]
        return self._encode(text) if text.strip() else []
