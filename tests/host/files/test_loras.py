"""The host's LORA_MODEL and other people's files become adapters that do what the host's own loader does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.booted import Checkout
from tests.host.inside import checkouts, run_inside

pytestmark = pytest.mark.host


@pytest.mark.parametrize("checkout", checkouts())
def test_the_trainers_lora_is_applied_as_by_the_host(checkout: Checkout, tmp_path: Path) -> None:
    run_inside(checkout, "inside_loras.py", tmp_path)


@pytest.mark.parametrize("checkout", checkouts())
def test_every_name_and_kind_is_read_as_by_the_host(checkout: Checkout, tmp_path: Path) -> None:
    """Thousands of names in about 200 files: of the demo model, SD 1, SDXL, Flux, Qwen-Image, Wan, Lumina 2,
    Z-Image, in four styles; and ten kinds of adapters."""
    run_inside(checkout, "inside_lora_names.py", tmp_path)
