"""Numbers into a page of the documentation, between two marks; the words around them are people's."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"


def put(page: Path, body: str, title: str) -> Path:
    """The page with ``body`` between its marks; a new one has the title and the marks."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"{title}\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    return page
