"""What people see, in a real browser on a real host, in both ways in which the page shows nodes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.host.booted import Host
from tests.page.conftest import Tab, opened, workflow

TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
SHORT = {  # trainings and grids, made short
    "3 Train and use": {"TrainAdapter": {"steps": 4}},
    "4 Compare adapters": {"CompareAdapters": {"steps": 2}},
    "5 Slider from two prompts": {
        "ConceptSlider": {"steps": 4, "samples": 1, "sample_steps": 2},
        "CompareAdapters": {"steps": 2, "strengths": "-1, 1"},
    },
    "8 Distil three concepts": {"DistilAdapters": {"steps": 4, "samples": 1, "sample_steps": 2}},
}
TEXT = "n.spectralReport.innerText"
STATE = "n.spectralPanel.run.state"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_runs_and_shows_its_reports(tab: Tab, name: str) -> None:
    tab.load(workflow(name))
    for kind, values in SHORT.get(name, {}).items():
        tab.put(kind, **values)
    ours = "app.graph.nodes.filter(n => n.spectralReport)"
    assert tab.page.evaluate(f"() => {ours}.length") > 0
    tab.run()
    tab.wait(f"{ours}.every(n => n.spectralReport.dataset.kind !== 'hint')", 180)
    kinds = tab.page.evaluate(f"() => {ours}.map(n => n.spectralReport.dataset.kind)")
    assert set(kinds) == {"done"}
    pictures = "Object.values(app.nodeOutputs).flatMap(output => output.images ?? []).length"
    wanted = len(workflow(name)["extra"]["linearData"]["outputs"])
    tab.wait(f"{pictures} >= {wanted}")


def test_a_card_says_what_the_file_is_before_anything_runs(tab: Tab) -> None:
    tab.load(workflow("1 Try an adapter"))
    tab.until("LoadFouRA", "n.spectralCard.box.innerText.includes('rank 8')")
    assert "<bot>" in tab.node("LoadFouRA", "return n.spectralCard.box.innerText")


def test_a_refused_input_is_said_on_its_node(tab: Tab) -> None:
    tab.load(workflow("1 Try an adapter"))
    tab.put("LoadFouRA", adapter_name="../other.safetensors")
    tab.run()
    tab.until("LoadFouRA", f"{TEXT}.includes(\"'..' leaves the folder\")")
    assert tab.node("LoadFouRA", "return n.spectralReport.dataset.kind") == "error"


def test_an_error_of_the_run_is_said_on_its_node_and_alone(tab: Tab) -> None:
    tab.load(workflow("2 Combine three concepts"))
    tab.put("AdapterStrength", curve="custom", custom_curve="nonsense")
    heard = "window.heard = null; app.api.addEventListener('execution_error', e => (window.heard = e.detail))"
    tab.page.evaluate(f"() => {{ {heard}; }}")
    tab.run()
    tab.until("AdapterStrength", f"{TEXT}.startsWith(\"custom curve: 'nonsense' is no point\")")
    assert tab.page.evaluate("() => window.heard.exception_type") == "spectral_adapters.SpectralAdapterError"


def test_a_fusion_is_judged_before_it_runs(tab: Tab) -> None:
    tab.load(workflow("2 Combine three concepts"))
    tab.until("FuseAdapters", "n.spectralVerdict.box.innerText.match(/bleed|overlap/)")
    words = "return n.spectralVerdict.box.innerText"
    assert "house_spectral" in tab.node("FuseAdapters", words)
    tab.run()
    tab.until("FuseAdapters", "n.spectralVerdict.box.innerText.startsWith('In the last run:')", 180)
    assert "kept" in tab.node("FuseAdapters", words)


def test_points_of_the_curve_move_by_keyboard_and_the_text_follows(tab: Tab) -> None:
    tab.load(workflow("2 Combine three concepts"))
    tab.node(
        "AdapterStrength",
        "n.spectralCurve.write([[0, 1], [0.5, 0.5], [1, 0]]);"
        "const knob = n.spectralCurve.svg.querySelectorAll('circle')[1];"
        "knob.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowUp', bubbles: true }));",
    )
    text = "return n.widgets.find(w => w.name === 'custom_curve').value"
    assert tab.node("AdapterStrength", text) == "0:1, 0.5:0.55, 1:0"


def test_rows_of_a_stack_are_its_text(tab: Tab) -> None:
    tab.alone("AdapterStack")
    tab.until("AdapterStack", "n.spectralStack.files.length > 0")
    tab.press("+ Add adapter")
    tab.press("+ Add adapter")
    rows = "return n.widgets.find(w => w.name === 'rows').value"
    assert len(tab.node("AdapterStack", rows).splitlines()) == 2
    wide = "n.spectralStack.box.querySelector('select').clientWidth"
    assert tab.node("AdapterStack", f"return {wide}") >= 110  # in which the file's name can be read
    tab.node("AdapterStack", "n.spectralStack.box.querySelector('input[type=checkbox]').click()")
    assert tab.node("AdapterStack", rows).startswith("# ")


def test_a_training_is_seen_stopped_resumed_and_used(tab: Tab) -> None:
    tab.load(workflow("3 Train and use"))
    name = f"seen_{time.time_ns()}"
    tab.put("TrainAdapter", run_name=name, steps=300)  # long enough to be stopped
    tab.run()
    run = "n.spectralPanel.run"  # not the one that the template had before
    tab.until("TrainAdapter", f"{run}.name === '{name}' && {run}.points.length > 3")
    tab.press("Stop and keep")
    tab.until("TrainAdapter", f"{STATE} === 'stopped'")
    assert "a checkpoint is kept" in tab.node("TrainAdapter", "return n.spectralPanel.said.innerText")
    assert tab.page.locator(".spectral-training").count() == 1
    assert tab.page.locator(".spectral-training canvas").count() == 1
    tab.open()  # a reload
    tab.until("TrainAdapter", f"{STATE} === 'stopped' && n.spectralPanel.run.points[0].step === 1")
    tab.node("TrainAdapter", "n.spectralPanel.buttons.resume.focus()")
    tab.page.keyboard.press("Enter")
    tab.until("TrainAdapter", f"{STATE} !== 'stopped'")
    tab.press("Use now")
    tab.until("TrainAdapter", "n.spectralPanel.said.innerText.includes('is in a loader')")
    other = Tab(tab.page.context, tab.host, tab.settings)  # a second tab, which comes later
    other.until("TrainAdapter", "n.spectralPanel.run.points[0]?.step === 1")
    other.page.close()
    tab.until("TrainAdapter", f"{STATE} === 'finished'", 180)
    seen = tab.node("TrainAdapter", "return n.spectralPanel.run.points.map(p => p.step)")
    assert seen == [*range(1, 301)]
    tab.until("TrainAdapter", f"{TEXT}.includes('resumed at step')")
    tab.press("More steps")
    tab.until("TrainAdapter", f"n.spectralPanel.run.planned === 450 && {STATE} === 'finished'", 180)
    assert tab.node("TrainAdapter", "return n.spectralPanel.name") == name


def test_a_report_comes_back_where_the_host_answers_from_its_cache(tab: Tab) -> None:
    tab.load(workflow("1 Try an adapter"))
    tab.run()
    tab.until("LoadFouRA", f"{TEXT}.includes('8 layers')")
    tab.page.evaluate("() => localStorage.removeItem('spectral_adapters.reports')")
    tab.load(workflow("1 Try an adapter"))
    tab.until("LoadFouRA", f"{TEXT}.startsWith('The report appears')", 10)
    tab.run()
    tab.until("LoadFouRA", f"{TEXT}.includes('8 layers')")


def test_a_report_is_kept_over_undo_and_reload(tab: Tab) -> None:
    tab.load(workflow("1 Try an adapter"))
    tab.run()
    tab.until("LoadFouRA", f"{TEXT}.includes('8 layers')")
    place = tab.node("LoadFouRA", "return n.pos[1]")
    tracked = "app.extensionManager.workflow.activeWorkflow.changeTracker"
    tab.node("LoadFouRA", f"n.pos = [n.pos[0], n.pos[1] + 20]; {tracked}.captureCanvasState()")
    tab.page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    tab.until("LoadFouRA", f"n.pos[1] === {place} && {TEXT}.includes('8 layers')", 10)
    tab.open()
    tab.load(workflow("1 Try an adapter"))
    tab.until("LoadFouRA", f"{TEXT}.includes('8 layers')", 10)


def test_a_report_is_kept_while_another_workflow_is_open(tab: Tab) -> None:
    tab.load(workflow("1 Try an adapter"))
    tab.run()
    tab.until("LoadFouRA", f"{TEXT}.includes('8 layers')")
    commands = {"Comfy.NewBlankWorkflow": "=== 0", "Workspace.PreviousOpenedWorkflow": "> 0"}
    for command, nodes in commands.items():
        tab.page.evaluate(f"() => app.extensionManager.command.execute('{command}')")
        tab.wait(f"app.graph.nodes.length {nodes}")
    tab.until("LoadFouRA", f"{TEXT}.includes('8 layers')", 10)


def test_a_training_that_fails_says_why_on_its_node(tab: Tab) -> None:
    tab.alone("LoadDemoModel", "TrainAdapter")
    tab.node("LoadDemoModel", "n.connect(0, app.graph.nodes[1], 'model')")
    tab.put("TrainAdapter", run_name="nothing_to_learn")
    tab.run()
    tab.until("TrainAdapter", "n.spectralReport.dataset.kind === 'error'")
    assert "latents" in tab.node("TrainAdapter", f"return {TEXT}")


def test_a_trigger_word_is_copied(tab: Tab) -> None:
    tab.alone("LoadFouRA")
    tab.until("LoadFouRA", "n.spectralCard.shown")
    tab.page.get_by_role("button", name="<bot>").click()
    tab.wait("navigator.clipboard.readText().then(text => text === '<bot>')", 10)


def test_points_of_the_curve_move_by_mouse(tab: Tab) -> None:
    tab.alone("AdapterStrength")
    tab.node("AdapterStrength", "n.spectralCurve.write([[0, 1], [0.5, 0.5], [1, 0]])")
    tab.settle()
    box = tab.page.locator(".spectral circle").nth(1).bounding_box()
    assert abs(box["width"] - box["height"]) < 1, "a point is round"
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.page.mouse.move(x, y)
    tab.page.mouse.down()
    tab.page.mouse.move(x + 30, y - 15, steps=5)
    tab.page.mouse.up()
    text = "return n.widgets.find(w => w.name === 'custom_curve').value"
    place, strength = map(float, tab.node("AdapterStrength", text).split(", ")[1].split(":"))
    assert 0.52 < place < 0.8 and 0.55 < strength < 0.9
    tab.page.mouse.dblclick(x - 60, y)
    assert len(tab.node("AdapterStrength", text).split(", ")) == 4


def test_rows_of_a_stack_are_dragged(tab: Tab) -> None:
    tab.alone("AdapterStack")
    tab.until("AdapterStack", "n.spectralStack.files.length > 0")
    for _ in range(3):
        tab.press("+ Add adapter")
    rows = "return n.widgets.find(w => w.name === 'rows').value"
    before = tab.node("AdapterStack", rows).splitlines()
    found = tab.page.locator(".spectral-stack-row")
    at = {"position": {"x": 3, "y": 3}}
    found.nth(0).drag_to(found.nth(2), source_position=at["position"], target_position=at["position"])
    assert tab.node("AdapterStack", rows).splitlines() == [before[1], before[2], before[0], *before[3:]]


def test_train_adapter_is_at_most_450_pixels_high(tab: Tab) -> None:
    tab.alone("TrainAdapter")
    is_older = tab.host.checkout.version.startswith("0.28.")  # whose Nodes 2.0 have higher rows: 508
    most = 510 if tab.vue and is_older else 450
    assert 250 < tab.node("TrainAdapter", "return n.size[1]") <= most  # its title apart


def test_nodes_are_wired_by_mouse(tab: Tab) -> None:
    tab.alone("LoadDemoModel", "LoadFouRA")
    start, end = tab.client("LoadDemoModel", 0, False), tab.client("LoadFouRA", 0, True)
    tab.page.mouse.move(*start)
    tab.page.mouse.down()
    tab.page.mouse.move((start[0] + end[0]) / 2, start[1] + 30, steps=5)
    tab.page.mouse.move(*end, steps=8)
    tab.settle()
    tab.page.mouse.up()
    tab.until("LoadFouRA", "n.getInputNode(0)?.comfyClass === 'SpectralAdapters_LoadDemoModel'", 10)


def test_a_file_of_another_base_is_marked_on_its_card(tab: Tab) -> None:
    tab.alone("LoadDemoModel", "LoadFouRA")
    tab.until("LoadFouRA", "n.spectralCard.shown?.base === 'mini'", 20)
    tab.node("LoadFouRA", "n.spectralCard.shown.base = 'sdxl'; app.graph.nodes[0].connect(0, n, 0)")
    tab.until("LoadFouRA", "n.spectralCard.box.innerText.includes('it does not fit the demo model')", 10)


def test_everything_on_a_node_works_by_keyboard_alone(tab: Tab) -> None:
    tab.alone("AdapterStack", "AdapterStrength")
    tab.until("AdapterStack", "n.spectralStack.files.length > 0")
    tab.node("AdapterStack", "n.spectralStack.box.querySelector('button').focus()")
    tab.page.keyboard.press("Enter")
    rows = "return n.widgets.find(w => w.name === 'rows').value"
    assert tab.node("AdapterStack", rows).endswith(".safetensors | 1 | 1")
    tab.node("AdapterStack", "n.spectralStack.box.querySelector('input[type=checkbox]').focus()")
    tab.page.keyboard.press("Space")
    assert tab.node("AdapterStack", rows).startswith("# ")
    find = "[...n.spectralCurve.box.querySelectorAll('button')]"
    tab.node("AdapterStrength", f"{find}.find(b => b.textContent === 'fade out').focus()")
    tab.page.keyboard.press("Enter")
    assert tab.node("AdapterStrength", "return n.widgets.find(w => w.name === 'curve').value") == "linear out"
    tab.node("AdapterStrength", f"{find}.find(b => b.textContent === '+ point').focus()")
    tab.page.keyboard.press("Enter")
    text = "return n.widgets.find(w => w.name === 'custom_curve').value"
    assert tab.node("AdapterStrength", text) == "0:1, 0.25:0.75, 0.5:0.5, 1:0"
    tab.node("AdapterStrength", "n.spectralCurve.svg.querySelectorAll('circle')[1].focus()")
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Delete")
    assert tab.node("AdapterStrength", text) == "0:1, 0.5:0.5, 1:0"


def test_widgets_are_shown_for_the_choice_that_reads_them(tab: Tab) -> None:
    tab.alone("CompareAdapters")
    hidden = "n.widgets.filter(w => w.hidden).map(w => w.name).join()"
    tab.until("CompareAdapters", f"{hidden} === 'methods,run_name'", 10)
    tab.put("CompareAdapters", compare="fusion methods")
    tab.until("CompareAdapters", f"{hidden} === 'run_name'", 10)


def test_the_library_lists_adapters_and_puts_one_into_the_graph(tab: Tab) -> None:
    tab.alone()
    tab.toggle_library()
    tab.page.get_by_role("button", name="Use in graph").first.click()
    tab.until("LoadFouRA", "n.widgets[0].value.endsWith('.safetensors')", 10)
    tab.toggle_library()


def test_the_library_works_by_keyboard(tab: Tab) -> None:
    tab.alone()
    tab.toggle_library()
    tab.page.get_by_placeholder("filter").focus()
    listed = "[...document.querySelectorAll('button')].filter(b => b.textContent === 'Use in graph').length"
    tab.wait(f"{listed} > 1")
    tab.page.keyboard.type("FISH")
    tab.wait(f"{listed} === 1")
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate("() => document.activeElement.textContent") == "Use in graph":
            break
    tab.page.keyboard.press("Enter")
    tab.until("LoadFouRA", "n.widgets[0].value === 'examples/fish_spectral.safetensors'", 10)
    tab.toggle_library()


# In one of the two ways to show nodes.


CONTRAST = """
() => {
  const parts = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (text) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parts(text).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (found) => {
    const colour = (box) => getComputedStyle(box).backgroundColor;
    while (found && (parts(colour(found))[3] ?? 1) === 0) found = found.parentElement;
    return found ? colour(found) : "rgb(0, 0, 0)";
  };
  const all = ".spectral, .spectral button:enabled, .spectral .spectral-muted";
  const boxes = [...document.querySelectorAll(all)];
  return boxes.filter(box => box.textContent).map(box => {
    const [a, b] = [light(getComputedStyle(box).color), light(ground(box))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), box.className || box.textContent];
  }).sort((x, y) => x[0] - y[0]);
}
"""


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes 2.0"])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_words_can_be_read_in_both_themes_and_at_125_percent(
    served: Host, chromium: Any, theme: str, vue: bool
) -> None:
    with opened(served, chromium, vue=vue, theme=theme, scale=1.25) as tab:
        tab.alone("LoadFouRA", "TrainAdapter", "AdapterStrength")
        tab.until("LoadFouRA", "n.spectralCard.shown")
        worst = tab.page.evaluate(CONTRAST)
        assert worst and worst[0][0] >= 4.5, worst[:3]
        wide = "[...document.querySelectorAll('.spectral')].filter(b => b.scrollWidth > b.clientWidth + 1)"
        assert tab.page.evaluate(f"() => {wide}.map(b => b.className)") == []


def test_the_second_language_is_the_pages(served: Host, chromium: Any) -> None:
    with opened(served, chromium, language="zh") as tab:
        tab.alone("TrainAdapter", "LoadFouRA")
        assert tab.node("TrainAdapter", "return n.title") == "训练适配器"
        assert tab.node("TrainAdapter", "return n.spectralPanel.buttons.stop.innerText") == "停止并保留"
        tab.until("LoadFouRA", "n.spectralCard.box.innerText.startsWith('触发词')")


@pytest.mark.parametrize(
    ("language", "said"),
    [("en", "on your pictures, on the connected model"), ("zh", "用你的图片在所连接的模型上")],
)
def test_the_help_of_a_node_is_opened_in_the_pages_language(
    served: Host, chromium: Any, language: str, said: str
) -> None:
    with opened(served, chromium, language=language) as tab:
        tab.alone("TrainAdapter")
        tab.node("TrainAdapter", "n.pos = [500, 350]; app.canvas.selectNode(n)")  # its tools are above it
        tab.page.get_by_test_id("info-button").click()
        tab.page.get_by_text(said).first.wait_for()
        picture = "img[src*='SpectralAdapters_TrainAdapter.jpg']"
        tab.page.locator(picture).first.scroll_into_view_if_needed()
        tab.wait(f'document.querySelector("{picture}").naturalWidth > 0')


def test_blueprints_are_offered_and_load(served: Host, chromium: Any) -> None:
    found = served.get("/global_subgraphs")
    ours = {entry["name"]: key for key, entry in found.items() if "Spectral Adapters" in entry["name"]}
    assert len(ours) == 2
    with opened(served, chromium) as tab:
        for key in ours.values():
            page = served.get(f"/global_subgraphs/{key}")["data"]
            tab.page.evaluate("text => app.loadGraphData(JSON.parse(text))", page)
            inside = "app.graph.nodes[0].subgraph.nodes"
            tab.wait("app.graph.nodes[0]?.subgraph")
            kinds = tab.page.evaluate(f"() => {inside}.map(n => n.comfyClass)")
            assert all(kind.startswith("SpectralAdapters_") for kind in kinds) and len(kinds) >= 2
            links = f"{inside}.flatMap(n => n.inputs).filter(i => i.link != null).length"
            assert tab.page.evaluate(f"() => {links}") >= 7


def test_the_model_folder_lists_no_checkpoints_of_trainings(served: Host) -> None:
    run = served.folder / "output" / "spectral_adapters_runs" / "listed"
    run.mkdir(parents=True, exist_ok=True)
    (run / "checkpoint-00000001.safetensors").write_bytes(b"")
    assert not [name for name in served.get("/models/spectral_adapters") if "checkpoint" in name]
