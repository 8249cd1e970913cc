"""What the JSON of a run's folder says, one model for each kind of file; reading checks it whole.

Pydantic is imported here alone: Automatic1111's webui ships its first version, and trains nothing.

Shapes: none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import SpectralAdapterError
from ...files.container import strict_json

Count = Annotated[int, Field(ge=0, le=2**48)]
Positive = Annotated[float, Field(gt=0)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
# Σ open gates, steps, rank; JSON has lists in the place of tuples
Calibration = Annotated[tuple[Annotated[float, Field(ge=0)], Positive, Positive], Field(strict=False)]


class Schema(BaseModel):
    """To the letter: no other types, no other names, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Record(Schema):
    """``result.json``: what a run has saved. ``file``: a name in the folder of the adapters."""

    file: str = Field(pattern=r"^[^/\\]+\.safetensors$", max_length=255)
    steps: Count
    content: str = ""
    best: str = Field("", pattern=r"^([^/\\]+\.safetensors)?$", max_length=255)


class Note(Schema):
    """A reservation of singular columns."""

    name: str
    columns: Annotated[list[Annotated[int, Field(ge=0, le=65_535)]], Field(max_length=4096)]
    base: dict[str, Any]


class Optimiser(Schema):
    """What is no tensor of an optimiser."""

    state: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], dict[str, Any]]
    groups: list[dict[str, Any]]


class Counts(Schema):
    mu: dict[str, Count]
    open: dict[str, Count]
    levels: dict[str, Count]


class Gates(Schema):
    """Of one attached adapter."""

    mode: Literal["soft", "straight_through", "hard"]
    temperature: Positive
    calibrating: bool
    counts: Counts


class AllGates(Schema):
    runtimes: list[Gates]


class Order(Schema):
    queue: list[Count]


class Random(Schema):
    """Beside the generators' states, which are tensors."""

    python_version: Literal[3]
    python_gauss: float | None
    numpy_position: Annotated[int, Field(ge=0, le=624)]
    numpy_has_gauss: Annotated[int, Field(ge=0, le=1)]
    numpy_gauss: float


class Watch(Schema):
    first: list[float]
    loss: Pair
    power: Pair


class Kept(Schema):
    parameters: dict[str, Any]
    gates: AllGates


class Validation(Schema):
    """Of the held-out pictures: when they were looked at, and the best state."""

    steps: list[Count]
    best_step: Count
    since: Count
    kept: Kept | None = None


class Values(BaseModel):
    """The numbers of a checkpoint; the optimisers' are called optimiser0, …"""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^optimiser[0-9]$")], Optimiser]

    identity: dict[str, Any]
    step: Count
    start: Count
    steps: Count
    seconds: Annotated[float, Field(ge=0)]
    smoothed: Pair
    watch: Watch
    share: float
    calibration: dict[str, Calibration]
    scaler: dict[str, Any] | None
    parameters: dict[str, Any]
    averages: dict[str, Any] = {}
    gates: AllGates
    order: Order
    prior: Order | None = None
    random: Random
    validation: Validation | None = None


Kind = TypeVar("Kind", bound=BaseModel)


def problem(kind: type[BaseModel], values: Any) -> str:
    """The first place that is not what the schema says, what was found there and what is expected; empty
    where there is none."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: found {first['input']!r:.60}; {first['msg']}"
    return ""


def parsed(kind: type[Kind], text: str) -> Kind:
    """What a JSON text says. Raises SpectralAdapterError where it is none, or :func:`problem` has a word."""
    values = strict_json(text)
    if found := problem(kind, values):
        raise SpectralAdapterError(found)
    return kind.model_validate(values)
