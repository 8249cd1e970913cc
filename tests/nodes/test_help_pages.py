"""Every node has a help page that names all its inputs and outputs; example workflows have a picture."""

from __future__ import annotations

import json
import re
from collections import Counter
from types import ModuleType

import pytest

from tests.host.booted import ROOT
from tools import node_locales, option_pages

DOCS = ROOT / "web" / "docs"
EXAMPLES = ROOT / "example_workflows"
PICTURE_BYTES = 200_000
ADAPTERS_BYTES = 8_000_000


def test_every_node_has_a_page_about_all_its_sockets_and_widgets(pack: ModuleType) -> None:
    assert {page.stem for page in DOCS.glob("*.md")} >= set(pack.NODE_CLASS_MAPPINGS)
    for name, kind in pack.NODE_CLASS_MAPPINGS.items():
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {pack.NODE_DISPLAY_NAME_MAPPINGS[name]}\n")
        given = kind.INPUT_TYPES()
        inputs = {*given.get("required", {}), *given.get("optional", {})}
        missing = [word for word in (*inputs, *kind.RETURN_NAMES) if word not in text]
        assert not missing, (name, missing)
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
        assert pictures and all((DOCS / picture).is_file() for picture in pictures), (name, pictures)
        assert sum((DOCS / picture).stat().st_size for picture in pictures) < PICTURE_BYTES
        for section in ("## Inputs", "## Outputs", "## Typical mistakes"):
            assert section in text, (name, section)


SHAPE = r"^(#+|\||-|!\[)|`[^`\n]*`|\d+(?:\.\d+)*|\b[a-z]+_[a-z_0-9]+\b"  # what no translation may change


@pytest.mark.parametrize("language", node_locales.languages())
def test_every_page_is_there_in_every_language_and_says_the_same(pack: ModuleType, language: str) -> None:
    known = node_locales.memory(language)
    for name, kind in pack.NODE_CLASS_MAPPINGS.items():
        english = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        text = (DOCS / name / f"{language}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {known[pack.NODE_DISPLAY_NAME_MAPPINGS[name]]}\n")
        given = kind.INPUT_TYPES()
        inputs = {*given.get("required", {}), *given.get("optional", {})}
        missing = [word for word in (*inputs, *kind.RETURN_NAMES) if word not in text]
        assert not missing, (name, missing)
        shapes = [Counter(found[0] for found in re.finditer(SHAPE, t, re.M)) for t in (english, text)]
        assert shapes[0] == shapes[1], (name, shapes[0] - shapes[1], shapes[1] - shapes[0])
        pictures = [re.findall(r"\]\(([^)]+)\)", t) for t in (english, text)]
        assert pictures[0] == pictures[1], name


def test_pages_name_workflows_that_there_are() -> None:
    titles = {path.stem for path in EXAMPLES.glob("*.json")}
    for path in DOCS.rglob("*.md"):
        for title in re.findall(r"(?:workflows?|工作流) ?\*([^*]+)\*", path.read_text(encoding="utf-8")):
            assert title in titles, (path, title)


def test_the_pages_of_the_training_nodes_are_current() -> None:
    for name, text in option_pages.pages().items():
        assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == text, "run: python -m tools.option_pages"
    for language in node_locales.languages():
        for name, text in option_pages.translated(language).items():
            stored = (DOCS / name / f"{language}.md").read_text(encoding="utf-8")
            assert stored == text, "run: python -m tools.option_pages"


def test_every_example_has_a_small_picture_and_names_shipped_files() -> None:
    workflows = sorted(EXAMPLES.glob("*.json"))
    assert len(workflows) >= 5
    for path in workflows:
        picture = path.with_suffix(".jpg")
        assert picture.is_file() and picture.stat().st_size < PICTURE_BYTES, picture
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            texts = [value for value in node.get("widgets_values", ()) if isinstance(value, str)]
            for value in (line.partition("|")[0].strip() for text in texts for line in text.splitlines()):
                if value.startswith("examples/"):
                    folder = "loras" if "LoRA" in node["type"] else "adapters"
                    assert (EXAMPLES / folder / value).is_file(), value


def test_shipped_adapters_are_small() -> None:
    files = [*EXAMPLES.glob("adapters/examples/*"), *EXAMPLES.glob("loras/examples/*")]
    assert files and sum(file.stat().st_size for file in files) < ADAPTERS_BYTES
