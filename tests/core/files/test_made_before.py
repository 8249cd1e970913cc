"""Files made by an earlier version are read, and do what they did there, to float tolerance.

``made_before/`` was written by the code of 2026-11-23, when its modules still lay in one folder: an adapter
file of every method and option and of every form (compact, half precision, configuration in a tensor,
scheduled, fused), two exported LoRAs, statistics. ``expected.safetensors`` has the small net's weights, its
input, and its outputs under each, as that version computed them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import spectral_core as sc
from spectral_core.files.adapter_file import from_tensors
from spectral_core.gates import formula
from spectral_core.maths.lowrank import delta
from spectral_core.statistics.file import load as load_statistics
from spectral_core.training.runs import checkpoint

MADE = Path(__file__).parent / "made_before"
EXPECTED: dict[str, Tensor] = load_file(MADE / "expected.safetensors")
ADAPTERS = sorted(name.removesuffix(".out") for name in EXPECTED if name.endswith(".out"))
FILES = [name for name in ADAPTERS if name != "closed_form"]


class Net(nn.Module):
    """A convolution, a linear layer and a fused one of which an adapter changes some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 6)
        self.qkv = nn.Linear(6, 12, bias=False)
        self.load_state_dict({k: v for k, v in EXPECTED.items() if k.split(".")[0] in ("conv", "lin", "qkv")})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(2).mT
        out: Tensor = self.qkv(torch.tanh(self.lin(h)))
        return out


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().requires_grad_(False)


def weights(net: Net) -> dict[str, Tensor]:
    return {"unet.conv": net.conv.weight, "unet.lin": net.lin.weight, "unet.qkv[4:8]": net.qkv.weight[4:8]}


def close(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, EXPECTED[name], rtol=2e-5, atol=2e-6)


def test_there_is_one_of_every_method() -> None:
    methods = {method for name in FILES for method in sc.inspect(MADE / f"{name}.safetensors").methods}
    assert methods == {"foura", "spectral_a", "spectral_r", "lora", "orthogonal"} and len(FILES) == 20


# Its gates close a whole layer for some inputs, which was read as no update there; since then a layer's
# largest gate stays open.
WITH_CLOSED_LAYERS = "foura-dft-adaptive"


def test_a_layer_whose_gates_all_closed_keeps_one_open(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """That rule is all that differs."""
    adapter, expected = (
        sc.load(MADE / f"{WITH_CLOSED_LAYERS}.safetensors"),
        EXPECTED[f"{WITH_CLOSED_LAYERS}.out"],
    )
    with sc.attach(net, adapter, part="unet"):
        assert not torch.allclose(net(EXPECTED["x"]), expected, atol=1e-2)
        monkeypatch.setattr(formula, "opened", lambda values, middle, budget: values > middle)
        close(net(EXPECTED["x"]), f"{WITH_CLOSED_LAYERS}.out")


@pytest.mark.parametrize("name", [name for name in FILES if name != WITH_CLOSED_LAYERS])
def test_an_adapter_does_what_it_did(net: Net, name: str) -> None:
    adapter = sc.load(MADE / f"{name}.safetensors", weights(net) if name == "compact" else None)
    with sc.attach(net, adapter, part="unet") as attachment:
        if adapter.schedule is not None:
            attachment.set_progress(0.4)
        close(net(EXPECTED["x"]), f"{name}.out")
    assert not torch.allclose(EXPECTED[f"{name}.out"], EXPECTED["base"], atol=1e-2)
    close(net(EXPECTED["x"]), "base")


@pytest.mark.parametrize("name", [name for name in FILES if f"{name}.hash" in EXPECTED])
def test_it_is_the_same_adapter(name: str) -> None:
    """Its hash is in pictures and in the lineage of others."""
    adapter = sc.load(MADE / f"{name}.safetensors")
    stored = bytes(EXPECTED[f"{name}.hash"].tolist())
    assert adapter.content_hash.encode() == stored or bytes.fromhex(adapter.content_hash) == stored
    assert adapter.provenance.trigger_words == ("vase",) and adapter.strength == 0.8
    assert adapter.layer_strengths == (("unet.l*", 0.5),) and [*adapter.tokens] == ["<vase>"]


def test_from_tensors_alone(net: Net) -> None:
    adapter = from_tensors(load_file(MADE / "config_tensor.safetensors"), "of another program").adapter
    with sc.attach(net, adapter, part="unet"):
        close(net(EXPECTED["x"]), "config_tensor.out")


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_exported_loras(naming: str) -> None:
    adapter = sc.import_lora(MADE / f"lora_{naming}.safetensors")
    wanted = {name.removeprefix("lora."): name for name in EXPECTED if name.startswith("lora.unet")}
    wanted |= {name.removeprefix("lora."): name for name in EXPECTED if name.startswith("lora.text")}
    assert {*adapter.layers} == {*wanted}
    for name, layer in adapter.layers.items():
        close(sum((delta(t.factors(layer.shape, 1.0)) for t in layer.terms), torch.zeros(())), wanted[name])


def test_statistics_and_the_fusion_by_them(net: Net) -> None:
    known = load_statistics(MADE / "statistics.safetensors")
    for name, found in known.items():
        close(found.second_moment, f"statistics.{name}")
    pair = [sc.load(MADE / f"{name}.safetensors") for name in ("foura-adaptive", "lora")]
    fused = sc.fuse(pair, method="closed-form", statistics=[known, known]).adapter
    with sc.attach(net, fused, part="unet"):
        close(net(EXPECTED["x"]), "closed_form.out")


def test_an_unfinished_run_is_refused_in_a_sentence() -> None:
    """Checkpoints have a digest since; without one nothing tells a damaged file."""
    with pytest.raises(sc.SpectralAdapterError, match=r"version '1', expected '2': .* start the run anew"):
        checkpoint.read(MADE / "checkpoint_v1.safetensors")
