"""Adapters on a diffusers pipeline: applied live for a while, merged, and pictures made with them.

Applying changes no weight: it hooks the modules' forwards, tells the adapters the noise level at each call
of the denoiser, and adds their trained words to the tokenizer. Removing it leaves the pipeline as it was,
to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..adapter.adapter import Adapter, require_adapter
from ..attach.attaching import Attachment, attach
from ..errors import SpectralAdapterError
from ..gates.record import GateRecorder
from .loading import parts_of
from .tokens import TokenRows


class Applied:
    """Adapters on a pipeline; a context manager, and an object with ``remove()``.

    ``recorder`` collects the open gates of adaptive adapters per layer and noise level.
    """

    def __init__(self, pipe: Any, adapters: Sequence[Adapter], recorder: GateRecorder | None = None) -> None:
        self.attachments: list[Attachment] = []
        self._tokens: TokenRows | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            self._set_up(pipe, adapters, recorder)
        except BaseException:
            self.remove()
            raise

    def _set_up(self, pipe: Any, adapters: Sequence[Adapter], recorder: GateRecorder | None) -> None:
        modules = parts_of(pipe)
        if not modules:
            raise SpectralAdapterError(
                f"{type(pipe).__name__} is no pipeline with a model in it: open one with load_pipeline()"
            )
        for place, adapter in enumerate(adapters):
            require_adapter(adapter, f"input {place + 1}")
            if missing := [part for part in adapter.parts if part not in modules]:
                raise SpectralAdapterError(
                    f"adapter {adapter.provenance.name or '(unnamed)'} changes {missing[0]!r}, which this "
                    f"pipeline does not have: it has {', '.join(modules)}"
                )
        tokens = merged_tokens(adapters)
        if tokens:
            self._tokens = TokenRows(pipe, tokens)
        for adapter in adapters:
            for part in adapter.parts:
                attachment = attach(modules[part], adapter, part=part)
                self.attachments.append(attachment)
                attachment.gates.recorder = recorder
        denoiser = modules.get("unet", modules.get("transformer"))
        if denoiser is not None:
            self._follow_noise(denoiser, pipe.scheduler.config.num_train_timesteps)

    def _follow_noise(self, denoiser: nn.Module, timesteps: int) -> None:
        """Tell every attachment the progress of each call, 1 − t / (T − 1)."""
        original = denoiser.forward
        had_own = "forward" in vars(denoiser)

        def forward(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            steps = torch.as_tensor(timestep).float()
            progress = (1 - steps / (timesteps - 1)).clamp(0, 1)
            for attachment in self.attachments:
                attachment.set_progress(float(progress) if progress.dim() == 0 else progress)
            return original(sample, timestep, *args, **kwargs)

        def restore() -> None:
            if had_own:
                denoiser.forward = original
            else:
                vars(denoiser).pop("forward", None)

        denoiser.forward = forward
        self._undo.append(restore)

    def remove(self) -> None:
        """Take everything off again; harmless twice."""
        while self._undo:
            self._undo.pop()()
        while self.attachments:
            self.attachments.pop().remove()
        if self._tokens is not None:
            self._tokens.remove()
            self._tokens = None

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply(pipe: Any, *adapters: Adapter, recorder: GateRecorder | None = None) -> Applied:
    """Put adapters on a pipeline: live, and gone with the block. See :class:`Applied`.

    >>> import spectral_core as sc
    >>> pipe = sc.load_pipeline()
    >>> weights, _ = sc.find_targets(pipe.unet, "unet", "attention")
    >>> adapter = sc.create(weights, sc.LoRAConfig(rank=2))
    >>> with sc.apply(pipe, adapter.scaled(0.8)):
    ...     pictures = sc.generate(pipe, ["a red star"], seeds=[1], steps=1)
    """
    return Applied(pipe, adapters, recorder)


def merged_tokens(adapters: Sequence[Adapter]) -> dict[str, dict[str, Tensor]]:
    """All adapters' trained words; the same word with different vectors is refused."""
    tokens: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        for token, rows in adapter.tokens.items():
            known = tokens.get(token)
            if known is not None and any(not torch.equal(known[p], rows[p]) for p in rows if p in known):
                raise SpectralAdapterError(
                    f"two adapters bring the word {token!r} with different meanings: apply one of them, or "
                    "retrain one with another token"
                )
            tokens.setdefault(token, {}).update(rows)
    return tokens


@torch.inference_mode()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], object] | None = None,
) -> list[Image.Image]:
    """One picture per (prompt, seed) pair; a picture depends on its own seed only, not on the batch.

    size is (width, height) in pixels, the pipeline's own when None. on_batch gets the number of pictures
    just made.

    >>> import spectral_core as sc
    >>> [picture] = sc.generate(sc.load_pipeline(), ["a red star"], seeds=[1], steps=1)
    >>> picture.size
    (128, 128)
    """
    if len(prompts) != len(seeds):
        raise SpectralAdapterError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected as many of each")
    pictures: list[Image.Image] = []
    sides = {} if size is None else {"width": size[0], "height": size[1]}
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[start : start + batch_size]]
        out = pipe(chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators, **sides)
        pictures += out.images
        if on_batch is not None:
            on_batch(len(chunk))
    return pictures
