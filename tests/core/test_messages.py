"""Messages in the source: written in pieces that a reader can follow, with every space once.

Moving code moves the ends of its lines: pieces of a message that are joined without an operator then end
after a word or two. Python joins them all the same, so that nothing but a reader of the source notices; a
space that such a move loses is in the message itself.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("spectral_core", "nodes", "spectral_webui")
SOURCES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
WIDTH, EARLY = 110, 80  # columns: a line's most, and where a piece may not end while more of it would fit
STRING = re.compile(r"(?s)[fFrRbBuU]*(\"\"\"|'''|\"|')(.*)\1")


def joined(source: str) -> Iterator[tuple[int, int, str, str]]:
    """(line, column of its end, text, text of the next) of every string that another follows directly."""
    quiet = (tokenize.NL, tokenize.COMMENT)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in quiet]
    for one, other in pairwise(tokens):
        if one.type == other.type == tokenize.STRING and one.end[0] != other.start[0]:
            texts = [STRING.fullmatch(t.string) for t in (one, other)]
            assert texts[0] is not None and texts[1] is not None
            yield one.start[0], one.end[1], texts[0][2], texts[1][2]


def faults(source: str) -> Iterator[str]:
    for line, end, text, following in joined(source):
        spaces = len(text) - len(text.rstrip(" ")) + len(following) - len(following.lstrip(" "))
        is_prose = " " in text.strip() and " " in following.strip() and "\\" not in text + following
        if is_prose and spaces != 1 and not text.endswith(("\\n", "{", "(", "/")):
            yield f"line {line}: {spaces} spaces between {text[-20:]!r} and {following[:20]!r}"
        word = re.match(r"(?:\{[^{}]*\}|[^ {])+ ?", following)
        fits = word is not None and end + len(word[0]) <= WIDTH
        if text.endswith(" ") and not text.endswith(". ") and end < EARLY and fits:
            yield f"line {line}: ends after {text[-20:]!r}, though {following[:20]!r} would fit"


def lost(source: str) -> Iterator[str]:
    """Strings that are statements and no docstring: the second half of a message whose brackets are gone."""
    for node in ast.walk(ast.parse(source)):
        for one, other in pairwise(body if isinstance(body := getattr(node, "body", None), list) else []):
            is_text = isinstance(other, ast.Expr) and isinstance(other.value, ast.Constant | ast.JoinedStr)
            if is_text and not isinstance(one, ast.Assign | ast.AnnAssign):
                yield f"line {other.lineno}: a string that nothing takes"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_are_whole(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert [*faults(source), *lost(source)] == []


@pytest.mark.parametrize(
    "torn",
    [
        'x = (\n    "for a convolution its "\n    "unfolded patches"\n)\n',
        'x = (\n    "expected a weight for"\n    "each of them, and one alone"\n)\n',
        'x = (\n    f"expected a weight for {n} "\n    f" each of them, and one alone"\n)\n',
    ],
)
def test_torn_messages_are_seen(torn: str) -> None:
    assert [*faults(torn)]


def test_lost_strings_are_seen() -> None:
    assert [*lost('def f():\n    return "they come from "\n    "another base"\n')]
