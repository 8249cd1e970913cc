"""The tab **Spectral**: train, fuse, distil, report, export. Plain components only, for gradio 3 and 4.

What takes long is a job (:mod:`.jobs`): its button shows how far it is until it is over, and another one
stops it. A page that was opened anew sees the same by **Show**.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from spectral_core.errors import SpectralAdapterError
from spectral_core.training.config.setting import Setting

from . import tools, training, work
from .extension import Extension
from .folders import layout_of_loaded, lora_folder

_SECONDS = 0.5  # between two looks at a job
Shown = tuple[str, Any]


def build(extension: Extension) -> list[tuple[Any, str, str]]:
    """What ``on_ui_tabs`` wants."""
    import gradio as gr

    def names() -> list[str]:
        return [entry.name for entry in extension.library.entries()]

    with gr.Blocks(analytics_enabled=False) as blocks:
        refresh = gr.Button("Refresh the lists of adapters")
        lists = []
        with gr.Tab("Train"):
            _train_tab(extension)
        with gr.Tab("Fuse"):
            lists.append(_fuse_tab(extension, names()))
        with gr.Tab("Distil"):
            lists.append(_distil_tab(extension, names()))
        with gr.Tab("Report"):
            one = gr.Dropdown(names(), label="Adapter", elem_id="spectral_report_adapter")
            look = gr.Button("Report", variant="primary", elem_id="spectral_report_run")
            said = gr.Textbox(label="Report", lines=12, interactive=False, elem_id="spectral_report_text")
            sheet = gr.Image(label="Spectra and gates", type="pil", interactive=False)
            look.click(_report(extension), [one], [said, sheet])
            lists.append(one)
        with gr.Tab("Export"):
            source = gr.Dropdown(names(), label="Adapter", elem_id="spectral_export_adapter")
            precision = gr.Dropdown(list(tools.PRECISIONS), value="fp16", label="Precision")
            drop = gr.Checkbox(value=False, label="Leave a schedule out (a LoRA file cannot hold one)")
            write = gr.Button("Export as LoRA", variant="primary", elem_id="spectral_export_run")
            done = gr.Textbox(label="Report", lines=8, interactive=False, elem_id="spectral_export_report")
            write.click(_export(extension), [source, precision, drop], [done])
            lists.append(source)
        refresh.click(lambda: [gr.update(choices=names())] * len(lists), [], lists)
    return [(blocks, "Spectral", "spectral_tab")]


def _train_tab(extension: Extension) -> None:
    import gradio as gr

    rows = training.train_settings()
    images = gr.Textbox(
        label="Folder with pictures, and captions beside them (cat.jpg, cat.txt)",
        elem_id="spectral_train_images",
    )
    token = gr.Textbox(label="Word of the concept", placeholder="<mydog>", elem_id="spectral_train_token")
    name = gr.Textbox(label="Name of the run and of the adapter", elem_id="spectral_train_name")
    fields = _settings(rows, training.GROUPS, "train")

    def begin(images: str, token: str, name: str, *values: Any) -> None:
        given = training.read(dict(zip(rows, values, strict=True)), rows)
        work.train(extension, images, token, name, given)

    _job(extension, "train", "Train, or go on", begin, [images, token, name, *fields])


def _fuse_tab(extension: Extension, names: Sequence[str]) -> Any:
    import gradio as gr

    chosen, weights = _several(names, "fuse")
    methods = [*tools.METHODS, *training.METHODS]
    method = gr.Dropdown(methods, value="sum", label="Method", elem_id="spectral_fuse_method")
    rank = gr.Number(value=0, precision=0, label="Rank (0: everything is kept exactly)")
    freeze = gr.Checkbox(value=False, label="Replace adaptive gates by their masks from training")
    prompts = _prompts("Prompts, one line for each adapter; for closed-form and gradient, which draw")
    name = gr.Textbox(label="Name of the new file", placeholder="fused", elem_id="spectral_fuse_name")

    def begin(
        names: list[str], weights: str, method: str, rank: float, freeze: bool, prompts: str, name: str
    ) -> None:
        each = numbers(weights or "")
        asked = tools.FuseSettings(names or [], each, method, int(rank or 0), freeze, prompts, name)
        work.fuse(extension, asked)

    _job(extension, "fuse", "Fuse", begin, [chosen, weights, method, rank, freeze, prompts, name])
    return chosen


def _distil_tab(extension: Extension, names: Sequence[str]) -> Any:
    import gradio as gr

    chosen, weights = _several(names, "distil")
    rank = gr.Number(value=0, precision=0, label="Rank (0: all ranks together)")
    prompts = _prompts("Prompts, one line for each adapter (empty: from their words)")
    name = gr.Textbox(label="Name of the new file", placeholder="distilled", elem_id="spectral_distil_name")
    rows = training.distil_settings()
    groups = tuple(dict.fromkeys(row.words.group for row in rows.values()))
    fields = _settings(rows, groups, "distil")

    def begin(names: list[str], weights: str, rank: float, prompts: str, name: str, *values: Any) -> None:
        given = training.read(dict(zip(rows, values, strict=True)), rows)
        each = numbers(weights or "")
        asked = tools.FuseSettings(names or [], each, rank=int(rank or 0), prompts=prompts, name=name)
        work.distil(extension, asked, given)

    _job(extension, "distil", "Distil, or go on", begin, [chosen, weights, rank, prompts, name, *fields])
    return chosen


def _several(names: Sequence[str], where: str) -> tuple[Any, Any]:
    import gradio as gr

    chosen = gr.Dropdown(list(names), multiselect=True, label="Adapters", elem_id=f"spectral_{where}_names")
    return chosen, gr.Textbox(label="Weights", placeholder="1, 0.8 (empty: all 1)")


def _prompts(label: str) -> Any:
    import gradio as gr

    return gr.Textbox(label=label, lines=2, placeholder="several of one adapter with | between them")


def _settings(rows: Mapping[str, Setting], groups: Sequence[str], where: str) -> list[Any]:
    """A field for every setting, by group, in the rows' order: the table that the command has."""
    import gradio as gr

    made: dict[str, Any] = {}
    for group in groups:
        with gr.Accordion(group.capitalize(), open=group in ("adapter", "run")):
            for name, row in rows.items():
                if row.words.group == group:
                    made[name] = _field(row, f"spectral_{where}_{name}")
    return [made[name] for name in rows]


def _field(row: Setting, element: str) -> Any:
    import gradio as gr

    told: dict[str, Any] = {"label": row.label, "info": row.words.help, "elem_id": element}
    value = training.shown(row)
    if row.choices:
        return gr.Dropdown(list(row.choices), value=value, **told)
    if row.kind is bool:
        return gr.Checkbox(value=value, **told)
    if row.kind in (int, float):
        return gr.Number(value=value, precision=0 if row.kind is int else None, **told)
    return gr.Textbox(value=value, lines=2 if row.item is str and row.kind is tuple else 1, **told)


def _job(
    extension: Extension, where: str, label: str, begin: Callable[..., None], fields: Sequence[Any]
) -> None:
    """The buttons of a job, and what it says."""
    import gradio as gr

    with gr.Row():
        run = gr.Button(label, variant="primary", elem_id=f"spectral_{where}_run")
        stop = gr.Button("Stop", elem_id=f"spectral_{where}_stop")
        show = gr.Button("Show", elem_id=f"spectral_{where}_show")
    text = gr.Textbox(label="Report", lines=12, interactive=False, elem_id=f"spectral_{where}_report")
    picture = gr.Image(label="Picture", type="pil", interactive=False, elem_id=f"spectral_{where}_picture")

    def started(*values: Any) -> Iterator[Shown]:
        try:
            begin(*values)
        except SpectralAdapterError as error:
            yield str(error), None
            return
        yield from followed(extension)

    def seen() -> Iterator[Shown]:
        yield from followed(extension)

    run.click(started, list(fields), [text, picture])
    show.click(seen, [], [text, picture])
    stop.click(extension.jobs.stop, [], [text])


def followed(extension: Extension) -> Iterator[Shown]:
    """How the job stands, until it is over."""
    while (job := extension.jobs.job) is not None and not job.is_over:
        yield job.shown(), None
        time.sleep(_SECONDS)
    yield extension.jobs.shown(), None if job is None else job.picture


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


def _report(extension: Extension) -> Callable[[str | None], Shown]:
    def run(name: str | None) -> Shown:
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
