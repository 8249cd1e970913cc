"""What saved workflows rest on: ids, the order of widgets, sockets; and that everything has its words."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.nodes.conftest import Pack
from tools import node_locales

HERE = Path(__file__).parent
SCHEMA: dict[str, Any] = json.loads((HERE / "schema_v1.json").read_text())
LATER = {
    "SpectralAdapters_AdapterStack",
    "SpectralAdapters_ResizeAdapter",
    "SpectralAdapters_ConceptSlider",
    "SpectralAdapters_CompareAdapters",
    "SpectralAdapters_TrainValidation",
}  # nodes that came after the stored workflow
WIDGETS = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}


def kind(of: Any) -> str:
    return "COMBO" if isinstance(of, list) else of


def sockets(node: Any, group: str) -> list[list[str]]:
    return [[name, kind(of)] for name, (of, _) in node.INPUT_TYPES().get(group, {}).items()]


def widgets(node: Any) -> list[str]:
    """Widget names in the order in which a saved workflow holds their values."""
    return [n for group in ("required", "optional") for n, of in sockets(node, group) if of in WIDGETS]


@pytest.mark.parametrize("name", SCHEMA)
def test_first_version_stays_readable(ours: Pack, name: str) -> None:
    """An input may be added at the end of the optional ones, an output at the end; nothing else changes."""
    node, first = ours.root.NODE_CLASS_MAPPINGS[name], SCHEMA[name]
    outputs = [list(pair) for pair in zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)]
    assert sockets(node, "required") == first["required"], "a new required input breaks every old workflow"
    assert sockets(node, "optional")[: len(first["optional"])] == first["optional"]
    assert outputs[: len(first["outputs"])] == first["outputs"]
    old = [n for group in ("required", "optional") for n, of in first[group] if of in WIDGETS]
    assert widgets(node)[: len(old)] == old


def test_every_node_is_in_the_schema(ours: Pack) -> None:
    assert set(ours.root.NODE_CLASS_MAPPINGS) == set(SCHEMA)
    assert set(ours.root.NODE_DISPLAY_NAME_MAPPINGS) == set(SCHEMA)


@pytest.mark.parametrize("name", SCHEMA)
def test_every_socket_has_words_and_the_function_takes_it(ours: Pack, name: str) -> None:
    node = ours.root.NODE_CLASS_MAPPINGS[name]
    types = node.INPUT_TYPES()
    inputs = {**types.get("required", {}), **types.get("optional", {})}
    for key, (_, options) in inputs.items():
        assert len(options["tooltip"]) > 15, key
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert node.CATEGORY == "spectral adapters" and node.DESCRIPTION and node.SEARCH_ALIASES
    reports = {"report", "description"} & set(node.RETURN_NAMES)
    assert not reports or node.HAS_INTERMEDIATE_OUTPUT, "a report from the cache would not come to the page"
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    wanted = [*inputs, *types.get("hidden", {})]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # the widgets are the table's
    assert set(wanted) == set(parameters) - {"self"}
    for key in [*types.get("optional", {}), *types.get("hidden", {})]:
        assert parameters[key].default is not inspect.Parameter.empty, key


def test_translations_are_those_of_the_classes(ours: Pack) -> None:
    table = node_locales.locale(ours.root.NODE_CLASS_MAPPINGS, ours.root.NODE_DISPLAY_NAME_MAPPINGS)
    stored = node_locales.target("en").read_text(encoding="utf-8")
    assert json.loads(stored) == table, "run: python tools/node_locales.py"
    for text in strings(table):
        assert not set("{}@|") & set(text), f"{text!r}: the page's translator reads these signs as its own"


def strings(table: Any) -> list[str]:
    if isinstance(table, dict):
        return [text for value in table.values() for text in strings(value)]
    return [table]


# A workflow of the first version as the page saves it, and the prompt that the page makes of it.
PAGE: dict[str, Any] = json.loads((HERE / "workflow_v1.json").read_text())
PROMPT: dict[str, Any] = json.loads((HERE / "workflow_v1_prompt.json").read_text())


def prompt_of(page: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    """What the page sends: widget values by their place, links by the name of the input."""
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    prompt = {}
    for node in page["nodes"]:
        values = dict(zip(widgets(classes[node["type"]]), node["widgets_values"], strict=False))
        values |= {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"]}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values}
    return prompt


def test_stored_workflow_means_what_it_meant(ours: Pack) -> None:
    classes = ours.root.NODE_CLASS_MAPPINGS
    stored = {node["type"] for node in PAGE["nodes"]}
    assert stored == set(SCHEMA) - LATER, "every node of the first version is in it"
    assert prompt_of(PAGE, classes) == PROMPT
    for entry in PROMPT.values():
        node = classes[entry["class_type"]]
        types = node.INPUT_TYPES()
        inputs = {**types["required"], **types.get("optional", {})}
        for name, value in entry["inputs"].items():
            of, options = inputs[name]
            if isinstance(value, list):
                source, slot = PROMPT[value[0]]["class_type"], value[1]
                assert classes[source].RETURN_TYPES[slot] == kind(of), (entry["class_type"], name)
            elif isinstance(of, list):
                assert value in of or name in inspect.signature(node.VALIDATE_INPUTS).parameters
            elif of in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


# What a page of 2026-11-23 saved of each node, and what its widgets and sockets were called. Train Adapter is
# not among them: it was cut since, and the host refuses its old values.
BEFORE: list[dict[str, Any]] = json.loads((HERE / "workflow_before_rooms.json").read_text())


@pytest.mark.parametrize("saved", BEFORE, ids=lambda saved: saved["type"])
def test_workflows_made_before_mean_what_they_meant(ours: Pack, saved: dict[str, Any]) -> None:
    node = ours.root.NODE_CLASS_MAPPINGS[f"SpectralAdapters_{saved['type']}"]
    values = dict(zip(widgets(node), saved["widgets_values"], strict=False))
    assert {name: values[name] for name in saved["means"]} == saved["means"]
    required = [name for name, _ in sockets(node, "required")]
    assert set(required) <= {*saved["means"], *saved["sockets"]}, (
        "a prompt made before lacks what is required"
    )
    known = [name for group in ("required", "optional") for name, _ in sockets(node, group)]
    assert {*saved["sockets"]} <= {*known}


def test_page_scripts_only_add_comfort() -> None:
    """What the registry's scanner looks for, and what breaks pages. The host runs every .js by itself: there
    is one, and it imports the others, which end in .mjs."""
    scripts = [p for p in (ROOT / "web").rglob("*") if p.suffix in (".js", ".mjs")]
    assert [p.name for p in scripts if p.suffix == ".js"] == ["spectral_adapters.js"]
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        for word in (".bind(", "eval(", "Function("):
            assert word not in text, (script, word)
        assert max(map(len, text.splitlines())) < 400, f"{script}: minified code"
        if script.parent.name == "vendor":
            continue
        text = text.replace("http://www.w3.org/2000/svg", "")  # a name, not a place
        assert not any(word in text for word in ("prototype", "http:", "https:")), script
        for line in text.splitlines():
            found = re.match(r'import .*from "(.*)";$', line)
            if found and not found[1].endswith(("/scripts/app.js", "/scripts/api.js")):
                assert (script.parent / found[1]).suffix == ".mjs", (script, line)
                assert (script.parent / found[1]).is_file(), (script, line)


@pytest.mark.parametrize(
    "word", ["slider", "schedule", "merge", "concept", "trigger", "style", "train", "lora", "combine"]
)
def test_search_finds_us(ours: Pack, word: str) -> None:
    aliases = [alias for node in ours.root.NODE_CLASS_MAPPINGS.values() for alias in node.SEARCH_ALIASES]
    assert word in aliases
