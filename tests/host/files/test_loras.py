"""The host's LORA_MODEL and other people's files become adapters that do what the host's own loader does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.booted import Checkout
from tests.host.inside import checkouts, families, run_inside

pytestmark = pytest.mark.host

PARTS = 6  # processes


@pytest.mark.parametrize("checkout", checkouts())
def test_the_trainers_lora_is_applied_as_by_the_host(checkout: Checkout, tmp_path: Path) -> None:
    run_inside(checkout, "inside_loras.py", tmp_path)


@pytest.mark.parametrize("checkout", checkouts())
def test_every_kind_is_what_it_is_to_the_host(checkout: Checkout, tmp_path: Path) -> None:
    run_inside(checkout, "inside_lora_kinds.py", tmp_path)


@pytest.mark.parametrize("checkout", checkouts())
def test_every_name_of_a_text_encoder_is_read_as_by_the_host(checkout: Checkout, tmp_path: Path) -> None:
    run_inside(checkout, "inside_lora_encoders.py", tmp_path)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("checkout", checkouts())
def test_every_name_is_read_as_by_the_host(checkout: Checkout, part: int, tmp_path: Path) -> None:
    """Thousands of names in hundreds of files: of the demo model and every family that the host lists."""
    run_inside(checkout, "inside_lora_names.py", tmp_path, *["demo", *families()][part::PARTS])
