"""The mode in which nodes make tensors that may live on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import dtype as Dtype


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside can be trained later; those of the host's inference mode cannot."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        yield


def dtype(precision: str) -> Dtype | None:
    """The type of a precision widget's choice; None for ``as is``."""
    import torch

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return types.get(precision)
