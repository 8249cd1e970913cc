"""The transforms against their definitions, and the folding identities, on odd, even and tiny lengths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_core.maths import transforms

LENGTHS = [1, 2, 3, 4, 7, 12, 33, 320]
every_length = pytest.mark.parametrize("n", LENGTHS)


def definition(n: int) -> Tensor:
    """C[k, j] = √(2/n) c_k cos(π(2j + 1)k / 2n), entry by entry."""
    return torch.tensor(
        [
            [math.sqrt((2 if k else 1) / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for j in range(n)]
            for k in range(n)
        ],
        dtype=torch.float64,
    )


@every_length
def test_dct_is_its_definition_on_any_axis(n: int) -> None:
    c = definition(n)
    assert torch.allclose(c @ c.mT, torch.eye(n).double(), atol=1e-12)
    x = torch.randn(3, n, 2, dtype=torch.float64)
    folded = transforms.fold(x, "dct", 1)
    assert torch.allclose(folded, torch.einsum("kj,akb->ajb", c, x), atol=1e-12)
    assert torch.allclose(transforms.fold(x.mT, "dct", 2), folded.mT, atol=1e-12)


@every_length
def test_float32_is_good_to_1e_6(n: int) -> None:
    x = torch.randn(5, n)
    wanted = x.double() @ definition(n)
    assert (transforms.fold(x, "dct", 1).double() - wanted).abs().max() < 3e-6
    assert transforms.fold(x, "dct", 1).dtype == torch.float32


@every_length
@pytest.mark.parametrize("transform", transforms.TRANSFORMS)
def test_folding_is_the_operator_between_transforms(transform: str, n: int) -> None:
    """up·down of the folded factors = the real part of F⁻¹ B A F."""
    m, r = n + 2, 3
    a, b = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    if transform == "dct":
        wanted = definition(m).mT @ b @ a @ definition(n)
    elif transform == "dft":
        spectrum = torch.fft.fft(torch.eye(n).double(), norm="ortho")
        wanted = torch.fft.ifft(b.cdouble() @ a.cdouble() @ spectrum, dim=0, norm="ortho").real
    else:
        wanted = b @ a
    down, up = transforms.fold(a, transform, dim=1), transforms.fold(b, transform, dim=0)
    rows = 2 * r if transform == "dft" else r
    assert down.shape == (rows, n) and up.shape == (m, rows)
    assert torch.allclose(up @ down, wanted, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("transform", transforms.TRANSFORMS)
def test_gradients(transform: str, n: int) -> None:
    a = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: transforms.fold(x, transform, 1), a)
    b = torch.randn(n, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: transforms.fold(x, transform, 0), b)


def test_real_and_imaginary_rows_stay_pairs() -> None:
    """Row i and row i + rank belong together, for a kernel too: one gate serves both."""
    a = torch.randn(3, 8, 3, 3, dtype=torch.float64)
    folded = transforms.fold(a, "dft", 1)
    spectrum = torch.fft.fft(a, dim=1, norm="ortho")
    assert torch.allclose(folded[:3], spectrum.real, atol=1e-12)
    assert torch.allclose(folded[3:], spectrum.imag, atol=1e-12)


def test_plans_made_in_inference_mode_serve_training_later() -> None:
    with torch.inference_mode():
        transforms.fold(torch.randn(2, 29), "dct", 1)
        transforms.fold(torch.randn(2, 31), "dft", 1)
    for n, transform in ((29, "dct"), (31, "dft")):
        x = torch.randn(2, n, requires_grad=True)
        transforms.fold(x, transform, 1).square().sum().backward()
        assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("transform", transforms.TRANSFORMS)
def test_no_rows_fold_to_no_rows(transform: str) -> None:
    assert transforms.fold(torch.zeros(0, 6), transform, 1).shape == (0, 6)
    assert transforms.fold(torch.zeros(6, 0), transform, 0).shape == (6, 0)


@pytest.mark.parametrize("together", [1, 2**18])
@pytest.mark.parametrize("transform", transforms.TRANSFORMS)
def test_many_at_once_are_each_alone(transform: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of mixed lengths, axes and kernels, one without rows, values and gradients; in any grouping.

    One output is not used: its factor has no gradient, as for a layer that did not run.
    """
    monkeypatch.setattr(transforms, "_TOGETHER", together)
    draw = torch.Generator().manual_seed(2)
    shapes = [((3, 12), 1), ((12, 3), 0), ((2, 7), 1), ((12, 1), 0), ((3, 12, 3, 2), 1), ((0, 12), 1)]
    shapes += [((5, 1), 1), ((12, 4), 0)]
    given = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape, _ in shapes]
    wanted = [(x, dim) for x, (_, dim) in zip(given, shapes, strict=True)]
    many = transforms.fold_many(wanted, transform)
    alone = [transforms.fold(x, transform, dim) for x, dim in wanted]
    weights = [torch.randn(y.shape, generator=draw, dtype=torch.float64) for y in alone]
    for found, expected in zip(many, alone, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12) and found.shape == expected.shape

    def gradients(folded: list[Tensor]) -> list[Tensor | None]:
        parts = [(y * w).sum() for y, w in zip(folded[1:], weights[1:], strict=True)]
        return list(torch.autograd.grad(torch.stack(parts).sum(), given, allow_unused=True))

    found, expected = gradients(many), gradients(alone)
    assert found[0] is None and expected[0] is None
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one is not None and other is not None
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
