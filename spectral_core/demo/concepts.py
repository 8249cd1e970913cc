"""The demo's concepts: two characters drawn by code, or the user's own pictures."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SpectralAdapterError
from ..training.data.folder import find_examples
from ..whole_file import write_whole

DRAWN_PICTURES, BESIDE = 12, 4  # the last of them beside something else
DRAWN_INIT = "creature"
PLACES = {  # what a prompt says, and what the shipped classifier calls it
    "in a meadow": "meadow",
    "on a blue background": "blue",
    "in the snow": "snow",
    "at night": "night",
}


@dataclass(frozen=True)
class DemoConcept:
    """A new word and its pictures; ``drawn`` when the pictures come from demo_model/draw.py."""

    name: str
    token: str
    folder: Path
    init_words: str
    drawn: bool = False

    def prompts(self, count: int, embedded: bool) -> list[str]:
        """Prompts in the base model's own manner; the embedded one knows places, a real one knows photos."""
        if not embedded:
            return [f"a photo of {self.token}"] * count
        return [large(self.token, place) for place in places(count)]


def large(token: str, place: str) -> str:
    """The embedded model's prompt for a character that is seen well: a small one has few latent cells."""
    return f"a large {token} {place}, in the center"


def places(count: int) -> list[str]:
    """Where the embedded model's pictures are, in turn."""
    known = list(PLACES)
    return [known[i % len(known)] for i in range(count)]


def prompts_together(concepts: Sequence[DemoConcept], count: int, embedded: bool) -> list[str]:
    """Prompts for all concepts in one wide picture; of two the first one stands left."""
    if not embedded:
        return [f"a photo of {' and '.join(c.token for c in concepts)}"] * count
    things = " and ".join(f"a large {c.token}" for c in concepts)
    return [f"{things} {place}" for place in places(count)]


def fill_up(concepts: list[DemoConcept], output: Path, pixels: int) -> list[DemoConcept]:
    """With the embedded model: the user's concepts, and up to two with drawn characters."""
    for name in ("bot", "fish"):
        if len(concepts) >= 2:
            break
        side = "right" if concepts else "left"
        concepts.append(drawn_concept(name, output / "pictures" / name, pixels, side))
    return concepts


def user_concepts(options: argparse.Namespace) -> list[DemoConcept]:
    """One concept per --images; --token and --init in the same order. Folders are checked before anything
    is loaded or trained."""
    images, tokens, inits = options.images, options.token, options.init
    if len(tokens) != len(images):
        raise SpectralAdapterError(
            f"{len(images)} --images and {len(tokens)} --token: give each folder of pictures its own token"
        )
    if len(set(tokens)) != len(tokens):
        raise SpectralAdapterError(f"--token {' '.join(tokens)}: each concept needs a token of its own")
    if options.model is not None and not images:
        raise SpectralAdapterError("--model needs pictures of your own: add --images DIR --token NAME")
    concepts = []
    for i, (folder, token) in enumerate(zip(images, tokens, strict=True)):
        name = "".join(c for c in token if c.isalnum() or c in "-_") or f"concept{i + 1}"
        word = token if token.startswith("<") else f"<{token}>"
        find_examples(folder, word)
        concepts.append(DemoConcept(name, word, Path(folder), inits[i] if i < len(inits) else "object"))
    return concepts


def drawn_concept(name: str, folder: Path, pixels: int, side: str = "left") -> DemoConcept:
    """Draw a character's pictures, that many pixels wide, into a folder in kohya layout; in the last ones it
    has something beside it and stands on the side where :func:`prompts_together` asks for it, because the
    model reads the first and the second thing of a prompt differently. What an earlier run left there is
    replaced where the drawings have changed since.
    """
    from demo_model.draw import draw_concept
    from demo_model.pictures import draw_beside

    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(DRAWN_PICTURES):
        if seed < DRAWN_PICTURES - BESIDE:
            picture, caption = draw_concept(name, seed, token="<TOK>", pixels=pixels)
        else:
            picture, caption = draw_beside(name, seed, "<TOK>", pixels, side)
        path, drawn = folder / f"{seed:02d}.png", io.BytesIO()
        picture.save(drawn, format="PNG")
        for file, content in ((path, drawn.getvalue()), (path.with_suffix(".txt"), f"{caption}\n".encode())):
            if not file.exists() or file.read_bytes() != content:
                write_whole(file, content)
    return DemoConcept(name, f"<{name}>", folder, DRAWN_INIT, drawn=True)
