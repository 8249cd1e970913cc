"""What people see, in a real browser on a real host, in both ways in which the page shows nodes."""

from __future__ import annotations

import time

import pytest

from tests.conftest import ROOT
from tests.page.conftest import Tab, workflow

TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
SLOW = {"train_and_use", "concepts_distilled"}  # they train: their run is another test's
TEXT = "n.spectralReport.innerText"
STATE = "n.spectralPanel.run.state"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in SLOW])
def test_a_template_runs_and_shows_its_reports(tab: Tab, name: str) -> None:
    tab.load(workflow(name))
    ours = "app.graph.nodes.filter(n => n.spectralReport)"
    assert tab.page.evaluate(f"() => {ours}.length") > 0
    tab.run()
    tab.page.wait_for_function(
        f"() => {ours}.every(n => !n.spectralReport.innerText.startsWith('The report appears'))",
        timeout=180_000,
    )
    kinds = tab.page.evaluate(f"() => {ours}.map(n => n.spectralReport.dataset.kind)")
    assert set(kinds) == {"done"}


def test_a_card_says_what_the_file_is_before_anything_runs(tab: Tab) -> None:
    tab.load(workflow("single_adapter"))
    tab.until("LoadFouRA", "n.spectralCard.box.innerText.includes('rank 4')")
    assert "<bot>" in tab.node("LoadFouRA", "return n.spectralCard.box.innerText")


def test_a_refused_input_is_said_on_its_node(tab: Tab) -> None:
    tab.load(workflow("single_adapter"))
    tab.node("LoadFouRA", "n.widgets[0].value = '../other.safetensors'")
    tab.run()
    tab.until("LoadFouRA", f"{TEXT}.includes(\"'..' leaves the folder\")")
    assert tab.node("LoadFouRA", "return n.spectralReport.dataset.kind") == "error"


def test_an_error_of_the_run_is_said_on_its_node_and_alone(tab: Tab) -> None:
    tab.load(workflow("three_concepts_fused"))
    set_to = "n.widgets.find(w => w.name === '{}').value = '{}';"
    body = set_to.format("curve", "custom") + set_to.format("custom_curve", "nonsense")
    tab.node("AdapterStrength", body)
    tab.run()
    tab.until("AdapterStrength", f"{TEXT}.startsWith(\"custom curve: 'nonsense' is no point\")")


def test_a_fusion_is_judged_before_it_runs(tab: Tab) -> None:
    tab.load(workflow("three_concepts_fused"))
    tab.until("FuseAdapters", "n.spectralVerdict.box.innerText.includes('bleed')")
    assert "house_spectral" in tab.node("FuseAdapters", "return n.spectralVerdict.box.innerText")


def test_points_of_the_curve_move_by_keyboard_and_the_text_follows(tab: Tab) -> None:
    tab.load(workflow("three_concepts_fused"))
    tab.node(
        "AdapterStrength",
        "n.spectralCurve.write([[0, 1], [0.5, 0.5], [1, 0]]);"
        "const knob = n.spectralCurve.svg.querySelectorAll('circle')[1];"
        "knob.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowUp', bubbles: true }));",
    )
    text = "return n.widgets.find(w => w.name === 'custom_curve').value"
    assert tab.node("AdapterStrength", text) == "0:1, 0.5:0.55, 1:0"


def test_rows_of_a_stack_are_its_text(tab: Tab) -> None:
    tab.page.evaluate(
        "() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('SpectralAdapters_AdapterStack')); }"
    )
    tab.until("AdapterStack", "n.spectralStack.files.length > 0")
    tab.press("+ Add adapter")
    tab.press("+ Add adapter")
    rows = "return n.widgets.find(w => w.name === 'rows').value"
    assert len(tab.node("AdapterStack", rows).splitlines()) == 2
    tab.node("AdapterStack", "n.spectralStack.box.querySelector('input[type=checkbox]').click()")
    assert tab.node("AdapterStack", rows).startswith("# examples/")


def test_a_training_is_seen_stopped_resumed_and_used(tab: Tab) -> None:
    tab.load(workflow("train_and_use"))
    name = f"seen_{time.time_ns()}"
    set_to = "for (const [k, v] of Object.entries({})) n.widgets.find(w => w.name === k).value = v;"
    tab.node("TrainAdapter", set_to.replace("{}", f"{{ run_name: '{name}', steps: 40 }}"))
    tab.run()
    tab.until("TrainAdapter", "n.spectralPanel.run.points.length > 3")
    other = Tab(tab.page.context, tab.host)  # a second tab, which comes later
    other.until("TrainAdapter", "n.spectralPanel.run.points[0]?.step === 1")
    other.page.close()
    tab.press("Use now")
    tab.until("TrainAdapter", "n.spectralPanel.said.innerText.includes('is in a loader')")
    tab.press("Stop and keep")
    tab.until("TrainAdapter", f"{STATE} === 'stopped'")
    assert "a checkpoint is kept" in tab.node("TrainAdapter", "return n.spectralPanel.said.innerText")
    tab.open()  # a reload
    tab.until("TrainAdapter", f"{STATE} === 'stopped' && n.spectralPanel.run.points[0].step === 1")
    tab.press("Resume")
    tab.until("TrainAdapter", f"{STATE} === 'finished'", 180)
    assert tab.node("TrainAdapter", "return n.spectralPanel.run.points.map(p => p.step)") == [*range(1, 41)]
    tab.until("TrainAdapter", f"{TEXT}.includes('resumed at step')")
    tab.press("More steps")
    tab.until("TrainAdapter", f"n.spectralPanel.run.planned === 60 && {STATE} === 'finished'", 180)
    assert tab.node("TrainAdapter", "return n.spectralPanel.name") == name
