"""Whether a pinned release has a known vulnerability: ``python dev.py audit``, with nothing but Python.

The pins of requirements/ are looked up in OSV (https://osv.dev), whose entries for PyPI come from the Python
Packaging Authority's and GitHub's advisories; only names and versions are sent. ``--database all.zip`` looks
into a downloaded export of OSV's for PyPI instead, and sends nothing.

Ends with 0 when nothing is known, 1 when something is, and 0, saying so, when no database answers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ASKED = "https://api.osv.dev/v1/querybatch"
SECONDS = 20.0
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")

Pin = tuple[str, str]


def pins(folder: Path = ROOT / "requirements") -> list[Pin]:
    """(name, version) of every pin of the folder's files, of all Pythons."""
    found = {
        (_plain(match[1]), match[2])
        for path in folder.glob("*.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
        if (match := _PIN.match(line))
    }
    return sorted(found)


def _plain(name: str) -> str:
    """As the index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def known_in_export(wanted: Iterable[Pin], database: Path) -> dict[Pin, list[str]]:
    """Pin -> ids of the entries that list its version; withdrawn ones do not count."""
    by_name: dict[str, list[Pin]] = {}
    for pin in wanted:
        by_name.setdefault(pin[0], []).append(pin)
    found: dict[Pin, list[str]] = {}
    with zipfile.ZipFile(database) as export:
        for name in export.namelist():
            entry = json.loads(export.read(name))
            for affected in () if entry.get("withdrawn") else entry.get("affected", ()):
                for pin in by_name.get(_plain(affected.get("package", {}).get("name", "")), ()):
                    if pin[1] in affected.get("versions", ()):
                        found.setdefault(pin, []).append(entry["id"])
    return found


def known_online(wanted: Sequence[Pin]) -> dict[Pin, list[str]]:
    """The same, asked of OSV. Raises OSError where it does not answer."""
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in wanted
    ]
    request = urllib.request.Request(
        ASKED, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        results: list[dict[str, Any]] = json.load(answer)["results"]
    told = zip(wanted, results, strict=True)
    return {pin: [each["id"] for each in result["vulns"]] for pin, result in told if result.get("vulns")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dev.py audit", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--database", type=Path, metavar="ZIP", help="OSV's export for PyPI, instead of asking"
    )
    given = parser.parse_args(arguments)
    wanted = pins()
    try:
        found = known_in_export(wanted, given.database) if given.database else known_online(wanted)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"audit: skipped, no database of vulnerabilities can be read: {error}")
        return 1 if given.database else 0
    for (name, version), ids in sorted(found.items()):
        print(f"{name}=={version}: {', '.join(sorted(set(ids)))} (https://osv.dev/vulnerability/{ids[0]})")
    print(f"audit: {len(wanted)} pinned releases, {len(found)} with known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
