"""A real browser on a real host: Chromium by Playwright, the host's own front end.

Skipped with one line where there is no host with a front end, no Playwright, or no Chromium. The browser:
$CHROMIUM, else ``chromium`` or ``google-chrome`` on the path. The front end is that of the host's Python;
$COMFYUI_FRONT_END names folders of others, ``0.28.0=FOLDER``, several separated as in $PATH.
Every wait is for something to be so, never for a time; $SPECTRAL_ADAPTERS_PATIENCE, a factor, makes what they
wait at most longer on a slow machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.host.booted import NO_HOST, Checkout, Host, HostUnusable, find_checkouts

OLDEST = (0, 28)  # of the hosts whose front end these tests know
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu")
PATIENCE = float(os.environ.get("SPECTRAL_ADAPTERS_PATIENCE", "1"))
READY = """
window.app?.graph && app.extensionManager?.workflow?.activeWorkflow?.changeTracker
  && document.getElementById("spectral-styles")
"""
AT_REST = """
() => {
  const nodes = app.graph.nodes.map(n => [...n.pos, ...n.size, n.widgets?.length]);
  const boxes = [...document.querySelectorAll(".spectral")].map(box => box.getBoundingClientRect());
  const now = JSON.stringify([nodes, boxes]);
  window.frames_at_rest = window.seen_before === now ? window.frames_at_rest + 1 : 0;
  window.seen_before = now;
  return window.frames_at_rest >= 10;
}
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "served" not in metafunc.fixturenames:
        return
    found = [c for c in find_checkouts() if _version(c) >= OLDEST and _has_front_end(c)]
    checkouts: list[Checkout | None] = [*found] or [None]
    ids = [checkout.version if checkout else "no host" for checkout in checkouts]
    metafunc.parametrize("served", checkouts, indirect=True, scope="session", ids=ids)


def _version(checkout: Checkout) -> tuple[int, ...]:
    return tuple(int(part) for part in checkout.version.split(".")[:2] if part.isdecimal())


def _has_front_end(checkout: Checkout) -> bool:
    command = [str(checkout.python), "-c", "import comfyui_frontend_package"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _front_end(checkout: Checkout) -> tuple[str, ...]:
    named = [pair for pair in os.environ.get("COMFYUI_FRONT_END", "").split(os.pathsep) if pair]
    folders = dict(pair.split("=", 1) for pair in named)
    return ("--front-end-root", folders[checkout.version]) if checkout.version in folders else ()


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if request.param is None:
        pytest.skip(f"{NO_HOST}; the page needs one of 0.28 or later with its front end")
    booted = Host(request.param, tmp_path_factory.mktemp("page"), _front_end(request.param))
    try:
        booted.start()
        yield booted
    except HostUnusable as unusable:
        pytest.skip(str(unusable))
    finally:
        booted.stop()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: the page is not tested")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: the page is not tested")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


class Tab:
    """A tab with the host's page; ``ours``: console messages that name our files.

    settings: of the host, which has one set for all its tabs: they are set again before every reload.
    """

    def __init__(self, context: Any, host: Host, settings: dict[str, Any] | None = None) -> None:
        self.host, self.page, self.settings = host, context.new_page(), settings or {}
        self.ours: list[str] = []
        self.page.on("console", lambda message: self._heard(f"{message.text} {message.location}"))
        self.page.on("pageerror", lambda error: self._heard(str(error.stack or error)))
        self.open()

    def _heard(self, text: str) -> None:
        asked = "/docs/" in text and "Failed to load" in text  # for a help page in the page's language first
        if "spectral" in text.lower() and not asked:
            self.ours.append(text)

    @property
    def vue(self) -> bool:
        """Whether it shows Nodes 2.0."""
        return bool(self.settings.get("Comfy.VueNodes.Enabled"))

    def open(self) -> None:
        for name, value in self.settings.items():
            url = f"http://127.0.0.1:{self.host.port}/settings/{name}"
            urllib.request.urlopen(urllib.request.Request(url, json.dumps(value).encode(), method="POST"))
        self.page.goto(f"http://127.0.0.1:{self.host.port}/", timeout=60_000 * PATIENCE)
        self.wait(READY)
        self.settle()

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        self.page.wait_for_function(f"() => {condition.strip()}", timeout=1000 * seconds * PATIENCE)

    def settle(self) -> None:
        """Until nothing of ours has moved or grown for ten frames."""
        self.page.evaluate("() => void delete window.seen_before")
        self.page.wait_for_function(AT_REST, timeout=60_000 * PATIENCE)

    def load(self, workflow: dict[str, Any]) -> None:
        self.page.evaluate("graph => window.app.loadGraphData(graph)", workflow)
        self.wait(f"app.graph.nodes.length === {len(workflow['nodes'])}")
        self.settle()

    def node(self, kind: str, body: str) -> Any:
        """Run ``body`` with ``n``, the first node of a kind."""
        find = f"const n = app.graph.nodes.find(n => n.comfyClass === 'SpectralAdapters_{kind}');"
        return self.page.evaluate(f"() => {{ {find} {body} }}")

    def until(self, kind: str, condition: str, seconds: float = 90) -> None:
        find = f"app.graph.nodes.find(n => n.comfyClass === 'SpectralAdapters_{kind}')"
        self.wait(f"{{ const n = {find}; return n && ({condition}); }}", seconds)

    def put(self, kind: str, **values: Any) -> None:
        """Set widgets of the first node of a kind."""
        each = f"for (const [name, value] of Object.entries({json.dumps(values)}))"
        self.node(kind, f"{each} n.widgets.find(w => w.name === name).value = value;")

    def run(self) -> None:
        self.page.evaluate("() => void app.queuePrompt(0, 1)")

    def client(self, kind: str, slot: int, is_input: bool) -> list[float]:
        """Where a socket is on the screen."""
        place = f"n.getConnectionPos({str(is_input).lower()}, {slot}, new Float32Array(2))"
        body = (
            f"const [x, y] = {place}; const d = app.canvas.ds, r = app.canvas.canvas.getBoundingClientRect();"
        )
        body += "return [(x + d.offset[0]) * d.scale + r.left, (y + d.offset[1]) * d.scale + r.top];"
        found: list[float] = self.node(kind, body)
        return found

    def alone(self, *kinds: str) -> None:
        """A new graph with these nodes beside each other, in sight."""
        made = "".join(
            f"{{ const n = LiteGraph.createNode('SpectralAdapters_{kind}'); n.pos = [{100 + 480 * i}, 120];"
            " app.graph.add(n); }"
            for i, kind in enumerate(kinds)
        )
        sight = "app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true);"
        self.page.evaluate(f"() => {{ app.graph.clear(); {made} {sight} }}")
        self.settle()

    def toggle_library(self) -> None:
        command = "Workspace.ToggleSidebarTab.spectral_adapters.library"
        self.page.evaluate(f"() => app.extensionManager.command.execute('{command}')")

    def press(self, label: str) -> None:
        find = f"[...document.querySelectorAll('.spectral button')].find(b => b.textContent === '{label}')"
        self.page.evaluate(f"() => {find}.click()")


@contextmanager
def opened(
    host: Host, chromium: Any, vue: bool = False, theme: str = "dark", language: str = "en", scale: float = 1
) -> Iterator[Tab]:
    """A tab with these settings; our files name nothing on its console."""
    settings = {
        "Comfy.VueNodes.Enabled": vue,
        "Comfy.TutorialCompleted": True,
        "Comfy.ColorPalette": theme,
        "Comfy.Locale": language,
        "Comfy.Workflow.Persist": True,
        "Comfy.Minimap.Visible": False,
        "Comfy.Graph.CanvasInfo": False,
    }
    context = chromium.new_context(viewport={"width": 1500, "height": 1000}, device_scale_factor=scale)
    context.set_default_timeout(20_000 * PATIENCE)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    try:
        tab = Tab(context, host, settings)
        yield tab
        assert not tab.ours, "the console names our files"
    finally:
        context.close()


@pytest.fixture(scope="session", params=["canvas", "nodes 2.0"])
def page_of_many_tests(request: pytest.FixtureRequest, served: Host, chromium: Any) -> Iterator[Tab]:
    """The page in one of the two ways in which it shows nodes; loading it takes longer than a test."""
    with opened(served, chromium, vue=request.param == "nodes 2.0") as found:
        yield found


@pytest.fixture
def tab(page_of_many_tests: Tab) -> Iterator[Tab]:
    """That page with an empty graph; afterwards its console names none of our files."""
    found = page_of_many_tests
    found.page.keyboard.press("Escape")  # a dialog of the test before
    shut = "[...document.querySelectorAll('.p-dialog-close-button')].forEach(button => button.click())"
    found.page.evaluate(f"() => {shut}")
    found.page.evaluate("() => localStorage.removeItem('spectral_adapters.reports')")
    found.alone()
    yield found
    heard, found.ours = found.ours, []
    assert not heard, "the console names our files"


def workflow(name: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    found: dict[str, Any] = json.loads((root / "example_workflows" / f"{name}.json").read_text("utf-8"))
    return found
