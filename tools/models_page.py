"""Write the tables of docs/models.md from the rows of the conformance table.

    python -m tools.models_page [conformance.json …]

The files are what ``tests/host/conformance/inside_conformance.py`` writes, of any hosts and families; they
are taken into ``benchmarks/results/conformance.json``, from which the page is written. A test says when the
page is out of date.
"""

from __future__ import annotations

import json
import sys
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
    before = results.get(host, {}).get("families", {})
    whole = {**found, "families": dict(sorted({**before, **found["families"]}.items()))}
    return dict(sorted({**results, host: whole}.items(), key=lambda item: _order(item[0])))


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def counts(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How many checks passed, were refused with a sentence, failed, or were not run."""
    return Counter(cell["state"] for row in rows for cell in row["checks"].values())


def verdict(row: Mapping[str, Any]) -> str:
    """``works`` where every check passed; else what does, and the sentence of what does not."""
    for state, word in (("failed", "fails"), ("not run", "not run"), ("refused", "refused")):
        odd = {what: cell["said"] for what, cell in row["checks"].items() if cell["state"] == state}
        if odd:
            said = next(iter(odd.values()))
            if state == "refused" and set(odd) <= TRAINING:
                return f"applies; does not train: {said}"
            return f"{word} ({', '.join(odd)}): {said}"
    return "works"


def _targets(row: Mapping[str, Any]) -> str:
    return str(row["checks"].get("targets", {}).get("said", ""))


def table(results: Results) -> str:
    """The page's part that is written from the results, as Markdown."""
    newest = list(results)[-1]
    lines = []
    for host, found in results.items():
        n = counts(found["families"].values())
        states = ", ".join(f"{n[s]} {s}" for s in ("passed", "refused", "failed", "not run") if n[s])
        lines.append(f"- ComfyUI {host}: {len(found['families'])} families, {n.total()} checks: {states}")
    parts = ["\n".join(lines) + "\n"]
    names = {name: row for found in results.values() for name, row in found["families"].items()}
    for kind in KINDS:
        of_kind = sorted(name for name, row in names.items() if row["kind"] == kind)
        rows = [_line(name, results) for name in of_kind]
        head = f"| {kind} | ComfyUI | | layers |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(rows) + "\n")
    without = results[newest]["without"]
    parts.append("Listed by the host and not gone through:\n\n" + "\n".join(_without(without)) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _line(name: str, results: Results) -> str:
    """A family; hosts with the same verdict share a cell."""
    hosts: dict[str, list[str]] = {}
    for host, found in results.items():
        if name in found["families"]:
            hosts.setdefault(verdict(found["families"][name]), []).append(host)
    newest = [found["families"][name] for found in results.values() if name in found["families"]][-1]
    if len(hosts) == 1:
        (said, where), *_ = hosts.items()
        return f"| {name} | {', '.join(where)} | {said} | {_targets(newest)} |"
    said = "; ".join(f"{', '.join(where)}: {what}" for what, where in hosts.items())
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
