"""Take the pictures of docs/page.md: what people see, in a real browser on a real ComfyUI.

    python -m tools.draw_screens [NAME ...]

Needs what ``tests/page`` needs (a ComfyUI with its front end, Playwright, Chromium) and a Chinese font.
Writes ``docs/page/*.jpg``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.host.booted import ROOT, Host, find_checkouts
from tests.page.conftest import FLAGS, Tab, opened, workflow

FOLDER = ROOT / "docs" / "page"
QUALITY = 66
REPORTED = "!n.spectralReport.innerText.startsWith('The report appears')"
SHOW = """
([kinds, scale]) => {
  const kind = (n) => (n.comfyClass ?? '').replace('SpectralAdapters_', '');
  const nodes = app.graph.nodes.filter(n => kinds.includes(kind(n)));
  const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset[0] = 90 / scale - left;
  app.canvas.ds.offset[1] = 110 / scale - top;
  app.canvas.deselectAll?.();
  app.canvas.setDirty(true, true);
}
"""


def show(tab: Tab, *kinds: str, scale: float = 0.9) -> None:
    """These nodes in sight."""
    tab.page.mouse.move(700, 990)
    tab.page.evaluate(SHOW, [list(kinds), scale])
    tab.page.wait_for_timeout(1500)


def ran(tab: Tab, name: str, kind: str, seconds: float = 400) -> None:
    """A template, run until a node of ours has reported."""
    tab.load(workflow(name))
    tab.run()
    tab.until(kind, REPORTED, seconds)
    tab.page.wait_for_timeout(7000)  # the pictures come, and the notice of the finished run goes


def templates(tab: Tab) -> None:
    tab.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    tab.page.wait_for_timeout(2500)
    tab.page.get_by_text("comfyui-spectral-a").last.click()
    tab.page.wait_for_timeout(2500)


def try_an_adapter(tab: Tab) -> None:
    ran(tab, "1 Try an adapter", "LoadFouRA")
    show(tab, "LoadDemoModel", "LoadFouRA", "SaveImage", scale=0.7)


def training(tab: Tab) -> None:
    ran(tab, "3 Train and use", "TrainAdapter")
    show(tab, "TrainAdapter", "TrainOptimiser", scale=0.85)


def combine(tab: Tab) -> None:
    tab.load(workflow("2 Combine three concepts"))
    tab.until("FuseAdapters", "n.spectralVerdict.box.innerText.match(/bleed|overlap/)")
    show(tab, "LoadSpectralAdapter", "FuseAdapters", scale=0.75)


def compare(tab: Tab) -> None:
    ran(tab, "4 Compare adapters", "CompareAdapters")
    show(tab, "AdapterStack", "CompareAdapters", scale=0.8)


def slider(tab: Tab) -> None:
    ran(tab, "5 Slider from two prompts", "CompareAdapters", 600)
    show(tab, "ConceptSlider", "CompareAdapters", scale=0.75)


def curve(tab: Tab) -> None:
    tab.alone("AdapterStrength", "AdapterStack")
    tab.until("AdapterStack", "n.spectralStack.files.length > 0")
    tab.node("AdapterStrength", "n.spectralCurve.write([[0, 0], [0.25, 1], [0.6, 0.8], [1, 0.1]])")
    for _ in range(3):
        tab.press("+ Add adapter")
    for kind in ("AdapterStrength", "AdapterStack"):
        tab.node(kind, "n.setSize([440, n.size[1]])")
    show(tab, "AdapterStrength", "AdapterStack", scale=1.2)


def error(tab: Tab) -> None:
    tab.load(workflow("6 Strength over the steps"))
    set_to = "n.widgets.find(w => w.name === '{}').value = '{}';"
    tab.node("AdapterStrength", set_to.format("curve", "custom") + set_to.format("custom_curve", "0:1, half"))
    tab.run()
    tab.until("AdapterStrength", "n.spectralReport.dataset.kind === 'error'")
    tab.page.wait_for_timeout(2500)
    show(tab, "LoadFouRA", "AdapterStrength", scale=0.9)


def library(tab: Tab) -> None:
    tab.load(workflow("1 Try an adapter"))
    tab.page.evaluate(
        "() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.spectral_adapters.library')"
    )
    tab.page.wait_for_timeout(4000)
    tab.page.evaluate("() => { app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [700, 150]; }")
    tab.page.wait_for_timeout(1000)


def chinese(tab: Tab) -> None:
    tab.load(workflow("1 Try an adapter"))
    tab.page.wait_for_timeout(1500)
    show(tab, "LoadDemoModel", "LoadFouRA", scale=0.9)


SCREENS: dict[str, tuple[Callable[[Tab], None], dict[str, Any]]] = {
    "templates": (templates, {}),
    "try": (try_an_adapter, {}),
    "training": (training, {"vue": True}),
    "combine": (combine, {"vue": True}),
    "compare": (compare, {}),
    "slider": (slider, {"vue": True, "theme": "light"}),
    "curve": (curve, {}),
    "error": (error, {"theme": "light"}),
    "library": (library, {}),
    "chinese": (chinese, {"language": "zh"}),
}


def main() -> None:
    from playwright.sync_api import sync_playwright

    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("names", nargs="*", metavar="NAME")
    chosen = options.parse_args().names or list(SCREENS)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        host = Host(find_checkouts()[0], Path(folder))
        host.start()
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
            for name in chosen:
                act, settings = SCREENS[name]
                host.post("/free", {"unload_models": True, "free_memory": True})
                with opened(host, browser, **settings) as tab:
                    act(tab)
                    path = FOLDER / f"{name}.jpg"
                    tab.page.screenshot(type="jpeg", quality=QUALITY, path=str(path), timeout=180_000)
                    print(f"{name}: {path.stat().st_size:,} bytes", flush=True)
        finally:
            host.stop()


if __name__ == "__main__":
    main()
