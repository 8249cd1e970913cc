"""Fusing in rounds: what is looked at, and what is fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Term
from spectral_core.attach.attaching import attach
from spectral_core.errors import SpectralAdapterError
from spectral_core.fusion import Fused, FusionOptions, fuse
from spectral_core.fusion.rounds import fuse_in_rounds
from spectral_core.maths.layers import LayerShape
from spectral_core.methods import LoRAConfig
from spectral_core.statistics.collect import collect, modules_of
from spectral_core.statistics.moments import Statistics, pooled

WIDTH, CONCEPTS = 12, 2


def case() -> tuple[nn.Sequential, list[Adapter], list[Tensor]]:
    """A deep model, adapters that change each of its layers, and inputs that the concepts partly share."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) if i % 2 == 0 else nn.Tanh() for i in range(9))).double()
    adapters = []
    for place in range(CONCEPTS):
        layers = {
            f"unet.{i}": AdapterLayer(
                LayerShape(WIDTH, WIDTH),
                (
                    Term(
                        LoRAConfig(3),
                        {
                            "down": torch.randn(3, WIDTH).double() / 2,
                            "up": torch.randn(WIDTH, 3).double() / 2,
                        },
                    ),
                ),
            )
            for i in range(0, 9, 2)
        }
        adapters.append(Adapter(layers).with_provenance(name=f"c{place}"))
    shared = torch.randn(200, WIDTH).double()
    return model, adapters, [shared + 0.3 * torch.randn(200, WIDTH).double() for _ in adapters]


def test_later_rounds_look_under_what_was_fused_and_forget_nothing() -> None:
    model, adapters, x = case()
    under: list[Adapter | None] = []
    seen: list[Sequence[Mapping[str, Statistics]]] = []

    def look(fused: Adapter | None) -> list[Mapping[str, Statistics]]:
        under.append(fused)
        found = []
        for own, given in zip(adapters, x, strict=True):
            with (
                attach(model, fused or own, part="unet"),
                collect(modules_of(model, adapters, "unet"), adapters, dtype=torch.float64) as watched,
            ):
                model(given)
            found.append(watched.statistics())
        seen.append(found)
        return found

    def once(statistics: Sequence[Mapping[str, Statistics]]) -> Fused:
        return fuse(adapters, "closed-form", statistics=statistics, options=FusionOptions(ridge=1e-3))

    with torch.no_grad():
        first = fuse_in_rounds(look, once, 1)
        assert under == [None] and first.statistics is seen[0]
        assert first.fused.adapter.content_hash == once(seen[0]).adapter.content_hash
        second = fuse_in_rounds(look, once, 2)
        assert under[1] is None and under[2] is not None
        assert under[2].content_hash == first.fused.adapter.content_hash
        both = [pooled(a, b) for a, b in zip(seen[1], seen[2], strict=True)]
        assert second.fused.adapter.content_hash == once(both).adapter.content_hash


@pytest.mark.parametrize("rounds", [0, -1, 1.5])
def test_rounds_are_counted(rounds) -> None:
    with pytest.raises(SpectralAdapterError, match="expected a whole number of at least 1"):
        fuse_in_rounds(lambda _: [], lambda _: None, rounds)
