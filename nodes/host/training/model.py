"""The host's own model as the denoiser of a training, under the executor's inference mode, and its noise.

The executor's tensors are inference tensors, which autograd refuses to keep for the backward pass. So the
model is unloaded, its weights are replaced by copies with the same numbers, and it is loaded again, all
outside inference mode; what is trained acts through :mod:`spectral_core.attach.attaching`. Afterwards the
model is unloaded: its numbers are what they were, whatever happened in between.

Shapes: latents, noise and noisy (B, C, H, W) or (B, C, T, H, W); indices of noise levels (B,), 0 the
cleanest; σ (B,).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.training.objectives.diffusion import UNIFORM, Shares, discrete_timesteps, min_snr
from ..model import compat, noise, streaming

_NO_DERIVATIVE = ("no autograd formula", "the derivative for", "not differentiable")
_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, AssertionError)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class HostNoise:
    """The noise levels and the kind of prediction of the model at hand, asked of its ``model_sampling``.

    A level is its place in the model's own table of σ. The host's ``calculate_denoised`` gives
    D = a(σ)·x + b(σ)·F of the network's answer F, so F = (D − a·x) / b, and its target is (x₀ − a·x) / b: the
    noise for ε-models, the velocity for v- and flow models.
    """

    sampling: Any
    sigmas: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", self.sampling.sigmas.detach().clone().float().cpu())

    def sigma(self, levels: Tensor) -> Tensor:
        return self.sigmas.to(levels.device)[levels]

    def _coefficients(self, levels: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones(len(levels), *(1,) * (like.dim() - 1), device=like.device)
        zero, sigma = torch.zeros_like(one), self.sigma(levels).to(like.device)
        calculate = self.sampling.calculate_denoised
        return calculate(sigma, zero, one), calculate(sigma, one, zero)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self.sigma(timesteps).to(latents.device)
        noisy: Tensor = self.sampling.noise_scaling(sigma, noise.clone(), latents, False)
        return noisy

    def prediction(self, denoised: Tensor, noisy: Tensor, levels: Tensor) -> Tensor:
        """The network's own answer, from the host's estimate of the clean latents."""
        a, b = self._coefficients(levels, noisy)
        return (denoised - a * noisy) / b

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.prediction(latents, self.add_noise(latents, noise, timesteps), timesteps)

    def progress(self, timesteps: Tensor) -> Tensor:
        found = noise.progress_of(self.sampling, self.sigma(timesteps))
        return found if isinstance(found, Tensor) else torch.full((len(timesteps),), found)

    def sample_timesteps(self, count: int, generator: torch.Generator, shares: Shares = UNIFORM) -> Tensor:
        return discrete_timesteps(len(self.sigmas), count, generator, shares)

    def levels(self, count: int) -> Tensor:
        return torch.linspace(0, len(self.sigmas) - 1, count + 2)[1:-1].long()

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        kind = comfy.model_sampling
        if not isinstance(self.sampling, kind.EPS) or isinstance(self.sampling, (kind.EDM, kind.X0)):
            raise SpectralAdapterError(
                "weighting 'min-snr': it is defined for ε- and v-models, and this one is another kind; use "
                "'none', with timesteps 'logit-normal' to stress the middle levels"
            )
        snr = self.sigma(timesteps).double().square().reciprocal()
        prediction = "v_prediction" if isinstance(self.sampling, kind.V_PREDICTION) else "epsilon"
        return min_snr(snr, gamma, prediction)


@dataclass(frozen=True)
class Ready:
    """A loaded model that can train: its patcher, the options of its calls, its noise, its precision, and
    what makes its weights again where they are streamed in."""

    patcher: Any
    options: Mapping[str, Any]
    noise: HostNoise
    precision: str
    streams: streaming.Streams

    def make_room(self) -> bool:
        """Take half of what is on the device off it; whether something was left to take."""
        return streaming.make_room(self.patcher, 0.5)

    @property
    def root(self) -> nn.Module:
        return self.patcher.model.diffusion_model  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device  # type: ignore[no-any-return]


@contextmanager
def ready(model: Any, precision: str, shape: Sequence[int], offload: str = "auto") -> Iterator[Ready]:
    """The MODEL, loaded and frozen, outside inference mode and with gradients; unloaded again at the end.

    precision: fp32, bf16, fp16, or auto for what the model computes in. shape: of a batch of latents.
    offload: how much of it is streamed in (:func:`..model.streaming.load`).
    """
    unload(model)  # in the mode in which it was loaded
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        own = compat.with_own_weights(model)
        made: Replaced = []
        undo.callback(as_loaded, made)
        undo.callback(unload, own)
        undo.callback(unload, model)
        made += make_normal(own.model)
        patcher = own.clone()
        undo.callback(unload, patcher)
        if precision != "auto":
            patcher.set_model_compute_dtype({name: dtype for dtype, name in DTYPES.items()}[precision])
        else:
            precision = DTYPES.get(compat.compute_dtype(patcher), "fp32")
        undo.enter_context(compat.in_training())
        undo.enter_context(_host_explained(type(model.model).__name__))
        options: dict[str, Any] = {"transformer_options": {"cond_or_uncond": [0]}}
        options["transformer_options"].update(patcher.model_options.get("transformer_options", {}))
        comfy.sampler_helpers.prepare_model_patcher(patcher, {}, options)
        needed = patcher.model.memory_required([2 * shape[0], *shape[1:]])
        streaming.load(patcher, offload, needed)
        streams = undo.enter_context(streaming.streamed(patcher.model))
        patcher.pre_run()
        undo.callback(patcher.cleanup)
        undo.callback(compat.forget, patcher.model)
        undo.enter_context(frozen(patcher.model))
        sampling = patcher.model.model_sampling
        yield Ready(patcher, options["transformer_options"], HostNoise(sampling), precision, streams)


@contextmanager
def _host_explained(name: str) -> Iterator[None]:
    """A kernel without a derivative, and a model class that fails in code of its own (0.3.64's Hunyuan3D 2.1
    only takes batches with a negative prompt), as errors that say so; they stop the first step."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        text = str(error)
        if not any(words in text for words in _NO_DERIVATIVE):
            raise
        said = text.splitlines()[0].partition(". ")[0][:120]
        raise SpectralAdapterError(
            f"{name} cannot train on this ComfyUI: it computes with a kernel without a derivative ({said}). "
            "ComfyUI 0.28 and newer have a form of it for training: update ComfyUI"
        ) from error
    except _MISTAKES as error:
        where = _raised_in(error)
        if not where.startswith("comfy."):
            raise
        raise SpectralAdapterError(
            f"{name} cannot train on this ComfyUI: its own code failed in {where} "
            f"({type(error).__name__}: {str(error)[:120]}). A newer ComfyUI may be able to: update it"
        ) from error


def _raised_in(error: BaseException) -> str:
    """The module whose code raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def unload(patcher: Any) -> None:
    """Take the model, and whatever clone of it is loaded, off the device; its weights are its own again."""
    loaded = comfy.model_management.current_loaded_models
    for index in reversed(range(len(loaded))):
        if loaded[index].model is not None and patcher.is_clone(loaded[index].model):
            loaded.pop(index).model_unload()


Replaced = list[tuple[dict[str, Any], str]]


def make_normal(root: nn.Module) -> Replaced:
    """Every inference tensor of a tree replaced by one with the same numbers that autograd accepts, those too
    that modules made while they ran (tables of positions); which of them they are."""
    copies: dict[int, Any] = {}
    replaced: Replaced = []

    def normal(value: Any, is_parameter: bool) -> Any:
        if id(value) not in copies:
            copy = compat.packed_copy(value) if compat.is_packed(value) else value.detach().clone()
            copies[id(value)] = nn.Parameter(copy, value.requires_grad) if is_parameter else copy
        return copies[id(value)]

    with torch.no_grad():
        for module in root.modules():
            for table in (module._parameters, module._buffers, vars(module)):
                for name, value in table.items():
                    if isinstance(value, Tensor) and value.is_inference():
                        replaced.append((table, name))
                        table[name] = normal(value, table is module._parameters)
    return replaced


def as_loaded(replaced: Replaced) -> None:
    """Inference tensors again. The host cannot move quantised ones from outside of inference mode within it;
    and torch takes another way through some functions (``rms_norm``) for a weight that may have a gradient,
    to other last bits."""
    found: dict[int, Any] = {}
    with torch.inference_mode():
        for table, name in replaced:
            value: Any = table[name]
            if id(value) not in found:
                fresh = compat.as_inference(value)
                is_parameter = isinstance(value, nn.Parameter) and fresh is not value
                found[id(value)] = nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh
            table[name] = found[id(value)]


@contextmanager
def frozen(root: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class HasRows(Protocol):
    """Gives the model's keyword arguments for a batch of examples: :class:`Conditions` and
    :class:`.text.Conditions`."""

    def rows(self, indices: Sequence[int | None], shape: tuple[int, ...]) -> dict[str, Any]: ...


class Conditions:
    """The model's keyword arguments for each example, worked out once by the host's own code.

    entries: [tensor, options] of a CONDITIONING by example, None for the dropped caption, below 0 for words
    of no example.
    """

    def __init__(self, patcher: Any, entries: Mapping[int | None, Any], latents: Sequence[Tensor]) -> None:
        self._known: dict[tuple[int | None, tuple[int, ...]], dict[str, Any]] = {}
        self._device = patcher.load_device
        shapes = [tuple(latent.shape) for latent in latents]
        with torch.no_grad():
            for index, entry in entries.items():
                for shape in {shapes[index]} if index is not None and index >= 0 else set(shapes):
                    self._known[index, shape] = encoded(patcher, entry, shape)

    def rows(self, indices: Sequence[int | None], shape: tuple[int, ...]) -> dict[str, Any]:
        """Keyword arguments for a batch; SpectralAdapterError where its conditionings cannot be joined."""
        return joined([self._known[index, shape] for index in indices], indices, self._device)


def joined(
    rows: Sequence[dict[str, Any]], indices: Sequence[int | None], device: torch.device
) -> dict[str, Any]:
    """Several :func:`encoded` as one batch of keyword arguments."""
    first = rows[0]
    for other in rows[1:]:
        if other.keys() != first.keys() or not all(first[k].can_concat(other[k]) for k in first):
            raise SpectralAdapterError(
                f"the conditionings of examples {list(indices)} are of different kinds and cannot share a "
                "batch; set batch_size to 1 and use accumulation instead"
            )
    return _moved(comfy.samplers.cond_cat(list(rows)), device)  # type: ignore[no-any-return]


def encoded(patcher: Any, entry: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The host's conditions of a [tensor, options] entry, for latents of one shape (C, H, W)."""
    device = patcher.load_device
    latent = torch.zeros(1, *shape, device=device)
    (found,) = comfy.samplers.encode_model_conds(
        patcher.model.extra_conds,
        comfy.sampler_helpers.convert_cond([_moved(entry)]),
        latent,
        device,
        "positive",
        latent_image=latent,
        denoise_mask=None,
        seed=0,
        latent_shapes=[latent.shape],  # as the host's sampler says of one latent
    )
    conds = found["model_conds"]
    return {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}


def _moved(value: Any, device: torch.device | None = None) -> Any:
    """The same on a device; without one a copy, of tensors that autograd accepts."""
    if isinstance(value, Tensor):
        return value.clone() if device is None else value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


@dataclass(frozen=True)
class Denoiser:
    """The host's model as the trainer's callable: its own call, its own conditions."""

    ready: Ready
    conditions: HasRows

    def __call__(self, noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None]) -> Tensor:
        conditions = self.conditions.rows(indices, tuple(noisy.shape[1:]))
        sigma = self.ready.noise.sigma(timesteps).to(noisy.device)
        denoised = self.denoised(noisy, sigma, conditions)
        return self.ready.noise.prediction(denoised, noisy, timesteps)

    def denoised(self, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """The host's estimate of the clean latents at noise levels σ (B,)."""
        levels = self.ready.noise.sigmas.to(noisy.device).flip(0)
        steps = torch.cat([levels, levels.new_zeros(1)])  # models that ask for the next level (MeanFlow)
        options = {**self.ready.options, "sigmas": sigma, "sample_sigmas": steps}
        model = self.ready.patcher.model
        given = {**conditions, **compat.anew(model)}
        compat.forget(model)
        try:
            found: Tensor = model.apply_model(noisy, sigma, transformer_options=options, **given)
        except comfy.model_management.InterruptProcessingException as stop:  # some models look for it
            raise KeyboardInterrupt from stop  # the trainer's word for it: no error
        finally:
            compat.forget(model)
        return found.float()
