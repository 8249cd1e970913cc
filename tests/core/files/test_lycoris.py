"""LoHa, LoKr and full differences: the factors give the formula's own ΔW, in every shape a file may have."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from spectral_core.errors import SpectralAdapterError
from spectral_core.files import lycoris
from spectral_core.files.lora_import import read_lora

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def loha(out: int, fan_in: int, r: int) -> dict[str, Tensor]:
    both = {"hada_w1_a": (out, r), "hada_w1_b": (r, fan_in), "hada_w2_a": (out, r), "hada_w2_b": (r, fan_in)}
    return tensors(**both)


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σᵢⱼ aᵢ bⱼ tᵢⱼ, one term after the other: t (r, q, *kernel), a (r, out), b (q, in)."""
    total = torch.zeros(a.shape[1], b.shape[1], *t.shape[2:])
    for i in range(t.shape[0]):
        for j in range(t.shape[1]):
            total += torch.einsum("o,n,...->on...", a[i], b[j], t[i, j])
    return total


def exact(parts: dict[str, Tensor]) -> Tensor:
    """ΔW without its scale, from the papers' formulas."""
    if "diff" in parts:
        return parts["diff"]
    if "hada_t1" in parts:
        one = tucker(parts["hada_t1"], parts["hada_w1_a"], parts["hada_w1_b"])
        return one * tucker(parts["hada_t2"], parts["hada_w2_a"], parts["hada_w2_b"])
    if "hada_w1_a" in parts:
        return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_t2" in parts:
        two = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        two = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return torch.kron(one.reshape(*one.shape, *(1,) * (two.dim() - 2)), two)


CASES = {
    "loha": (loha(30, 20, 3), 3, 9),
    "loha of full rank": (loha(12, 20, 4), 4, 12),
    "loha, narrow in": (loha(20, 12, 4), 4, 12),
    "loha, tucker": (
        tensors(hada_w1_a=(2, 6), hada_w1_b=(2, 5), hada_t1=(2, 2, 3, 3))
        | tensors(hada_w2_a=(2, 6), hada_w2_b=(2, 5), hada_t2=(2, 2, 3, 3)),
        2,
        6,
    ),
    "lokr, low rank": (tensors(lokr_w1=(4, 2), lokr_w2_a=(8, 3), lokr_w2_b=(3, 12)), 3, 6),
    "lokr, both low rank": (
        tensors(lokr_w1_a=(4, 1), lokr_w1_b=(1, 4), lokr_w2_a=(8, 3), lokr_w2_b=(3, 8)),
        3,
        3,
    ),
    "lokr, whole": (tensors(lokr_w1=(3, 2), lokr_w2=(5, 7)), None, 10),
    "lokr, whole and wide": (tensors(lokr_w1=(2, 3), lokr_w2=(5, 7)), None, 10),
    "lokr of a convolution": (tensors(lokr_w1=(2, 3), lokr_w2=(5, 4, 3, 3)), None, 10),
    "lokr, tucker": (
        tensors(lokr_w1=(2, 3), lokr_w2_a=(2, 5), lokr_w2_b=(2, 4), lokr_t2=(2, 2, 3, 3)),
        2,
        10,
    ),
    "lokr of a convolution, low rank": (
        tensors(lokr_w1_a=(2, 1), lokr_w1_b=(1, 3), lokr_w2=(5, 4, 3, 3)),
        1,
        5,
    ),
    "difference": (tensors(diff=(9, 5)), None, 5),
    "difference of a convolution": (tensors(diff=(4, 5, 3, 3)), None, 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factors_are_the_update(
    tmp_path: Path, case: str, alpha: float | None, dtype: torch.dtype
) -> None:
    parts, rank, expected_rank = CASES[case]
    stored = {f"{NAME}.{role}": value.to(dtype) for role, value in parts.items()}
    if alpha is not None:
        stored[f"{NAME}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors")
    assert not read.unmatched and len(read.adapter.layers) == 1
    (layer,) = read.adapter.layers.values()
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    wanted = scale * exact(parts)
    factors = layer.factors()
    assert factors.rank == expected_rank
    found = factors.scaled_up() @ factors.down.flatten(1)
    assert layer.shape.out_features == wanted.shape[0] and layer.shape.kernel == tuple(wanted.shape[2:])
    assert (found - wanted.flatten(1)).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("lo")])
def test_lycoris_computes_the_same(case: str) -> None:
    """The library that made the two formats, with its own scale of an alpha of 2."""
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.functional import loha as their_loha
    from lycoris.functional import lokr as their_lokr

    parts, _, _ = CASES[case]
    if "hada_w1_a" in parts:
        roles = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
        weights = [parts.get(role) for role in roles]
        theirs = their_loha.diff_weight(*weights, gamma=2.0 / len(parts["hada_w1_b"]), backend="torch")
    else:
        weights = [parts.get(role) for role in lycoris.LOKR]
        theirs = their_lokr.diff_weight(*weights, gamma=2.0, backend="torch")
    down, up, scale = lycoris.factors("here", parts, 2.0)
    ours = scale * (up @ down.flatten(1))
    # Which rank divides alpha is another one for the host where there is none, are two, or is a third tensor;
    # there it is the host's that counts (tests/host/files/inside_lora_names.py), and here the direction.
    one_rank = {"lokr_w1", "lokr_w2_a"} <= parts.keys() and "lokr_t2" not in parts
    if "hada_w1_a" not in parts and not one_rank:
        theirs = theirs * (ours.norm() / theirs.norm())
    assert (ours - theirs.flatten(1)).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({k: v for k, v in loha(6, 5, 2).items() if k != "hada_w2_b"}, "'hada_w2_b' is missing"),
        (tensors(lokr_w1=(2, 2)), "'lokr_w2_a' is missing"),
        (tensors(lokr_w1=(2, 2), lokr_w2_a=(4, 3), lokr_w2_b=(2, 4)), "do not fit"),
        (loha(6, 5, 2) | tensors(lora_up=(1,)), ""),
        ({"diff": torch.full((3, 4), float("nan"))}, "not finite"),
        ({"diff": torch.zeros(0, 4)}, r"shape \(0, 4\)"),
    ],
)
def test_what_is_damaged_is_told(tmp_path: Path, parts: dict[str, Tensor], message: str) -> None:
    stored = {f"{NAME}.{role}": value for role, value in parts.items()}
    if not message:
        stored = {k: v for k, v in stored.items() if "lora_up" not in k}
        stored |= {f"{NAME}.lora_down.weight": torch.ones(2, 5), f"{NAME}.lora_up.weight": torch.ones(6, 2)}
        message = "holds a LoRA and hada_w1_a"
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(SpectralAdapterError, match=message):
        read_lora(tmp_path / "a.safetensors")


def test_a_small_file_cannot_ask_for_a_large_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few vectors stand for 2.5·10⁹ numbers: refused before anything is allocated."""
    monkeypatch.setattr(torch, "kron", lambda *a: pytest.fail("it was multiplied out"))
    large = {"lokr_w1": torch.ones(300, 300), "lokr_w2": torch.ones(300, 300)}
    for parts in (loha(50_000, 50_000, 1), large):
        with pytest.raises(SpectralAdapterError, match=r"layer x: its update has \d+ numbers, more than"):
            lycoris.factors("layer x", parts, None)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_files_load(tmp_path: Path, dtype: torch.dtype) -> None:
    down, up = torch.randn(2, 7).to(dtype), torch.randn(9, 2).to(dtype)
    stored = {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up}
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors")
    (layer,) = read_lora(tmp_path / "a.safetensors").adapter.layers.values()
    factors = layer.factors()
    assert torch.equal(factors.scaled_up() @ factors.down, up.float() @ down.float())


def test_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    stored = {f"{NAME}.lora_down.weight": torch.randn(4, 7), f"{NAME}.lora_up.weight": torch.randn(9, 4)}
    safetensors.torch.save_file(stored | {f"{NAME}.alpha": torch.tensor(8)}, tmp_path / "a.safetensors")
    (layer,) = read_lora(tmp_path / "a.safetensors").adapter.layers.values()
    assert layer.factors().scale == 2.0


def test_changed_biases_and_norms_are_layers_of_their_own(tmp_path: Path) -> None:
    stored = {f"{NAME}.lora_down.weight": torch.randn(4, 7), f"{NAME}.lora_up.weight": torch.randn(9, 4)}
    more = {f"{NAME}.diff_b": torch.ones(9), "lora_unet_norm.w_norm": torch.zeros(9)}
    safetensors.torch.save_file(stored | more, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors")
    assert [name.rpartition(".")[2] for name in read.adapter.layers][1:] == ["bias"]
    assert read.notes[-1] == "1 biases and norms of the file change nothing and were left out"


def test_the_configuration_of_another_file_is_not_read(tmp_path: Path) -> None:
    stored = {"diffusion_model.a.q.lora_A.weight": torch.randn(4, 7)}
    stored["diffusion_model.a.q.lora_B.weight"] = torch.randn(9, 4)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 64, "r": 4}')
    for name, scale in [("mine", 1.0), ("adapter_model", 16.0)]:
        safetensors.torch.save_file(stored, tmp_path / f"{name}.safetensors")
        (layer,) = read_lora(tmp_path / f"{name}.safetensors").adapter.layers.values()
        assert layer.factors().scale == scale, name
