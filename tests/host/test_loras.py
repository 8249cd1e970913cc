"""The host's LORA_MODEL becomes an adapter that does what the host's own loader does with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.booted import Checkout
from tests.host.inside import checkouts, run_inside

pytestmark = pytest.mark.host


@pytest.mark.parametrize("checkout", checkouts())
def test_the_trainers_lora_is_applied_as_by_the_host(checkout: Checkout, tmp_path: Path) -> None:
    run_inside(checkout, "inside_loras.py", tmp_path)
