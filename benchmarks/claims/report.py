"""docs/evidence.md from the kept cells: one section per claim, with its numbers, its picture and its
verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims import claims_foura, claims_learning, claims_spectral
from benchmarks.claims.figures import Figures, table
from benchmarks.claims.lab import Lab
from spectral_core.plots import save_picture

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
CELLS_OF: Mapping[str, str] = {
    "styles": "style__",
    "merging": "merging__",
    "columns": "learned__spectral_a",
    "budgets": "learned__",
    "gates": "gates__",
    "copying": "copying__",
    "fusing": "fusing",
    "learning": "learning__",
    "exact": "exact",
}


def write(lab: Lab, docs: Path = DOCS) -> Path:
    """Put the numbers between the marks of ``evidence.md``, and its pictures beside it."""
    figures = Figures(lab)
    claims = [
        make(figures) for make in (*claims_foura.CLAIMS, *claims_spectral.CLAIMS, *claims_learning.CLAIMS)
    ]
    pictures = docs / "evidence"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [_overview(claims)]
    for number, claim in enumerate(claims, 1):
        parts.append(_section(number, claim, figures, pictures))
    page = docs / "evidence.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Evidence\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = "\n\n".join(parts)
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    return page


def _overview(claims: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(number),
            claim["claim"],
            claim["paper"],
            claim["ours"].replace("; ", "<br>"),
            claim["verdict"].replace("; ", "<br>"),
        ]
        for number, claim in enumerate(claims, 1)
    ]
    return table(["", "claim", "paper", "here", "verdict"], rows)


def _section(number: int, claim: Mapping[str, Any], figures: Figures, pictures: Path) -> str:
    lines = [f"### {number}. {claim['claim']}", claim["table"]]
    if claim["picture"] is not None:
        kind = "jpg" if claim["experiment"] == "fusing" else "png"  # photographs, and drawn lines
        name = f"claim_{number:02d}.{kind}"
        save_picture(claim["picture"], pictures / name)
        lines.append(f"![{claim['claim']}](evidence/{name})")
    if claim["experiment"] in CELLS_OF:
        seconds = figures.cpu_seconds(CELLS_OF[claim["experiment"]])
        lines.append(
            f"`python -m benchmarks.claims run {claim['experiment']}` · {seconds:.0f} processor seconds"
        )
    return "\n\n".join(line for line in lines if line)
