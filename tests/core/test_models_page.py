"""docs/models.md says of a family what its row says: works only where every check passed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools import models_page

PASSED = {"state": "passed"}
REFUSED = {"state": "refused", "said": "holds several latents"}
FAILED = {"state": "failed", "said": "RuntimeError: shapes"}
NOT_RUN = {"state": "not run", "said": "trained did not pass"}


def row(**checks: dict[str, str]) -> dict[str, Any]:
    return {
        "class": "Flux",
        "kind": "pictures",
        "checks": {"targets": {"state": "passed", "said": "4, 8, 9 of 9"}} | checks,
    }


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ({"trained": PASSED, "exported": PASSED}, "works"),
        ({"trained": REFUSED, "resumed": REFUSED}, "applies, does not train"),
        ({"adaptive": REFUSED, "trained": PASSED}, "refused: adaptive"),
        ({"trained": FAILED, "resumed": NOT_RUN}, "fails: trained"),
        ({"trained": REFUSED, "exported": FAILED}, "fails: exported"),
        ({"trained": NOT_RUN}, "not run: trained"),
    ],
)
def test_a_verdict_is_of_the_whole_row(checks: dict[str, dict[str, str]], said: str) -> None:
    short, sentence = models_page.verdict(row(**checks))
    assert short == said and (sentence in [cell.get("said") for cell in checks.values()] or said == "works")


def found(host: str, **families: dict[str, Any]) -> dict[str, Any]:
    return {
        "host": host,
        "families": families,
        "without": {"SAM3": "no denoiser"},
        "catalogue": ["flux", "wan"],
    }


def test_runs_of_several_hosts_and_families_are_put_together() -> None:
    results: models_page.Results = {}
    for run in (
        found("0.28.0", flux=row(trained=FAILED)),
        found("0.3.64", flux=row(trained=PASSED)),
        found("0.28.0", wan=row(trained=REFUSED) | {"kind": "video"}),
        found("0.28.0", flux=row(trained=PASSED)),
    ):
        results = models_page.merged(results, run)
    assert list(results) == ["0.3.64", "0.28.0"] and list(results["0.28.0"]["families"]) == ["flux", "wan"]
    text = models_page.table(results)
    assert "- ComfyUI 0.28.0: 2 families, 4 checks: 3 passed, 1 refused" in text
    assert "| flux | 0.3.64, 0.28.0 | works | 4, 8, 9 of 9 |" in text
    assert "| wan | 0.28.0 | applies, does not train (1) | 4, 8, 9 of 9 |" in text
    assert "1. holds several latents\n" in text and "- on 0.3.64: wan\n" in text
    assert "- SAM3: no denoiser" in text


def test_hosts_that_differ_are_said_apart() -> None:
    results = models_page.merged({}, found("0.3.64", flux=row(trained=FAILED)))
    results = models_page.merged(results, found("0.28.0", flux=row(trained=PASSED)))
    assert "0.3.64: fails: trained (1); 0.28.0: works" in models_page.table(results)


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads(models_page.RESULTS.read_text(encoding="utf-8"))
    text = models_page.PAGE.read_text(encoding="utf-8")
    assert models_page.written(text, results) == text, "run: python -m tools.models_page"
