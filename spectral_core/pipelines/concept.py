"""Train one concept on a diffusers pipeline: pictures with captions in, an adapter out. The pipeline stays
as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Provenance, create
from ..adapter.fingerprint import fingerprint
from ..attach.attaching import attach
from ..attach.targets import find_targets
from ..errors import SpectralAdapterError
from ..maths.svd import Columns, select_columns
from ..maths.svd_cache import SVDCache
from ..methods import Basis, MethodConfig, method_of
from ..training.config.config import TrainConfig
from ..training.data.folder import Example, Order, find_examples, load_pictures
from ..training.engine.loop import Listener, Setup, evaluation_loss, train
from ..training.objectives.diffusion import Diffusion
from ..training.runs.outcome import TrainResult
from .conditioning import CaptionCache
from .loading import family_of
from .tokens import TokenRows, initial_rows


@dataclass(frozen=True)
class ConceptConfig:
    """What to train: a word, the layers (targets of the denoiser), and from which words the new one starts.

    init_words empty: the token is not made a new word, it stays as the tokenizer writes it.
    """

    token: str
    targets: str = "attention"
    init_words: str = "object"
    size: tuple[int, int] = (512, 512)

    def __post_init__(self) -> None:
        if not self.token.strip() or any(c.isspace() for c in self.token):
            raise SpectralAdapterError(
                f"token {self.token!r}: expected one word without spaces, such as <mydog>"
            )


@dataclass(frozen=True)
class TrainedConcept:
    """The adapter, the run, and the evaluation loss before and after it."""

    adapter: Adapter
    result: TrainResult
    loss_before: float
    loss_after: float


def train_concept(
    pipe: Any,
    folder: str | Path,
    concept: ConceptConfig,
    method: MethodConfig,
    config: TrainConfig,
    *,
    cache: SVDCache | None = None,
    listener: Listener | None = None,
) -> TrainedConcept:
    """Train ``method`` on the pictures of a folder (kohya layout). Ctrl-C keeps what was learned
    (result.stopped)."""
    examples = find_examples(folder, concept.token)
    latents = encode_pictures(pipe, load_pictures(examples, *concept.size))
    weights, _ = find_targets(pipe.unet, "unet", concept.targets)
    generator = torch.Generator().manual_seed(config.seed)
    provenance = Provenance(
        name=concept.token.strip("<>"),
        family=family_of(pipe),
        base=fingerprint(weights),
        trigger_words=(concept.token,),
        training=_training_record(folder, examples, concept, config),
    )
    adapter = create(weights, method, basis_source(method, cache), generator, provenance)
    new_words = {concept.token: initial_rows(pipe, concept.init_words)} if concept.init_words else {}
    tokens = TokenRows(pipe, new_words, trainable=True)
    try:
        with attach(pipe.unet, adapter, part="unet", trainable=True) as attachment:
            setup = Setup(
                denoiser=_denoiser(pipe, examples, concept, learns_words=bool(new_words)),
                latents=latents,
                order=Order(examples, config.batch_size, config.seed),
                diffusion=diffusion_of(pipe),
                attachments=[attachment],
                tokens=[p for rows in tokens.parameters.values() for p in rows.values()],
            )
            with attachment.gates.inference():
                before = evaluation_loss(setup)
            result = train(setup, config, method.method, listener)
            trained = replace(attachment.to_adapter(), tokens=tokens.values(), provenance=provenance)
            with attachment.gates.inference():
                after = evaluation_loss(setup)
    finally:
        tokens.remove()
    return TrainedConcept(trained, result, before, after)


def basis_source(method: MethodConfig, cache: SVDCache | None) -> Callable[[str, Tensor], Basis] | None:
    """Where a spectral method gets its singular columns: the cache, or computed afresh."""
    if not method_of(method).needs_basis:
        return None
    columns = Columns.listed(method.singular_columns)

    def basis(_: str, weight: Tensor) -> Basis:
        found = select_columns(weight, columns) if cache is None else cache.get_or_compute(weight, columns)
        return found.u, found.s, found.v

    return basis


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: Tensor, batch_size: int = 8) -> Tensor:
    """Latents (N, C, h, w) of pictures (N, 3, H, W) in [−1, 1]: the encoder's mean, scaled as the denoiser
    wants it."""
    vae = pipe.vae
    parts = []
    for chunk in pictures.split(batch_size):
        mean = vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist.mode()
        parts.append((mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)
    return torch.cat(parts).to(pipe.unet.device, pipe.unet.dtype)


def diffusion_of(pipe: Any) -> Diffusion:
    """The pipeline's noise schedule and kind of prediction."""
    scheduler = pipe.scheduler
    return Diffusion(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)


def _denoiser(pipe: Any, examples: Sequence[Example], concept: ConceptConfig, learns_words: bool) -> Any:
    captions = CaptionCache(pipe, concept.size, keep=not learns_words)

    def denoise(noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None]) -> Tensor:
        conditioning = captions.encode(["" if i is None else examples[i].caption for i in indices])
        prediction: Tensor = pipe.unet(noisy, timesteps, **conditioning).sample
        return prediction

    return denoise


def _training_record(
    folder: str | Path, examples: Sequence[Example], concept: ConceptConfig, config: TrainConfig
) -> dict[str, Any]:
    """What a user wants to know later; the folder's name only, never its path."""
    return {
        "pictures": len(examples),
        "folder": Path(folder).name,
        "targets": concept.targets,
        "resolution": list(concept.size),
        **config.as_dict(),
    }
