"""Starts the jobs that need the webui's loaded model: training, distilling, fusing by what layers see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def fuse(extension: Extension, asked: tools.FuseSettings) -> Job:
    """Any method; only those that look at layers need the model."""

    def work(job: Job) -> tuple[str, Any]:
        if asked.method not in training.METHODS:
            found = tools.fused(extension.library, asked)
            return found[1], found[2]
        return training.fuse_seen(extension.library, lambda: _opened(extension), asked, job)

    return extension.jobs.start("fuse", asked.name or "fused", work)


def distil(extension: Extension, asked: tools.FuseSettings, values: Mapping[str, Any]) -> Job:
    def work(job: Job) -> tuple[str, Any]:
        return training.distilled(extension.library, lambda: _opened(extension), asked, values, job)

    return extension.jobs.start("distil", asked.name or "distilled", work)


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
