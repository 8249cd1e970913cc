"""The compact form of a Spectral R layer in a file: projections of its basis instead of the basis itself.

The bases are nearly all of a Spectral R file. They are singular columns of the base model's weights and can
be found in them again (:mod:`..maths.realign`), which the projections make sure of.

Shapes: p_u and p_v (r + 16, r) in place of u (out, r) and v (fan_in, r).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import SpectralAdapterError
from ..maths import realign
from ..maths.layers import LayerShape
from ..maths.svd import Columns
from ..methods import MethodConfig, SpectralRConfig

Weights = Callable[[str], Tensor] | Mapping[str, Tensor]
"""The base model's weights by layer name, for compact files."""

SEED = 1  # of the projections of files written now; each file names its own


def applies(config: MethodConfig) -> bool:
    """Only Spectral R: what it trains is smaller than its projections and its basis is not."""
    return isinstance(config, SpectralRConfig)


def tensor_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The stored tensors' shapes, from those of the whole form."""
    rank = shapes["s"][0]
    kept = {key: shape for key, shape in shapes.items() if key not in ("u", "v")}
    rows = rank + realign.EXTRA_ROWS
    return kept | {"p_u": (rows, rank), "p_v": (rows, rank)}


def pack(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors without u and v, with their projections in float32."""
    p_u, p_v = realign.project_basis(params["u"], params["v"], SEED)
    return {key: value for key, value in params.items() if key not in ("u", "v")} | {"p_u": p_u, "p_v": p_v}


def unpack(
    config: SpectralRConfig,
    shape: LayerShape,
    params: Mapping[str, Tensor],
    place: str,
    weight: Tensor,
    seed: int,
) -> tuple[dict[str, Tensor], str]:
    """A layer's tensors with the basis found again in ``weight``, and a note where it fits only roughly.

    Raises SpectralAdapterError, beginning with ``place``, for a weight of another shape or another model.
    """
    if tuple(weight.shape) != shape.weight_shape:
        raise SpectralAdapterError(
            f"{place}: the model's weight is {tuple(weight.shape)}, the adapter's {shape.weight_shape}: "
            "this adapter was trained on another kind of model"
        )
    try:
        found = realign.realign(
            weight, params["s"], params["p_u"], params["p_v"], seed, Columns.listed(config.columns)
        )
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{place}: {error}") from error
    if found.verdict == "refuse":
        raise SpectralAdapterError(
            f"{place}: the model is not the one this adapter was trained on (its singular basis is "
            f"{found.residual:.2g} away, allowed is {realign.WARN_RESIDUAL:g}): load that model, or save the "
            "adapter with its basis (compact=False)"
        )
    whole = {key: value for key, value in params.items() if key not in ("p_u", "p_v")}
    whole |= {"u": found.u.to(params["s"].device), "v": found.v.to(params["s"].device)}
    if found.verdict == "same":
        return whole, ""
    return whole, (
        f"{place}: the model differs a little from the one this adapter was trained on (quantised or lightly "
        f"fine-tuned): its update is off by about {2 * max(found.residual, found.scale_error):.1%}"
    )


def base_weight(path: Path, weights: Weights | None, name: str) -> Tensor:
    """The base model's weight of a layer, (out, in, *kernel), of which a compact file has projections.

    Raises SpectralAdapterError where it was not passed.
    """
    if weights is None:
        raise SpectralAdapterError(
            f"{path}: is a compact file, which leaves out the singular bases: pass the base model's weights "
            f"by layer name, load(path, weights=…), beginning with {name}"
        )
    if isinstance(weights, Mapping):
        if name not in weights:
            raise SpectralAdapterError(
                f"{path}: layer {name}: its weight is not among the weights that were passed"
            )
        return weights[name]
    return weights(name)
