"""Factors as the host's patches and live layers take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.nodes.conftest import Pack


@pytest.mark.parametrize("size", [float("nan"), 1e30])
def test_an_update_that_is_not_usable_is_refused_with_its_layer(ours: Pack, size: float) -> None:
    """Before a patch is made of it, where only the host would know which weight became NaN."""
    folded = ours.module("nodes.host.apply.folded_cache").folded
    adapter = ours.adapter()
    name, layer = next(iter(adapter.layers.items()))
    params: dict[str, Any] = {k: torch.full_like(v, size) for k, v in layer.terms[0].params.items()}
    bad = replace(layer, terms=(replace(layer.terms[0], params=params),))
    with pytest.raises(ours.error, match=rf"layer {name}: its update is not usable: the factors' norms are"):
        folded(name, bad, (0,))
