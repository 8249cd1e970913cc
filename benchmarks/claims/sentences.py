"""Sentence tasks from texts that packages ship, read from a folder; none is part of the project.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2   # MIT: movie reviews, rated by people
    apt-get download wordnet-base                                    # WordNet 3.0
    apt-cache dumpavail > TEXTS/debian.txt                           # Debian's package descriptions

TEXTS then holds ``movieReviewSnippets_GroundTruth.txt`` (of the archive in ``additional_resources``),
``data.*`` and ``index.*`` (of ``usr/share/wordnet``) and ``debian.txt``; a task whose file is missing is left
out, and said so. ``sentiment``: sentences of film reviews, positive or negative (people's mean rating beyond
±0.5 of 4). ``topic``: a package's one-line description, one of ten sections, one package of a source.
``sense``: a word with a definition, and an example of its use: does it have this meaning there? The false
ones have the definition of another meaning of the word; training and test share no word.

Shapes: token ids (N, T) padded with 0, labels (N,).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from spectral_core.errors import SpectralAdapterError

CLEAR = 0.5  # least mean rating, of 4, of a sentence that counts as positive or negative
SECTIONS = ("games", "science", "net", "admin", "sound", "graphics", "x11", "text", "math", "web")
PER_SECTION = 330
MEANINGS = 4000  # pairs at most
Example = tuple[str, str, int]  # a text, its second part or nothing, the label


@dataclass(frozen=True)
class Texts:
    """Labelled texts in a fixed random order: the first ``test`` are the test's, the next ``validation`` the
    sweeps', the rest is trained on."""

    examples: tuple[Example, ...]
    classes: int


def sentiment(folder: Path) -> Texts:
    lines = _file(folder, "movieReviewSnippets_GroundTruth.txt").splitlines()
    found = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) > CLEAR:
            found.append((text.strip(), "", int(float(rating) > 0)))
    return Texts(_shuffled(_balanced(found, 2)), 2)


def topic(folder: Path) -> Texts:
    found, sources = [], set()
    for block in _file(folder, "debian.txt").split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][A-Za-z-]*): (.+)$", block, re.MULTILINE))
        section = fields.get("Section", "").split("/")[-1]
        source = fields.get("Source", fields.get("Package", "")).split()[0:1]
        if section in SECTIONS and source and source[0] not in sources and "Description" in fields:
            sources.add(source[0])
            found.append((fields["Description"], "", SECTIONS.index(section)))
    return Texts(_shuffled(_balanced(found, len(SECTIONS), PER_SECTION)), len(SECTIONS))


def sense(folder: Path) -> Texts:
    """The pairs of a word stand together, and words are in a random order."""
    pairs: list[Example] = []
    for kind in ("noun", "verb", "adj"):
        meanings = {}
        for line in _file(folder, f"data.{kind}").splitlines():
            if not line.startswith(" "):
                place, _, gloss = line.partition(" ")[0], None, line.split("| ", 1)[1].strip()
                definition = gloss.split('; "')[0].strip(" ;")
                meanings[place] = (definition, re.findall(r'"([^"]{12,})"', gloss))
        for line in _file(folder, f"index.{kind}").splitlines():
            if line.startswith(" "):
                continue
            parts = line.split()
            word, count = parts[0], int(parts[2])
            places = parts[-count:]
            if not 2 <= count <= 6 or "_" in word:
                continue
            for i, place in enumerate(places):
                for example in meanings[place][1][:1]:
                    if word in example.lower():
                        other = meanings[places[(i + 1) % count]][0]
                        pairs.append((f"{word}: {meanings[place][0]}", example, 1))
                        pairs.append((f"{word}: {other}", example, 0))
    by_word: dict[str, list[Example]] = {}
    for pair in pairs:
        by_word.setdefault(pair[0].split(":")[0], []).append(pair)
    words = sorted(by_word)
    Random(0).shuffle(words)
    return Texts(tuple(pair for word in words for pair in by_word[word][:4])[:MEANINGS], 2)


TASKS: Mapping[str, Callable[[Path], Texts]] = {"sentiment": sentiment, "topic": topic, "sense": sense}


def _file(folder: Path, name: str) -> str:
    path = folder / name
    if not path.is_file():
        raise SpectralAdapterError(
            f"{path}: no such file; expected the texts that benchmarks/claims/sentences.py names, or give "
            "--tasks without them"
        )
    return path.read_text(encoding="utf-8", errors="replace")


def _balanced(examples: list[Example], classes: int, most: int = 10**9) -> list[Example]:
    """As many of each class, in a fixed random order."""
    by_class: list[list[Example]] = [[] for _ in range(classes)]
    for example in dict.fromkeys(examples):
        by_class[example[2]].append(example)
    least = min(most, *(len(one) for one in by_class))
    for one in by_class:
        Random(0).shuffle(one)
    return [example for one in by_class for example in one[:least]]


def _shuffled(examples: list[Example]) -> tuple[Example, ...]:
    Random(1).shuffle(examples)
    return tuple(examples)
