"""The tab **Spectral**: fuse, report and export. Plain components only, for gradio 3 and 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spectral_core.errors import SpectralAdapterError

from . import tools
from .extension import Extension
from .folders import layout_of_loaded, lora_folder


def build(extension: Extension) -> list[tuple[Any, str, str]]:
    """What ``on_ui_tabs`` wants."""
    import gradio as gr

    def names() -> list[str]:
        return [entry.name for entry in extension.library.entries()]

    with gr.Blocks(analytics_enabled=False) as blocks:
        refresh = gr.Button("Refresh the lists of adapters")
        with gr.Tab("Fuse"):
            chosen = gr.Dropdown(names(), multiselect=True, label="Adapters", elem_id="spectral_fuse_names")
            weights = gr.Textbox(label="Weights", placeholder="1, 0.8 (empty: all 1)")
            method = gr.Dropdown(list(tools.METHODS), value="sum", label="Method")
            rank = gr.Number(value=0, precision=0, label="Rank (0: everything is kept exactly)")
            freeze = gr.Checkbox(value=False, label="Replace adaptive gates by their masks from training")
            name = gr.Textbox(label="Name of the new file", placeholder="fused")
            run = gr.Button("Fuse", variant="primary", elem_id="spectral_fuse_run")
            text = gr.Textbox(label="Report", lines=12, interactive=False, elem_id="spectral_fuse_report")
            picture = gr.Image(label="Overlap", type="pil", interactive=False)
            run.click(_fuse(extension), [chosen, weights, method, rank, freeze, name], [text, picture])
        with gr.Tab("Report"):
            one = gr.Dropdown(names(), label="Adapter", elem_id="spectral_report_adapter")
            look = gr.Button("Report", variant="primary", elem_id="spectral_report_run")
            said = gr.Textbox(label="Report", lines=12, interactive=False, elem_id="spectral_report_text")
            sheet = gr.Image(label="Spectra and gates", type="pil", interactive=False)
            look.click(_report(extension), [one], [said, sheet])
        with gr.Tab("Export"):
            source = gr.Dropdown(names(), label="Adapter", elem_id="spectral_export_adapter")
            precision = gr.Dropdown(list(tools.PRECISIONS), value="fp16", label="Precision")
            drop = gr.Checkbox(value=False, label="Leave a schedule out (a LoRA file cannot hold one)")
            write = gr.Button("Export as LoRA", variant="primary", elem_id="spectral_export_run")
            done = gr.Textbox(label="Report", lines=8, interactive=False, elem_id="spectral_export_report")
            write.click(_export(extension), [source, precision, drop], [done])
        refresh.click(lambda: [gr.update(choices=names())] * 3, [], [chosen, one, source])
    return [(blocks, "Spectral", "spectral_tab")]


def numbers(text: str) -> list[float]:
    """``1, 0.8``; raises SpectralAdapterError that quotes what is no number."""
    found = []
    for piece in text.replace(";", ",").split(","):
        if piece.strip():
            try:
                found.append(float(piece))
            except ValueError:
                raise SpectralAdapterError(f"weights: {piece.strip()!r} is no number") from None
    return found


def _fuse(extension: Extension) -> Callable[..., tuple[str, Any]]:
    def run(
        names: list[str], weights: str, method: str, rank: float, freeze: bool, name: str
    ) -> tuple[str, Any]:
        try:
            _, text, picture = tools.fused(
                extension.library, names or [], numbers(weights or ""), method, int(rank or 0), freeze, name
            )
            return text, picture
        except SpectralAdapterError as error:
            return str(error), None

    return run


def _report(extension: Extension) -> Callable[[str | None], tuple[str, Any]]:
    def run(name: str | None) -> tuple[str, Any]:
        try:
            return tools.report(extension.library, name) if name else ("choose an adapter first", None)
        except SpectralAdapterError as error:
            return str(error), None

    return run


def _export(extension: Extension) -> Callable[[str | None, str, bool], str]:
    def run(name: str | None, precision: str, drop_schedule: bool) -> str:
        if not name:
            return "choose an adapter first"
        try:
            path, text = tools.exported(
                extension.library, name, lora_folder(), precision, drop_schedule, layout_of_loaded()
            )
            return f"exported as {path.name}\n{text}"
        except SpectralAdapterError as error:
            return str(error)

    return run
