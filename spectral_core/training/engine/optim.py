"""Optimisers: which parameters learn at which rate, and how each optimiser is made.

Groups: the denoiser's adapters, the text encoders', new words, and the gates of both. No weight decay on
words and gates (whose biases must not drift towards a half-open gate). Gates have an optimiser of their own,
always Adam, whose rate means how far a logit moves a step: so they decide alike beside every other optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ...errors import SpectralAdapterError
from ...gates.formula import trained_tensor
from ..config.config import TrainConfig

TEXT_SHARE = 0.5  # of the adapter's rate, for text encoders: FouRA's 5e-5 beside 1e-4
TOKEN_FACTOR = 10.0  # of the adapter's rate, for new words


@dataclass(frozen=True)
class Group:
    """Parameters with one peak learning rate, rate · factor, and weight decay. ``label`` is for events. Of
    gates the rate is :meth:`TrainConfig.gate_rate`'s; the factor is the attachment's (``rate_factors``)."""

    label: str
    parameters: tuple[nn.Parameter, ...]
    rate: float
    weight_decay: float
    is_gate: bool = False
    factor: float = 1.0


def groups(
    named: Iterable[tuple[str, nn.Parameter]],
    tokens: Sequence[nn.Parameter],
    config: TrainConfig,
    method: str,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> list[Group]:
    """The groups that have parameters. named: ``<part>.<path>.<tensor>`` of every adapter parameter. factors:
    by the same name, of rates; prodigy, which finds one rate for all, does without."""
    rate = config.rate_for(method)
    scales = config.optimiser == "prodigy"  # it knows one rate: what is given are multiples of it
    text = config.text_learning_rate or (rate if scales else TEXT_SHARE * rate)
    words = config.token_learning_rate or (rate if scales else TOKEN_FACTOR * rate)
    named = list(named)

    def chosen(is_text: bool, is_gate: bool) -> tuple[nn.Parameter, ...]:
        return tuple(
            p
            for name, p in named
            if name.startswith("text_encoder") == is_text and bool(trained_tensor(name)) == is_gate
        )

    known = {p: factors.get(name, 1.0) for name, p in named} if not scales else {}

    def adapters(label: str, is_text: bool, rate: float) -> list[Group]:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for p in chosen(is_text, False):
            by_factor.setdefault(known.get(p, 1.0), []).append(p)
        decay = config.weight_decay
        return [Group(label, tuple(ps), rate, decay, factor=factor) for factor, ps in by_factor.items()]

    found = [
        *adapters("adapter", False, rate),
        *adapters("text encoder", True, text),
        Group("words", tuple(tokens), words, 0.0),
        Group("gates", chosen(False, True), config.gate_rate(), 0.0, is_gate=True),
        Group("text encoder gates", chosen(True, True), config.gate_rate(), 0.0, is_gate=True),
    ]
    found = [group for group in found if group.parameters]
    if not found:
        raise SpectralAdapterError(
            "nothing to train: the attachments have no parameters; attach the adapter with trainable=True"
        )
    if scales and len({group.rate for group in found if not group.is_gate}) > 1:
        raise SpectralAdapterError(
            "optimiser prodigy knows one learning rate for all parameters: leave text_learning_rate and "
            "token_learning_rate at 0"
        )
    return found


def build(found: Sequence[Group], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimiser of the configuration, and that of the gates where there are some; together they have the
    groups in their order."""
    made = []
    for is_gate, builder in ((False, BUILDERS[config.optimiser]), (True, _adamw)):
        groups_ = [
            {"params": list(g.parameters), "lr": g.rate * g.factor, "weight_decay": g.weight_decay}
            for g in found
            if g.is_gate == is_gate
        ]
        if groups_:
            made.append(builder(groups_, config))
    return made


def _adamw(groups_: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """An adapter is hundreds of small tensors: one call for all of them where torch has that.

    It reads a tensor's memory from end to end, so a parameter and its gradient must lie there alike.
    """
    parameters = [p for group in groups_ for p in group["params"]]
    is_plain = all(p.is_contiguous() for p in parameters)
    if is_plain and all(_is_fused(device) for device in {p.device.type for p in parameters}):
        return torch.optim.AdamW(groups_, betas=config.betas, fused=True)
    return torch.optim.AdamW(groups_, betas=config.betas)


@lru_cache(maxsize=8)
def _is_fused(device: str) -> bool:
    """Whether this torch has it for a type of device; some say so only in the first step."""
    tried = nn.Parameter(torch.zeros(1, device=device))
    tried.grad = torch.zeros_like(tried)
    try:
        torch.optim.AdamW([tried], fused=True).step()
    except RuntimeError:
        return False
    return True


def _adafactor(groups_: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """torch's Adafactor without its relative step size.

    It multiplies the rate by max(eps₂, RMS of the parameter); adapters start at zero, where the usual eps₂ =
    1e-3 would stop them. With eps₂ = 1 the rate means what AdamW's means.
    """
    made = getattr(torch.optim, "Adafactor", None)
    if made is None:
        raise SpectralAdapterError(
            f"optimiser 'adafactor': torch {torch.__version__} has none; expected torch 2.5 or newer, or "
            "choose adamw"
        )
    optimiser: torch.optim.Optimizer = made(groups_, eps=(None, 1.0))
    return optimiser


def _sgd(groups_: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups_, lr=groups_[0]["lr"], momentum=config.betas[0])


def _schedulefree(groups_: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise _missing("schedulefree", "schedulefree") from error
    optimiser: torch.optim.Optimizer = AdamWScheduleFree(groups_, betas=config.betas)
    return optimiser


def _prodigy(groups_: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise _missing("prodigy", "prodigyopt") from error
    optimiser: torch.optim.Optimizer = Prodigy(
        groups_, betas=config.betas, safeguard_warmup=True, use_bias_correction=True
    )
    return optimiser


def _adamw8bit(groups_: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW whose averages are of 8 bits, quantised in blocks (Dettmers et al., ICLR 2022, arXiv 2110.02861);
    those of tensors below 4096 numbers stay as they are."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise _missing("adamw8bit", "bitsandbytes") from error
    optimiser: torch.optim.Optimizer = AdamW8bit(groups_, betas=config.betas)
    return optimiser


def _missing(name: str, package: str) -> SpectralAdapterError:
    return SpectralAdapterError(
        f"optimiser {name!r}: the package {package} is not installed; install it with 'pip install "
        f"{package}', or choose adamw"
    )


BUILDERS: dict[str, Callable[[list[dict[str, Any]], TrainConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "schedulefree": _schedulefree,
    "prodigy": _prodigy,
    "adamw8bit": _adamw8bit,
}


def set_train_mode(optimisers: Sequence[torch.optim.Optimizer], on: bool) -> None:
    """Schedule-free optimisers keep other parameters while they train than those to be used; others ignore
    this."""
    for optimiser in optimisers:
        switch = getattr(optimiser, "train" if on else "eval", None)
        if switch is not None:
            switch()
