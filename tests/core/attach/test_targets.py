"""Targets: presets, globs, regular expressions, and the report of what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_core.attach.targets import find_targets
from spectral_core.errors import SpectralAdapterError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({n: nn.Linear(6, 6) for n in ("to_q", "to_k", "to_v")})
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(6, 6), nn.Dropout()])
        self.ff = nn.ModuleDict({"net": nn.ModuleList([nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)])})
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.embedding = nn.Embedding(9, 6)
        self.fused = nn.MultiheadAttention(6, 2)
        self.head = self.attn1["to_q"]  # one module, two names


ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
MLP = ["ff.net.0", "ff.net.2"]


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("attention", ATTENTION),
        ("attention+mlp", ATTENTION + MLP),
        ("all-linear", ATTENTION + MLP),
        ("all", ATTENTION + MLP + ["conv"]),
        ("*.to_q, conv", ["attn1.to_q", "conv"]),
        (["unet.attn1.to_?"], ["attn1.to_q", "attn1.to_k", "attn1.to_v"]),
        ("attn1.to_[qk], conv", ["attn1.to_q", "attn1.to_k", "conv"]),
        (["ff.*", "ff.net.2"], MLP),
    ],
)
def test_selection(targets: str | list[str], paths: list[str]) -> None:
    block = Block()
    weights, report = find_targets(block, "unet", targets)
    assert list(weights) == [f"unet.{p}" for p in paths] == list(report.matched)
    assert all(torch.equal(w, block.get_parameter(f"{n[5:]}.weight")) for n, w in weights.items())
    assert not any(w.requires_grad for w in weights.values())
    assert not set(report.matched) & set(report.unmatched)


def test_the_report_says_what_share_of_the_linear_layers_it_is() -> None:
    _, report = find_targets(Block(), "unet", "attention")
    assert report.linear == (4, 7) and "4 of 7 linear layers (57%)" in str(report)
    _, report = find_targets(Block(), "unet", "conv")
    assert report.share == "0 of 7 linear layers (0%)"


def test_reasons() -> None:
    block = Block()
    block.attn1["to_v"].weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    _, report = find_targets(block, "unet", ["all", "*"])
    reasons = {
        "unet.attn1.to_v": "quantised weight (torch.int8",
        "unet.norm": "1 dimension",
        "unet.depthwise": "groups=4",
        "unet.up": "transposed",
        "unet.embedding": "Embedding is neither",
        "unet.fused.out_proj": "never calls the layer",
    }
    assert set(report.refused) == set(reasons)
    assert all(text in report.refused[name] for name, text in reasons.items())
    assert "not usable: unet.up" in str(report)
    _, report = find_targets(block, "unet", "conv")
    assert report.unmatched["unet.ff.net.0"] == "not among the targets"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("attn1.to_qq", r"no layer matches.*attention\+mlp.*attn1\.to_q"),
        ("attention, nothing.*", r"'nothing\.\*': no layer matches"),
        ("depthwise", r"none of 1 matching layers can be adapted; unet\.depthwise: .*groups=4"),
        ("re:(", "regular expressions are not read"),
        (r"re:([a-z_0-9.]+)*Q", "regular expressions are not read"),
        ("re:" + "(" * 3000, "regular expressions are not read"),
        ("re:a{99999999999999999999}", "regular expressions are not read"),
        (["re:.*"], "regular expressions are not read"),
        ("*a" * 9, "at most 8"),
        ("a" * 1001, "at most 1000"),
        ("a," * 65, "more than 64 targets"),
        (" , ", "no targets given"),
    ],
)
def test_no_match(targets: str, message: str) -> None:
    with pytest.raises(SpectralAdapterError, match=message):
        find_targets(Block(), "unet", targets)


def test_other_trees() -> None:
    assert list(find_targets(nn.Linear(3, 2), "unet", "all")[0]) == ["unet.root"]
    assert "unet.attn1.to_q" in find_targets(torch.compile(Block(), backend="eager"), "unet")[0]  # type: ignore[arg-type]
    weights, _ = find_targets(Block().to("meta"), "unet")
    assert weights["unet.attn1.to_q"].is_meta
    with pytest.raises(SpectralAdapterError, match="no layer to adapt"):
        find_targets(nn.Sequential(nn.GELU()), "unet", "all")
