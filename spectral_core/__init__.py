"""Spectral adapters: FouRA and Spectral Adapter for diffusion models, in plain PyTorch.

    import spectral_core as sc

    adapter = sc.load("vase.safetensors")
    with sc.attach(model, adapter.scaled(0.8)):
        ...

Everything in ``__all__`` is imported when it is first asked for; what lies behind it is found in the rooms
(``spectral_core.files``, ``spectral_core.fusion``, …).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# ``attach`` is also the name of a room. Importing a room sets it here, once: what is imported now stays.
from .attach.attaching import attach
from .errors import SpectralAdapterError

if TYPE_CHECKING:
    from .adapter.adapter import Adapter, create
    from .attach.merging import merge_into
    from .attach.targets import find_targets
    from .files.adapter_file import inspect, load, save
    from .files.lora_export import export_lora
    from .files.lora_import import import_lora
    from .fusion import fuse
    from .methods.foura import FouRAConfig
    from .methods.lora import LoRAConfig
    from .methods.orthogonal import OrthogonalConfig
    from .methods.spectral_a import SpectralAConfig
    from .methods.spectral_r import SpectralRConfig
    from .pipelines.applying import apply, generate
    from .pipelines.distil import distil
    from .pipelines.job import Job
    from .pipelines.loading import load_pipeline
    from .pipelines.train import train_adapter
    from .training.config.config import TrainConfig
    from .training.engine.named_run import Output

__version__ = "0.1.0"

__all__ = [
    # files
    "load",
    "save",
    "inspect",
    "export_lora",
    "import_lora",
    # adapters and their methods
    "Adapter",
    "create",
    "FouRAConfig",
    "SpectralAConfig",
    "SpectralRConfig",
    "OrthogonalConfig",
    "LoRAConfig",
    # on a model
    "find_targets",
    "attach",
    "merge_into",
    # several become one
    "fuse",
    "distil",
    # with diffusers
    "load_pipeline",
    "apply",
    "generate",
    "train_adapter",
    "Job",
    "TrainConfig",
    "Output",
    "SpectralAdapterError",
]

_HOMES = {
    "load": ".files.adapter_file",
    "save": ".files.adapter_file",
    "inspect": ".files.adapter_file",
    "export_lora": ".files.lora_export",
    "import_lora": ".files.lora_import",
    "Adapter": ".adapter.adapter",
    "create": ".adapter.adapter",
    "FouRAConfig": ".methods.foura",
    "SpectralAConfig": ".methods.spectral_a",
    "SpectralRConfig": ".methods.spectral_r",
    "OrthogonalConfig": ".methods.orthogonal",
    "LoRAConfig": ".methods.lora",
    "find_targets": ".attach.targets",
    "merge_into": ".attach.merging",
    "fuse": ".fusion",
    "distil": ".pipelines.distil",
    "load_pipeline": ".pipelines.loading",
    "apply": ".pipelines.applying",
    "generate": ".pipelines.applying",
    "train_adapter": ".pipelines.train",
    "Job": ".pipelines.job",
    "TrainConfig": ".training.config.config",
    "Output": ".training.engine.named_run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
