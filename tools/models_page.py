"""Write the tables of docs/models.md from the rows of the conformance table.

    python -m tools.models_page [conformance.json …]

The files are what ``tests/host/conformance/inside_conformance.py`` writes, of any hosts and families; they
are taken into ``benchmarks/results/conformance.json``, from which the page is written. A test says when the
page is out of date.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spectral_core.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "benchmarks" / "results" / "conformance.json"
BEGIN, END = "<!-- conformance -->\n", "<!-- /conformance -->\n"
KINDS = ("pictures", "video", "UNets", "sound and shapes")
TRAINING = {"trained", "reloaded", "resumed", "gradients"}

Results = dict[str, dict[str, Any]]
"""Version of the host -> what was found there."""


def merged(results: Results, found: Mapping[str, Any]) -> Results:
    """The results with the families of one more run; the later run of a family counts."""
    host = found["host"]
    before = results.get(host, {})
    families = {**before.get("families", {}), **found["families"]}
    whole = {**before, **found, "families": dict(sorted(families.items()))}
    return dict(sorted({**results, host: whole}.items(), key=lambda item: _order(item[0])))


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def counts(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How many checks passed, were refused with a sentence, failed, or were not run."""
    return Counter(cell["state"] for row in rows for cell in row["checks"].values())


def verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """``works`` where every check passed; else what does not, and its sentence."""
    for state, word in (("failed", "fails"), ("not run", "not run"), ("refused", "refused")):
        odd = {what: cell["said"] for what, cell in row["checks"].items() if cell["state"] == state}
        if odd:
            said = next(iter(odd.values()))
            if state == "refused" and set(odd) <= TRAINING:
                return "applies, does not train", said
            return f"{word}: {', '.join(odd)}", said
    return "works", ""


def _targets(row: Mapping[str, Any]) -> str:
    return str(row["checks"].get("targets", {}).get("said", ""))


class Notes:
    """Sentences that stand below the table, each once, by number."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def of(self, verdict: tuple[str, str]) -> str:
        short, said = verdict
        if not said:
            return short
        if said not in self.said:
            self.said.append(said)
        return f"{short} ({self.said.index(said) + 1})"

    def __str__(self) -> str:
        return "".join(f"{i}. {said}\n" for i, said in enumerate(self.said, 1))


def table(results: Results) -> str:
    """The page's part that is written from the results, as Markdown."""
    newest = list(results)[-1]
    lines = []
    for host, found in results.items():
        n = counts(found["families"].values())
        states = ", ".join(f"{n[s]} {s}" for s in ("passed", "refused", "failed", "not run") if n[s])
        lines.append(f"- ComfyUI {host}: {len(found['families'])} families, {n.total()} checks: {states}")
    parts, notes = ["\n".join(lines) + "\n"], Notes()
    names = {name: row for found in results.values() for name, row in found["families"].items()}
    for kind in KINDS:
        of_kind = sorted(name for name, row in names.items() if row["kind"] == kind)
        rows = [_line(name, results, notes) for name in of_kind]
        head = f"| {kind} | ComfyUI | | layers |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(rows) + "\n")
    if notes.said:
        parts.append(f"What was refused, in the pack's own words:\n\n{notes}")
    without = results[newest]["without"]
    parts.append("Listed by the host and not gone through:\n\n" + "\n".join(_without(without)) + "\n")
    missing = {h: [n for n in f["catalogue"] if n not in f["families"]] for h, f in results.items()}
    if any(missing.values()):
        lines = [_wrapped(f"- on {host}: {', '.join(names)}") for host, names in missing.items() if names]
        parts.append("Not run yet:\n\n" + "\n".join(lines) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _wrapped(item: str) -> str:
    """An item of a list in lines that can be read."""
    return textwrap.fill(item, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _line(name: str, results: Results, notes: Notes) -> str:
    """A family; hosts with the same verdict share a cell."""
    hosts: dict[str, list[str]] = {}
    for host, found in results.items():
        if name in found["families"]:
            hosts.setdefault(notes.of(verdict(found["families"][name])), []).append(host)
    newest = [found["families"][name] for found in results.values() if name in found["families"]][-1]
    said = "; ".join(f"{', '.join(where)}: {what}" for what, where in hosts.items())
    if len(hosts) == 1:
        said = next(iter(hosts))
    return f"| {name} | {', '.join(h for w in hosts.values() for h in w)} | {said} | {_targets(newest)} |"


def _without(without: Mapping[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in without.items():
        by_reason.setdefault(why, []).append(name)
    return [f"- {', '.join(names)}: {why}" for why, names in by_reason.items()]


def written(text: str, results: Results) -> str:
    """The page with the tables as the results have them."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:begin] + table(results) + text[end:]


def main(files: Iterable[str]) -> None:
    results: Results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for file in files:
        results = merged(results, json.loads(Path(file).read_text(encoding="utf-8")))
    write_whole(RESULTS, json.dumps(results, indent=1) + "\n")
    write_whole(PAGE, written(PAGE.read_text(encoding="utf-8"), results))


if __name__ == "__main__":
    main(sys.argv[1:])
