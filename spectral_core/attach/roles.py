"""What a linear layer is for, told by its place: what feeds an attention, what follows it, a feed-forward.

**Attention.** A module attends where its layers make queries, keys and values: one each, or fused (``qkv``;
``q`` and ``kv``). Which layer makes which is told by a word in its name (``to_q``, ``w1q``, ``img_attn_qkv``,
``query``, ``Wqkv``, ``k_img``). Every other linear layer in the same attention follows it or gates it:
``to_out.0``, ``o``, ``proj``, ``gate``. An attention is the largest module around them that holds no other
attention and no feed-forward, short of a numbered block. Where a block makes its queries itself, what
follows is its own layer from the attention's width back to the width that it was fed.

**Both in one.** Two layers of a block h → 3h + m (or 3h + 2m, gated) and h + m → h beside a norm of queries
make queries, keys, values and a feed-forward at once, as Flux's single blocks do: they are attention.

**Feed-forward.** Layers a → b and c → a with c = b, or b / 2 where b is gated, no narrower than a, in one
module, in a list of blocks that attends somewhere.

What tells a block the noise level (modulation, embeddings, norms' layers) is neither, in or beside a block.

Shapes: a layer's weight is (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

FEEDS, FOLLOWS = "feeds an attention", "follows an attention"
BOTH, FEED_FORWARD = "attention and feed-forward in one", "feed-forward"
ATTENTION = frozenset({FEEDS, FOLLOWS, BOTH})

Sizes = Mapping[str, tuple[int, int]]
"""Path of a linear layer -> (out, in)."""

_ROLES = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v", "qkv": "qkv", "kv": "kv"}
_ROLES |= {"qk": "qk", "attn": "qkv"}  # the last after c_ only: GPT-2's
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_CONDITIONING = re.compile(r"(mod|modulation|ada|adaln|norm|emb|embed\w*|pos)")
_QUERY_NORM = re.compile(r"(^|[._])(q_?norm|query_norm|norm_q|norm_added_q)$")


def roles(linears: Sizes, modules: Iterable[str] = ()) -> dict[str, str]:
    """Path of each linear layer that belongs to an attention or a feed-forward -> what it does there.

    modules: paths of all modules, of which the norms of queries count.
    """
    tree = _Tree(linears)
    found = dict.fromkeys(_both_in_one(tree, modules), BOTH) | _attentions(tree)
    found |= dict.fromkeys(_feed_forwards(tree, found), FEED_FORWARD)
    return {path: found[path] for path in linears if path in found}


def role_of(step: str) -> str | None:
    """Which of q, k, v, or which of them in one, a step of a path speaks of."""
    words = [word.lower() for word in _WORDS.findall(step)]
    if words == ["c", "attn"]:
        return "qkv"
    named = []
    for word in words:
        short = word[1:] if word[0] == "w" and word[1:] in _ROLES else word
        if short in _ROLES and short != "attn":
            named.append(_ROLES[short])
    if set(named) >= {"q", "k", "v"}:
        return "qkv"
    return named[0] if named else None


@dataclass(frozen=True)
class _Tree:
    """Linear layers by path, and by every module above them."""

    linears: Sizes

    def __post_init__(self) -> None:
        below: dict[str, list[str]] = {"": list(self.linears)}
        for path in self.linears:
            for above in _above(path):
                below.setdefault(above, []).append(path)
        object.__setattr__(self, "_below", below)
        object.__setattr__(self, "_order", {path: i for i, path in enumerate(self.linears)})

    def below(self, path: str) -> list[str]:
        return self._below.get(path, [])  # type: ignore[attr-defined, no-any-return]

    def feeds_back(self, paths: Iterable[str], wider: bool) -> set[str]:
        """The layers a → b and c → a among these, c no narrower than a (wider: wider than a); the model has
        one that goes up before the one that comes back."""
        ups: dict[tuple[int, int], list[str]] = {}
        order: dict[str, int] = self._order  # type: ignore[attr-defined]
        sizes = {path: self.linears[path] for path in paths}
        for path, (out, fed) in sizes.items():
            for width in {out, out // 2}:
                ups.setdefault((fed, width), []).append(path)
        found: set[str] = set()
        for path, (out, fed) in sizes.items():
            for start in (out, 2 * out):  # twice: beside what a skip brings
                partners = [up for up in ups.get((start, fed), ()) if up != path]
                is_second = any(order[up] < order[path] for up in partners)
                if is_second and (fed > out if wider else fed >= out):
                    found |= {path, *partners}
        return found


def _above(path: str) -> Iterator[str]:
    """The modules above a path, nearest first, without the root."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _is_number(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def _conditions(path: str, owner: str) -> bool:
    """Whether a step of a path below its owner says that the layer brings the noise level or a position."""
    inner = path.removeprefix(owner).strip(".")
    return any(_is_conditioning(step) for step in inner.split("."))


def _is_conditioning(step: str) -> bool:
    return any(_CONDITIONING.fullmatch(word.lower()) for word in _WORDS.findall(step))


def _attending(tree: _Tree) -> dict[str, dict[str, str]]:
    """Module that makes queries, keys and values -> its layers that make them -> which they make."""
    made: dict[str, dict[str, str]] = {}
    for path in tree.linears:
        steps = path.split(".")
        for i in reversed(range(len(steps))):
            role = role_of(steps[i])
            if role is not None and not _is_conditioning(steps[i]):
                made.setdefault(".".join(steps[:i]), {})[path] = role
                break
    enough = ({"qkv"}, {"q", "kv"}, {"q", "k", "v"}, {"qk", "v"})
    return {m: feeds for m, feeds in made.items() if any(set(feeds.values()) >= need for need in enough)}


def _attentions(tree: _Tree) -> dict[str, str]:
    """Layer -> whether it feeds an attention or follows one."""
    attending = _attending(tree)
    fed_of = {path: module for module, feeds in attending.items() for path in feeds}
    found: set[str] = set()
    for module, feeds in attending.items():
        others = [p for p in tree.below(module) if p not in fed_of]
        if tree.feeds_back((p for p in others if not _conditions(p, module)), wider=True):
            found.update(_following(tree, module, feeds))
            continue
        whole = module
        while not _is_number(whole) and "." in whole:
            wider = whole.rpartition(".")[0]
            inside = tree.below(wider)
            more = [p for p in inside if p not in fed_of and not _conditions(p, wider)]
            if _is_number(wider) or {fed_of[p] for p in inside if p in fed_of} != {module}:
                break
            if tree.feeds_back(more, wider=True):
                break
            whole = wider
        found |= {p for p in tree.below(whole) if p not in fed_of and not _conditions(p, whole)}
    return dict.fromkeys(found, FOLLOWS) | dict.fromkeys(fed_of, FEEDS)


def _following(tree: _Tree, block: str, feeds: Mapping[str, str]) -> Iterator[str]:
    """The layers of a block that lead from its own attention back to what it was fed with."""
    queries = [tree.linears[path] for path, role in feeds.items() if role == "q"]
    for path in tree.below(block):
        direct = path.removeprefix(f"{block}.")
        if "." not in direct and path not in feeds and any(tree.linears[path] == q[::-1] for q in queries):
            yield path


def _both_in_one(tree: _Tree, modules: Iterable[str]) -> Iterator[str]:
    norms = {above for path in modules if _QUERY_NORM.search(path) for above in _above(path)}
    for block in sorted(norms):
        own = [p for p in tree.below(block) if "." not in p.removeprefix(f"{block}.")]
        for last in own:
            width, both = tree.linears[last]
            more = both - width
            firsts = [p for p in own if tree.linears[p] in {(3 * width + n * more, width) for n in (1, 2)}]
            if more > 0 and firsts:
                yield from (last, *firsts)


def _feed_forwards(tree: _Tree, attention: Mapping[str, str]) -> set[str]:
    attends = {above for path in attention for above in _above(path)}
    is_one_block = bool(attention) and not any(_is_number(above) for above in attends)
    found: set[str] = set()
    modules = {above for path in tree.linears if path not in attention for above in _above(path)}
    if is_one_block:
        modules.add("")
    for module in sorted(modules, key=lambda m: (-m.count("."), not m, m)):
        lists = [above for above in _lists(module) if above in attends]
        in_one_block = is_one_block and not any(_is_number(above) for above in (module, *_above(module)))
        if not lists and not in_one_block:
            continue
        block = lists[0] if lists else ""
        among = [p for p in tree.below(module) if p not in attention and p not in found]
        among = [p for p in among if not _conditions(p, block)]
        found |= tree.feeds_back(among, wider=module in attends or not module)
    return found


def _lists(path: str) -> Iterator[str]:
    """The modules above a path that hold numbered ones on the way to it, and it itself where it does."""
    for here in (path, *_above(path)):
        if _is_number(here):
            yield here.rpartition(".")[0]
