"""Photograph the example workflows on ComfyUI's own page, after a run, with a headless Chromium.

    python -m tools.picture_example_workflows [NAME ...] --chromium /usr/bin/chromium

Needs playwright (``pip install playwright``, in an environment of its own) and a ComfyUI (see
``tests/host/booted.py``). Writes ``example_workflows/<name>.jpg``, which the page shows among its templates,
and the same pictures for the README into ``docs/``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.host.booted import ROOT, Host, find_checkouts

WORKFLOWS = ROOT / "example_workflows"
PAGE = {"width": 2000, "height": 1125}
QUALITY = 60
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Workflow.WorkflowTabsPosition": "Sidebar",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text at any zoom
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "Comfy.InstalledVersion": "99.0.0",
}
LOAD = "page => window.app.loadGraphData(page)"
# Put the whole graph into what the page's side bar (left) and menu (top) leave free.
FIT = """
([left, top, width, height]) => {
  const side = 70, menu = 70;
  const scale = Math.min((innerWidth - side) / (width + 60), (innerHeight - menu) / (height + 90));
  const ds = window.app.canvas.ds;
  ds.scale = scale;
  ds.offset[0] = (innerWidth + side) / scale / 2 - left - width / 2;
  ds.offset[1] = (innerHeight + menu) / scale / 2 - top - height / 2 + 10;
  window.app.canvas.deselectAll?.();
  window.app.graph.setDirtyCanvas(true, true);
}
"""
BOX = """
() => {
  const nodes = window.app.graph._nodes;
  const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  return [left, top, right - left, bottom - top];
}
"""


def photograph(page: Any, host: Host, name: str, seconds: float) -> bytes:
    """Load, run and show one workflow. The host forgets its results first: nodes answered from its cache
    would show no text.
    """
    host.post("/free", {"unload_models": True, "free_memory": True})
    page.evaluate(LOAD, json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))
    page.wait_for_timeout(1500)
    done = len(host.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    for _ in range(int(seconds * 2)):
        page.wait_for_timeout(500)
        if len(host.get("/history")) > done:
            break
    else:
        raise TimeoutError(f"{name} was not done after {seconds} s:\n{host.log[-3000:]}")
    page.wait_for_timeout(2500)  # the pictures arrive and the nodes grow
    page.evaluate(FIT, page.evaluate(BOX))
    page.mouse.move(5, PAGE["height"] - 5)
    page.wait_for_timeout(6000)  # the notice of the finished run goes
    return bytes(page.screenshot(type="jpeg", quality=QUALITY))


def main() -> None:
    from playwright.sync_api import sync_playwright

    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("names", nargs="*", metavar="NAME")
    options.add_argument("--chromium", default="/usr/bin/chromium")
    options.add_argument("--seconds", type=float, default=300)
    chosen = options.parse_args()
    names = chosen.names or sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    with tempfile.TemporaryDirectory() as folder:
        host = Host(find_checkouts()[0], Path(folder))
        user = Path(folder) / "user" / "default"
        user.mkdir(parents=True)
        (user / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        try:
            host.start()
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chosen.chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport=PAGE)  # type: ignore[arg-type]
                page.goto(f"http://127.0.0.1:{host.port}", wait_until="domcontentloaded", timeout=120_000)
                page.wait_for_function("() => window.app?.graph && window.app.canvas", timeout=120_000)
                page.wait_for_timeout(4000)
                for name in names:
                    path = WORKFLOWS / f"{name}.jpg"
                    path.write_bytes(photograph(page, host, name, chosen.seconds))
                    shutil.copy(path, ROOT / "docs" / f"workflow_{name}.jpg")
                    print(f"{name}: {path.stat().st_size:,} bytes")
                browser.close()
        finally:
            host.stop()


if __name__ == "__main__":
    main()
