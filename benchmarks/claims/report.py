"""docs/evidence.md from the kept cells, a row a claim, and the pages below it: each claim with its numbers,
its picture and its verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims import claims_foura, claims_learning, claims_spectral
from benchmarks.claims.figures import Figures, Part, table
from benchmarks.claims.lab import Lab
from benchmarks.claims.page import BEGIN, DOCS, END, put
from spectral_core.plots import save_picture

__all__ = ["BEGIN", "CLAIMS", "DOCS", "END", "PAGES", "write"]

CLAIMS = (*claims_foura.CLAIMS, *claims_spectral.CLAIMS, *claims_learning.CLAIMS)
PAGES: Mapping[str, Sequence[int]] = {
    "foura": range(1, 7),
    "fusing": (7,),
    "spectral": (8, 9, 10, 11),
    "cost": (12,),
    "learning": (13,),
}
"""Page of docs/evidence -> the claims that it has."""
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
    """Put the numbers between the marks of ``evidence.md`` and of the pages below it, and the pictures beside
    these."""
    figures = Figures(lab)
    claims = {number: make(figures) for number, make in enumerate(CLAIMS, 1)}
    for page, numbers in PAGES.items():
        sections = [_section(number, claims[number], figures, docs / "evidence") for number in numbers]
        put(docs / "evidence" / f"{page}.md", "\n\n".join(sections), f"# Evidence: {page}")
    return put(docs / "evidence.md", _overview(figures, claims), "# Evidence")


def _page_of(number: int) -> str:
    return next(page for page, numbers in PAGES.items() if number in numbers)


def anchor(number: int, claim: str) -> str:
    """As Markdown makes it of a heading."""
    kept = "".join(c for c in f"{number}. {claim}".lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _overview(figures: Figures, claims: Mapping[int, Mapping[str, Any]]) -> str:
    rows = []
    for number, claim in claims.items():
        shown: list[Part] = [p for p in claim["parts"] if not p.detail]
        said = [f"{p.what}: {p.value}" for p in shown]
        if any(figures.outdated(name) for name in claim["cells"]):
            said.append("*older settings*")
        link = f"[{number}](evidence/{_page_of(number)}.md#{anchor(number, claim['claim'])})"
        columns = (said, [p.visible for p in shown], [p.verdict for p in shown])
        run = f"`{claim['experiment']}`"
        rows.append([link, claim["claim"], claim["paper"], *map("<br>".join, columns), run])
    return table(["", "claim", "paper", "here", "visible", "verdict", "run"], rows)


def _section(number: int, claim: Mapping[str, Any], figures: Figures, pictures: Path) -> str:
    lines = [f"### {number}. {claim['claim']}"]
    if any(figures.outdated(name) for name in claim["cells"]):
        lines.append("Made with older settings; see [how](how.md#older-settings).")
    parts = [[p.what, p.value, p.visible, p.verdict] for p in claim["parts"]]
    lines += [table(["", "here", "visible", "verdict"], parts), claim["table"]]
    kind = "jpg" if claim["experiment"] == "fusing" else "png"  # photographs, and drawn lines
    name = f"claim_{number:02d}.{kind}"
    if claim["picture"] is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        save_picture(claim["picture"], pictures / name)
    if (pictures / name).exists():  # or an earlier run's, whose strips are not here
        lines.append(f"![{claim['claim']}]({name})")
    if claim["experiment"] in CELLS_OF:
        seconds = figures.cpu_seconds(CELLS_OF[claim["experiment"]])
        lines.append(
            f"`python -m benchmarks.claims run {claim['experiment']}` · {seconds:.0f} processor seconds"
        )
    return "\n\n".join(line for line in lines if line)
