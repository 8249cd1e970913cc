"""What a fused adapter knows about its parents: provenance, trigger words and trained tokens, merged.

Shapes: tokens are part -> rows (k, dim), unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Provenance
from ..adapter.fingerprint import KIND, compare_bases
from ..errors import SpectralAdapterError
from ..files.metadata import BASE
from .sources import Concept


def merged_provenance(concepts: Sequence[Concept], name: str, settings: Mapping[str, Any]) -> Provenance:
    """Names joined, trigger words in order, parents with content hash and weight, ``settings`` of the
    fusion.
    """
    sources = [c.adapter.provenance for c in concepts]
    families = list(dict.fromkeys(p.family for p in sources if p.family))
    return Provenance(
        name=name or " + ".join(c.label for c in concepts),
        family=families[0] if len(families) == 1 else "",
        base=_merged_base([p.base for p in sources if p.base]),
        trigger_words=tuple(dict.fromkeys(word for p in sources for word in p.trigger_words)),
        training={"fusion": dict(settings)} | _common([p.training for p in sources]),
        parents=tuple(_parent(c) for c in concepts),
    )


def _common(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What other programs call the base model, where all parents say the same."""
    said = {word: {str(t[word]) for t in trainings if t.get(word)} for word in BASE}
    return {word: values.pop() for word, values in said.items() if len(values) == 1}


def _parent(concept: Concept) -> dict[str, Any]:
    adapter = concept.adapter
    parent: dict[str, Any] = {
        "name": concept.label,
        "content_hash": adapter.content_hash,
        "weight": concept.weight,
        "strength": adapter.strength,
        "methods": list(adapter.methods),
    }
    grandparents = [dict(p) for p in adapter.provenance.parents]
    return parent | ({"parents": grandparents} if grandparents else {})


def lineage_warnings(concepts: Sequence[Concept]) -> list[str]:
    """Different base models, and trigger words that several concepts answer to."""
    warnings = []
    for a, b in combinations(concepts, 2):
        ours, theirs = a.adapter.provenance, b.adapter.provenance
        if ours.family and theirs.family and ours.family != theirs.family:
            warnings.append(f"{a.label} is made for {ours.family}, {b.label} for {theirs.family}")
        elif not _same_base(ours.base, theirs.base):
            warnings.append(f"{a.label} and {b.label} were trained on different base models")
        if words := [w for w in ours.trigger_words if w in theirs.trigger_words]:
            warnings.append(f"{a.label} and {b.label} both answer to {', '.join(words)}")
    return warnings


def _same_base(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether nothing speaks against one base: fingerprints that agree, share no layer, or are not there."""
    if not ours or not theirs or ours == theirs:
        return True
    if not ours.get("kind") == theirs.get("kind") == KIND:
        return False
    match = compare_bases(ours, theirs)
    return match.verdict != "different" or not (match.compared or match.misfits)


def _merged_base(bases: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first fingerprint, with the layers that only others of the same base have."""
    if not bases or bases[0].get("kind") != KIND:
        return bases[0] if bases else {}
    same = [base for base in bases if base.get("kind") == KIND and _same_base(bases[0], base)]
    layers = {name: entry for base in reversed(same) for name, entry in base["layers"].items()}
    return {**bases[0], "layers": layers}


def merged_tokens(concepts: Sequence[Concept]) -> dict[str, Mapping[str, Tensor]]:
    """All trained tokens; one word with different vectors is refused, a prompt can mean only one."""
    merged: dict[str, Mapping[str, Tensor]] = {}
    holder: dict[str, str] = {}
    for concept in concepts:
        for token, parts in concept.adapter.tokens.items():
            if token in merged and not _same(merged[token], parts):
                raise SpectralAdapterError(
                    f"{holder[token]} and {concept.label} both define the token {token!r}, with different "
                    f"vectors: rename it in one of them first, rename_token(adapter, {token!r}, …)"
                )
            merged[token] = parts
            holder.setdefault(token, concept.label)
    return merged


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[part].cpu(), b[part].cpu()) for part in a)


def rename_token(adapter: Adapter, old: str, new: str) -> Adapter:
    """The adapter with the trained token ``old`` called ``new``, also among its trigger words."""
    if old not in adapter.tokens:
        raise SpectralAdapterError(
            f"no token {old!r} in this adapter: it has {', '.join(adapter.tokens) or 'none'}"
        )
    if new in adapter.tokens or not new:
        raise SpectralAdapterError(f"token {old!r} cannot be called {new!r}: expected a new, non-empty word")
    words = tuple(word.replace(old, new) for word in adapter.provenance.trigger_words)
    tokens = {new if token == old else token: parts for token, parts in adapter.tokens.items()}
    return replace(adapter, tokens=tokens).with_provenance(trigger_words=words)
