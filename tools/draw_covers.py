"""Run the example workflows on a ComfyUI and draw their covers from what comes out, for the page's templates.

    python -m tools.draw_covers [NAME ...]

Needs a ComfyUI (see ``tests/host/booted.py``). Writes ``example_workflows/<name>.jpg``, the same for the help
pages of the nodes that an example is about, and beside the example adapters a picture of their concept
(``<file>.preview.png``), which the loaders' cards show. To be run again when the demo model or its adapters
change.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from demo_model.draw import draw_concept
from spectral_core.plots.text import drawable
from tests.host.booted import ROOT, Host, find_checkouts
from tests.host.graphs import as_prompt, pictures_of, read_workflow
from tools.example_graphs import WORKFLOWS

FOLDER = ROOT / "example_workflows"
SIDE = 560
GROUND, INK = (24, 24, 28), (222, 222, 228)
EDGE, LINE, WORDS = 16, 34, 20
QUALITY = 82
HELP_FOLDER, HELP_SIZE = ROOT / "web" / "docs", (900, 900)
HELP = {  # the node that an example is about
    "4 Compare adapters": "CompareAdapters",
    "5 Slider from two prompts": "ConceptSlider",
    "7 Fuse and export LoRAs": "ExportAdapterAsLoRA",
    "8 Distil three concepts": "DistilAdapters",
}
REFERENCE = 5  # the seed of a concept's reference picture


def cover(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures as large as they fit into a square, which the page's cards are, each with its word below."""
    sheet = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen = ImageDraw.Draw(sheet)
    columns = 1 if len(pictures) == 1 else 2
    rows = -(-len(pictures) // columns)
    line = LINE if any(word for _, word in pictures) else 0
    wide = (SIDE - EDGE * (columns + 1)) // columns
    high = (SIDE - EDGE * (rows + 1)) // rows - line
    fitted = [(_fit(picture, wide, high), word) for picture, word in pictures]
    tallest = max(picture.height for picture, _ in fitted)
    top = (SIDE - rows * (tallest + line + EDGE) + EDGE) // 2
    for i, (picture, word) in enumerate(fitted):
        row, place = divmod(i, columns)
        beside = min(columns, len(fitted) - row * columns)
        left = (SIDE - beside * wide - (beside - 1) * EDGE) // 2 + place * (wide + EDGE)
        y = top + row * (tallest + line + EDGE)
        sheet.paste(picture, (left + (wide - picture.width) // 2, y))
        if word:
            font, text = drawable(word, WORDS)
            pen.text((left + wide / 2, y + picture.height + 8), text, INK, font, anchor="mt")
    return sheet


def _fit(picture: Image.Image, wide: int, high: int) -> Image.Image:
    scale = min(wide / picture.width, high / picture.height)
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def for_help(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """A single grid as it is, as large as a page shows it; several as on the cover."""
    if len(pictures) > 1:
        return cover(pictures)
    alone = pictures[0][0].convert("RGB")
    alone.thumbnail(HELP_SIZE)
    return alone


def draw_previews() -> None:
    """A reference picture beside every example adapter: what its word means."""
    for file in sorted(FOLDER.glob("*/examples/*.safetensors")):
        picture, _ = draw_concept(file.stem.partition("_")[0], REFERENCE)
        shown = picture.resize((128, 128), Image.Resampling.BICUBIC)
        shown.save(file.with_suffix(".preview.png"), optimize=True)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("names", nargs="*", metavar="NAME")
    chosen = options.parse_args().names or list(WORKFLOWS)
    draw_previews()
    with tempfile.TemporaryDirectory() as folder:
        host = Host(find_checkouts()[0], Path(folder))
        host.start()
        try:
            offered = host.get("/object_info")
            for name in chosen:
                page = read_workflow(FOLDER / f"{name}.json")
                ids = {key: str(n) for n, key in enumerate(WORKFLOWS[name].nodes, 1)}
                entry = host.run(as_prompt(page, offered), timeout=1800)
                if entry["status"]["status_str"] != "success":
                    raise RuntimeError(f"{name} failed: {entry['status']}")
                shown = [(pictures_of(host, entry, ids[key])[0], word) for key, word in WORKFLOWS[name].cover]
                path = FOLDER / f"{name}.jpg"
                cover(shown).save(path, quality=QUALITY, optimize=True)
                if name in HELP:
                    for_help(shown).save(
                        HELP_FOLDER / f"SpectralAdapters_{HELP[name]}.jpg", quality=QUALITY, optimize=True
                    )
                print(f"{name}: {path.stat().st_size:,} bytes", flush=True)
        finally:
            host.stop()


if __name__ == "__main__":
    main()
