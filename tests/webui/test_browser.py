"""The webuis' own pages in a real browser: the cards, the field, and the tab, used as a person uses them.

$WEBUI_SCREENS: a folder into which the pictures of the documentation are written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.webui.booted import Webui

WAIT = 120_000  # milliseconds


@pytest.fixture
def page(webui: Webui) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: the page is not tested")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: the page is not tested")
    with api.sync_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(WAIT)
        page.goto(f"{webui.address}/?__theme=dark")
        page.wait_for_selector("#txt2img_prompt textarea")
        yield page
        browser.close()


def shot(page: Any, webui: Webui, name: str) -> None:
    if folder := os.environ.get("WEBUI_SCREENS"):
        path = Path(folder) / f"{webui.kind.lower()}_{name}.jpg"
        page.screenshot(path=path, type="jpeg", quality=80)


def tab(page: Any, name: str) -> None:
    page.locator("#tabs > .tab-nav button, #tabs > div > button").filter(has_text=name).first.click()


def inner(page: Any, name: str) -> None:
    here = page.locator("#tab_spectral_tab .tab-nav button")
    here.get_by_text(name, exact=True).click()


def test_a_card_puts_its_tag_into_the_prompt(webui: Webui, page: Any) -> None:
    page.locator("#txt2img_extra_tabs > .tab-nav button", has_text="Spectral").first.click()
    card = page.locator(f"#txt2img_spectral_cards .card[data-name='{webui.live}']")
    card.wait_for(state="visible")
    shot(page, webui, "cards")
    assert card.locator(".description").inner_text()
    card.click()
    prompt = page.locator("#txt2img_prompt textarea")
    assert f"<spectral:{webui.live}:1>" in prompt.input_value() and webui.word in prompt.input_value()


def test_the_tab_reports_and_fuses(webui: Webui, page: Any) -> None:
    tab(page, "Spectral")
    page.locator("#spectral_train_run").wait_for(state="visible")
    page.locator("#spectral_train_method").wait_for(state="visible")
    shot(page, webui, "train")
    inner(page, "Report")
    choose(page, "#spectral_report_adapter", webui.plain)
    page.locator("#spectral_report_run").click()
    said(page, "#spectral_report_text", webui.plain)
    page.locator("#tab_spectral_tab img:visible").first.wait_for()
    shot(page, webui, "report")
    inner(page, "Fuse")
    for name in (webui.names[0], webui.names[-1]):
        choose(page, "#spectral_fuse_names", name)
    page.locator("#spectral_fuse_name textarea, #spectral_fuse_name input").first.fill("by_hand")
    page.locator("#spectral_fuse_run").click()
    said(page, "#spectral_fuse_report", "saved as by_hand")
    shot(page, webui, "fuse")
    assert "by_hand" in [a["name"] for a in webui.call("/spectral/v1/adapters")]


def test_pasted_parameters_find_a_renamed_adapter(webui: Webui, page: Any) -> None:
    text = f"{webui.concept} <spectral:{webui.live}:0.7>"
    _, info = webui.draw(text, steps=2)
    prompt = page.locator("#txt2img_prompt textarea")
    given = info["infotexts"][0].replace(webui.live, "former_name")
    prompt.fill(given)
    page.locator("#txt2img_tools #paste").click()
    page.wait_for_function("document.querySelector('#txt2img_steps input[type=number]').value == '2'")
    if webui.kind == "NEO" and prompt.input_value() == given:
        pytest.skip("this Neo pastes settings, but no prompt into a field that began empty")
    page.wait_for_function(
        "text => document.querySelector('#txt2img_prompt textarea').value == text", arg=text
    )


def choose(page: Any, where: str, name: str) -> None:
    """A list opens when its field is entered; gradio 3 does not open it again while the focus is there."""
    field = page.locator(f"{where} input").first
    field.click()
    page.locator(f"{where} ul [role=option], ul.options li").filter(has_text=name).first.click()
    field.blur()


def said(page: Any, where: str, text: str) -> None:
    """Wait until a report says it."""
    page.wait_for_function(
        "([where, text]) => document.querySelector(where + ' textarea')?.value.includes(text)",
        arg=[where, text],
    )
