"""Put adapters on any tree of torch modules, and take them off again without a trace.

``attach`` checks everything first and then gives each target module one instance-level ``forward``
(:mod:`.update`), so that the tree's parameters, buffers and state_dict stay as they are. Attachments stack
in any order and come off in any order; the sum over them is always taken in the same order, by content.

Works with inference_mode, autocast, gradient checkpointing and half-precision or quantised bases, and under
``torch.compile``, which recompiles by itself when an adapter comes or goes.

Shapes: a layer's own; progress is a number or (B,).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter, AdapterLayer, Term, require_adapter
from ..errors import SpectralAdapterError
from ..gates.formula import GateRuntime
from ..methods import method_of
from .dispatcher import Dispatcher
from .factors import folded_together, term_name
from .kinds import update_of
from .placement import AttachReport, joined, place
from .update import Control, LayerUpdate


class Attachment:
    """Adapters on a tree. A context manager; or call :meth:`remove`, in any order among several, twice if
    you like.

    report: which layers found their module. gates: how adaptive gates behave (mode, temperature, recorder,
    penalty).
    """

    def __init__(self, report: AttachReport, gates: GateRuntime) -> None:
        self.report = report
        self.gates = gates
        self._updates: list[tuple[Dispatcher, LayerUpdate]] = []
        self._controls: list[Control] = []
        self._source: Adapter | None = None  # what is being trained

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the adapters off; with the last one of a module it is exactly as it was before the first."""
        for dispatcher, update in reversed(self._updates):
            dispatcher.take_off(update)

    def set_progress(self, progress: float | Tensor) -> None:
        """Where the denoising is, 0 = noisiest … 1 = cleanest: one number, or (B,) for the rows of a batch.

        Follows the adapters' schedules (not in text encoders, which run once before). A batch that is a whole
        repetition of the B rows, as guidance makes it, repeats their values.
        """
        if isinstance(progress, Tensor) and progress.dim() == 0:
            progress = float(progress)
        self.gates.progress = progress
        for control in self._controls:
            control.set_progress(progress)

    def set_strength(self, strength: float) -> None:
        """Multiply the adapters' own strengths, in place of the last such call; 1 at first. Folds nothing
        again."""
        if not isinstance(strength, int | float) or not math.isfinite(strength):
            raise SpectralAdapterError(f"strength {strength!r}: expected a finite number")
        for control in self._controls:
            control.strength = float(strength)
        for dispatcher, _ in self._updates:
            dispatcher.sort()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes as without the adapters, to the bit; afterwards as before."""
        before = [control.strength for control in self._controls]
        self.set_strength(0.0)
        try:
            yield
        finally:
            for control, strength in zip(self._controls, before, strict=True):
                control.strength = strength
            for dispatcher, _ in self._updates:
                dispatcher.sort()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(``<layer>.<tensor>``, parameter) of everything that training changes; nothing if not
        ``trainable``."""
        if self._source is None:
            return
        for _, update in self._updates:
            for i, term in enumerate(update.layer.terms):
                for key in method_of(term.config).trainable(term.config):
                    value = term.params[key]
                    assert isinstance(value, nn.Parameter)
                    yield f"{term_name(str(update.name), i)}.{key}", value

    def rate_factors(self) -> dict[str, float]:
        """``<layer>.<tensor>`` -> the multiplier of its learning rate where that is not 1: 1 / (the mean over
        all layers of how far a step goes).

        Adam moves a tensor by its rate, so that Spectral A's singular columns would each need a rate of their
        own: the last eight about eight times the first eight's. The mean is over all layers because a layer's
        own is too much where its singular values nearly vanish (``benchmarks.quality.gates``).
        """
        reach = {}
        for _, update in self._updates if self._source is not None else ():
            for i, term in enumerate(update.layer.terms):
                name = term_name(str(update.name), i)
                found = method_of(term.config).reach(term.config, term.params)
                reach.update({f"{name}.{key}": value for key, value in found.items()})
        return dict.fromkeys(reach, len(reach) / sum(reach.values())) if reach else {}

    @contextmanager
    def folded_together(self) -> Iterator[None]:
        """For a training step: inside, all layers' factors are folded at once, in few operations.

        Around one forward pass and its backward; no parameter may change in between. Without it every layer
        folds its own when it runs, which gives the same up to rounding. The parameters of a layer that does
        not run may get a gradient of zeros inside, where they get none outside.
        """
        with folded_together(piece for _, update in self._updates for piece in update.pieces):
            yield

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(layer name, module) of every adapted layer."""
        return ((str(update.name), dispatcher.module) for dispatcher, update in self._updates)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Float32 leaf tensors for an optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def to_adapter(self) -> Adapter:
        """The adapter as trained so far, with copies of its tensors (on the devices where it came from)
        and what its gates have learned. Layers that found no module, and other parts, stay as they were."""
        if self._source is None:
            raise SpectralAdapterError("to_adapter() belongs to training: attach with trainable=True")
        learned = self.gates.buffers()
        layers = dict(self._source.layers)
        for _, update in self._updates:
            name = str(update.name)
            new, old = update.snapshot(learned), layers[name]
            terms = tuple(
                replace(n, params={k: v.to(o.params[k].device) for k, v in n.params.items()})
                for n, o in zip(new.terms, old.terms, strict=True)
            )
            layers[name] = replace(new, terms=terms)
        return replace(self._source, layers=layers)


def attach(
    root: nn.Module,
    adapters: Adapter | Iterable[Adapter],
    part: str | None = None,
    trainable: bool = False,
    strict: bool = True,
    device: torch.device | None = None,
) -> Attachment:
    """Apply adapters to a module tree: every target layer then gives W·x + Σ strength · ΔW·x.

    part: whose layers, ``<part>.*``; without it each adapter's only part. trainable: with parameters for
    an optimiser, for one adapter. strict: every layer must have its module and its shape; otherwise
    ``.report`` names those that have not. device: where the parameters lie; without it where the module's
    weight does (of one that is streamed in, that is elsewhere than it computes). The tree's weights and their
    requires_grad stay untouched.

    Raises SpectralAdapterError, with the tree as it was, where a layer or a part does not fit.

    >>> import torch, spectral_core as sc
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> weights, report = sc.find_targets(model, "unet", "all")
    >>> adapter, x = sc.create(weights, sc.FouRAConfig(rank=2)), torch.randn(3, 6)
    >>> with sc.attach(model, adapter):  # a new adapter changes nothing, to the bit
    ...     same = model(x)
    >>> torch.equal(same, model(x))
    True
    """
    if not isinstance(root, nn.Module):
        raise SpectralAdapterError(f"attach to a {type(root).__name__}: expected a torch module")
    single = getattr(adapters, "is_spectral_adapter", False)
    if not single and not isinstance(adapters, Iterable):
        require_adapter(adapters)
    wanted = [cast(Adapter, adapters)] if single else list(cast("Iterable[Adapter]", adapters))
    if not wanted or (trainable and len(wanted) != 1):
        raise SpectralAdapterError(f"found {len(wanted)} adapters, expected {'one' if trainable else 'some'}")
    plans = [(adapter, *place(root, adapter, part, strict)) for adapter in wanted]
    attachment = Attachment(joined([report for _, _, report in plans]), _gates(trainable))
    attachment._source = wanted[0] if trainable else None
    try:
        for adapter, placements, _ in plans:
            control = Control(attachment.gates, adapter.schedule)
            attachment._controls.append(control)
            for p in placements:
                layer = _trainable_copy(p.layer, p.parameter, device) if trainable else p.layer
                strength = adapter.strength_of(str(p.name))
                update = update_of(p.name, p.module)(p.name, layer, strength, control, p.module, trainable)
                dispatcher = Dispatcher.on(p.module)
                attachment._updates.append((dispatcher, update))
                dispatcher.insert(update)
                update.prepare(p.parameter)
    except BaseException:  # an interrupt too must not leave half of it behind
        attachment.remove()
        raise
    return attachment


def _gates(trainable: bool) -> GateRuntime:
    """Where gates start: soft while they learn, hard when they are used."""
    return GateRuntime("soft", 1.0) if trainable else GateRuntime()


def remove_all(root: nn.Module) -> None:
    """Take every adapter off a tree, whoever attached it: for a copy of an adapted tree, which has no
    attachments."""
    for module in root.modules():
        dispatcher = module.__dict__.get("forward")
        if getattr(dispatcher, "is_spectral_dispatcher", False):
            for update in dispatcher.updates:  # type: ignore[union-attr]
                dispatcher.take_off(update)  # type: ignore[union-attr]


def _trainable_copy(layer: AdapterLayer, weight: Tensor, where: torch.device | None) -> AdapterLayer:
    """The layer with its trained tensors as float32 parameters and copies of the others, there or where the
    weight is."""
    terms = []
    for term in layer.terms:
        learns = method_of(term.config).trainable(term.config)
        params: dict[str, Tensor] = {}
        with torch.inference_mode(False):  # an inference tensor cannot learn
            for key, value in term.params.items():
                device = where or (value.device if weight.is_meta else weight.device)
                copy = value.detach().clone().to(device, torch.float32)
                params[key] = nn.Parameter(copy) if key in learns else copy
        terms.append(Term(term.config, params, term.weight))
    return AdapterLayer(layer.shape, tuple(terms))
