"""OpenCLIP's text encoder (of SD 2, SDXL's second) under transformers' names, so that adapters fit it.

Its attention is ``nn.MultiheadAttention``, which reads its weights without calling a layer. Here every
attention gets four linear layers that share those weights, and while the tree is :meth:`rerouted` it
computes with them: softmax(q·kᵀ/√d + mask)·v, as before up to rounding.

Shapes: as OpenCLIP calls it, (L, B, dim), or (B, L, dim) where the attention is ``batch_first``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_INNER = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class OpenCLIPTree(nn.Module):
    """``text_model.encoder.layers.N.…`` of an OpenCLIP model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._attentions: list[tuple[nn.Module, _Split]] = []
        self.text_model = nn.Module()
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList()
        for block in model.transformer.resblocks:
            layer = nn.Module()
            layer.self_attn = _Split(block.attn)
            layer.mlp = nn.Module()
            for ours, theirs in _INNER.items():
                where, _, last = ours.rpartition(".")
                layer.get_submodule(where).add_module(last, block.get_submodule(theirs))
            self.text_model.encoder.layers.append(layer)
            self._attentions.append((block.attn, layer.self_attn))

    @property
    def is_rerouted(self) -> bool:
        return any("forward" in vars(attention) for attention, _ in self._attentions)

    @contextmanager
    def rerouted(self) -> Iterator[None]:
        """The attentions compute by their layers here."""
        try:
            for attention, split in self._attentions:
                attention.forward = split.forward
            yield
        finally:
            for attention, _ in self._attentions:
                vars(attention).pop("forward", None)


class _Split(nn.Module):
    """An attention by four layers, which share its weights."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        object.__setattr__(self, "_attention", attention)
        for place, name in enumerate(_PROJECTIONS):
            self.add_module(name, _layer(attention.in_proj_weight, attention.in_proj_bias, place))
        self.out_proj = nn.Linear(attention.embed_dim, attention.embed_dim, device="meta")
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        attention: Any = self._attention
        networks: Any = sys.modules.get("networks")  # the webui's LoRAs are written when a layer runs
        if hasattr(networks, "network_apply_weights"):
            networks.network_apply_weights(attention)
        given = (query, key, value)
        q, k, v = (getattr(self, n)(x) for n, x in zip(_PROJECTIONS, given, strict=True))
        if not attention.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        found = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2)
        out: Tensor = self.out_proj(found)
        return (out if attention.batch_first else out.transpose(0, 1)), None


def _layer(weight: Tensor, bias: Tensor | None, place: int) -> nn.Linear:
    """One third of a fused weight as a layer; its tensors are parts of the same memory."""
    rows = weight.shape[0] // 3
    part = slice(place * rows, (place + 1) * rows)
    layer = nn.Linear(weight.shape[1], rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach()[part], requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[part], requires_grad=False)
    return layer
