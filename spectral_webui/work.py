"""Starts the jobs that need the webui's loaded model: training, distilling, fusing by what layers see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import tools, training
from .extension import Extension, host_of
from .jobs import Job
from .pipeline import HostPipeline


def train(extension: Extension, images: str, token: str, name: str, values: Mapping[str, Any]) -> Job:
    """Raises SpectralAdapterError while another job runs, as the other two do."""
    name = name.strip() or "".join(c for c in token if c.isalnum() or c in "-_") or "concept"

    def work(job: Job) -> tuple[str, Any]:
        return training.train(extension.library, lambda: _opened(extension), images, token, name, values, job)

    return extension.jobs.start("train", name, work)


def fuse(
    extension: Extension,
    names: Sequence[str],
    weights: Sequence[float],
    method: str,
    rank: int,
    freeze_gates: bool,
    prompts: str,
    name: str,
) -> Job:
    """Any method; only those that look at layers need the model."""

    def work(job: Job) -> tuple[str, Any]:
        if method not in training.METHODS:
            found = tools.fused(extension.library, names, weights, method, rank, freeze_gates, name)
            return found[1], found[2]
        return training.fuse_seen(
            extension.library,
            lambda: _opened(extension),
            names,
            weights,
            method,
            rank,
            freeze_gates,
            prompts,
            name,
            job,
        )

    return extension.jobs.start("fuse", name or "fused", work)


def distil(
    extension: Extension,
    names: Sequence[str],
    weights: Sequence[float],
    rank: int,
    prompts: str,
    name: str,
    values: Mapping[str, Any],
) -> Job:
    def work(job: Job) -> tuple[str, Any]:
        return training.distilled(
            extension.library,
            lambda: _opened(extension),
            names,
            weights,
            rank,
            prompts,
            name,
            values,
            job,
        )

    return extension.jobs.start("distil", name or "distilled", work)


@contextmanager
def _opened(extension: Extension) -> Iterator[HostPipeline]:
    """The model that the webui has loaded, or loads now."""
    from modules import sd_models, shared

    if hasattr(sd_models, "forge_model_reload"):
        sd_models.forge_model_reload()
    sd_model = shared.sd_model
    extension.clear()  # nothing of an interrupted picture may be in what is learned
    with host_of(sd_model).pipeline(sd_model) as pipe:
        yield pipe
