"""The conformance table: every family that a host lists goes through its whole row, a test each.

``docs/models.md`` is written from the same rows: with ``SPECTRAL_ADAPTERS_ROWS`` naming a folder they are
kept there, for ``python -m tools.models_page``.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.host.booted import Checkout
from tests.host.inside import checkouts, families, run_inside

pytestmark = pytest.mark.host

AT_ONCE = 10  # families in one process
KEEP = "SPECTRAL_ADAPTERS_ROWS"


def process_of(name: str) -> tuple[str, ...]:
    """The families that are gone through in the same process."""
    everyone = families()
    start = everyone.index(name) // AT_ONCE * AT_ONCE
    return tuple(everyone[start : start + AT_ONCE])


@pytest.fixture(scope="module", params=checkouts())
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's row on a host version; families of one process are run together, when one is asked for."""
    checkout: Checkout = request.param

    @cache
    def answer(names: tuple[str, ...]) -> dict[str, Any]:
        folder: Path = tmp_path_factory.mktemp("conformance")
        run_inside(checkout, "inside_conformance.py", folder, *names)
        text = (folder / "conformance.json").read_text(encoding="utf-8")
        if os.environ.get(KEEP):
            Path(os.environ[KEEP], f"{checkout.version}-{names[0]}.json").write_text(text, encoding="utf-8")
        return dict(json.loads(text))

    return answer


@pytest.mark.parametrize("family", families())
def test_row(rows: Any, family: str) -> None:
    row = rows(process_of(family))["families"].get(family)
    if row is None:
        pytest.skip(f"this host has no {family}")
    failed = {what: cell for what, cell in row["checks"].items() if cell["state"] in ("failed", "not run")}
    assert not failed, json.dumps(failed, indent=1)


def test_every_listed_family_has_a_row_or_a_reason(rows: Any) -> None:
    assert rows(process_of(families()[0]))["unknown"] == []
