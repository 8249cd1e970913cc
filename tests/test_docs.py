"""The documentation names what is there: files and folders in it exist, and pages keep their length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dev

ROOT = Path(dev.__file__).parent
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
ROOMS = [ROOT, *(ROOT / name for name in ("spectral_core", "nodes", "nodes/host", "spectral_webui", "docs"))]
FILE = r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|json|toml|mjs|js|jpg|png)"
NAMED = re.compile(rf"`({FILE}|(?:tests|tools|benchmarks|docs|web)(?:/[\w.-]+)+/?)`")
LINKED = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
MADE = {"report.json", "adapter_config.json", "model_index.json", "events.jsonl"}  # by runs, by others
MADE |= {"name.jpg", "benchmarks/results/NAME.json"}  # for any name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rooms = [ROOT / name for name in ("spectral_core", "nodes", "spectral_webui", "tools", "tests")]
    every = {path.name for room in rooms for path in room.rglob("*.*")} | MADE
    for name in NAMED.findall(text):
        assert name in every or any((room / name).exists() for room in ROOMS), f"{page.name} names {name}"
    for link in LINKED.findall(text):
        assert (page.parent / link).exists(), f"{page.name} links {link}"


def test_pages_keep_their_length() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    plan = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in re.split(r"^##+ ", plan, flags=re.MULTILINE)[1:]:
        assert len(room.strip().splitlines()) <= 16, room.splitlines()[0]  # its name and 15 lines
