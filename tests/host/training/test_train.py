"""The node Train Adapter in a real host: learning, resuming, stopping; the base model stays as it was."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from demo_model.draw import draw_concept
from tests.host.inside import checkouts, run_inside

pytestmark = pytest.mark.host

SCRIPT = "inside_train.py"
LISTS = {
    SCRIPT: "CHECKS",
    "inside_train_models.py": "MODEL_CHECKS",
    "inside_train_text.py": "TEXT_CHECKS",
    "inside_train_families.py": "FAMILY_CHECKS",
}


def checks() -> list[str]:
    """The names in the lists of scripts that only a host's Python can import."""
    names = []
    for script, wanted in LISTS.items():
        tree = ast.parse(Path(__file__).with_name(script).read_text(encoding="utf-8"))
        assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
        (found,) = (n.value for n in assigned if ast.unparse(n.targets[0]) == wanted)
        assert isinstance(found, ast.List)
        names += [ast.unparse(element) for element in found.elts]
    return names


def write_pictures(root: Path) -> None:
    """Folders as a user may have them: right ones and wrong ones."""
    counts = {"concept": 3, "prior": 3, "one": 1, "broken": 1, "uncaptioned": 1, "empty": 0}
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            picture, caption = draw_concept("house", i)
            picture.save(folder / f"{i}.png")
            said = "a plain house" if name == "prior" else caption.replace("house", "<TOK>")
            if name != "uncaptioned":
                (folder / f"{i}.txt").write_text(said, encoding="utf-8")
    broken = root / "broken" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])


@pytest.fixture(scope="module", params=checkouts())
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("train")
    write_pictures(folder / "input")
    (folder / "output").mkdir()
    os.environ["SPECTRAL_ADAPTERS_CACHE"] = str(folder / "cache")
    try:
        run_inside(request.param, SCRIPT, folder)
    finally:
        del os.environ["SPECTRAL_ADAPTERS_CACHE"]
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("check", checks())
def test_inside(report: dict[str, str], check: str) -> None:
    assert report[check] == "", report[check]
