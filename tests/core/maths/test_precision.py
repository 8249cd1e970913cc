"""What autocast says, on the torch that is there and on one from before 2.4."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from spectral_core.maths.precision import autocast_dtype, full_precision


@pytest.fixture
def imitate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch 2.1's functions over this torch's: none takes a device, each device has its own."""
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def old() -> None:
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda: enabled("cuda"))
        monkeypatch.setattr(torch, "get_autocast_gpu_dtype", lambda: dtype("cuda"), raising=False)
        monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: enabled("cpu"), raising=False)
        monkeypatch.setattr(torch, "get_autocast_cpu_dtype", lambda: dtype("cpu"), raising=False)
        monkeypatch.delattr(torch, "get_autocast_dtype")

    return old


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_precision_that_autocast_gives(
    imitate: Any, is_old: bool, device: str, dtype: torch.dtype | None
) -> None:
    with ExitStack() as around:
        if dtype is not None:
            set_by_hand(around, device, dtype)
        if is_old:
            imitate()
        assert autocast_dtype(device) == dtype


def set_by_hand(around: ExitStack, device: str, dtype: torch.dtype) -> None:
    """What ``torch.autocast`` sets; it refuses a CUDA that is not there."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    enable, choose = torch.set_autocast_enabled, torch.set_autocast_dtype
    around.callback(lambda: (enable(device, before[0]), choose(device, before[1])))
    enable(device, True)
    choose(device, dtype)


def test_an_old_torch_knows_no_autocast_of_some_devices(imitate: Any) -> None:
    imitate()
    assert autocast_dtype("mps") is None
    with full_precision(torch.device("mps")):  # torch.autocast("mps", enabled=False) is refused there
        pass


def test_products_keep_their_precision_inside() -> None:
    one = torch.full((1, 1), 1 + 2**-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert (one @ one).dtype == torch.bfloat16
        with full_precision(one.device):
            assert torch.equal(one @ one, one * one)
