"""What nodes give back: results with the report as text on the node, and stand-ins for what is not there."""

from __future__ import annotations

from typing import Any, NoReturn

from ..spectral_core.errors import SpectralAdapterError


class NotConnected(SpectralAdapterError, AttributeError):
    """An output was used that could not be made; an AttributeError, so that ``hasattr`` stays a question."""


class Absent:
    """Stands on an output whose input is not connected, and says so to whoever uses it.

    The host passes outputs on unseen; the node that needs this one stops with our message instead of one
    about None.
    """

    def __init__(self, message: str) -> None:
        self._message = message

    def __getattr__(self, name: str) -> NoReturn:
        raise NotConnected(self.__dict__.get("_message", "not connected"))

    def __call__(self, *args: object) -> NoReturn:
        raise NotConnected(self._message)

    def __getitem__(self, key: object) -> NoReturn:
        raise NotConnected(self._message)

    def __iter__(self) -> NoReturn:
        raise NotConnected(self._message)


def absent(node: str, output: str, wanted: str) -> Absent:
    """For ``output`` of a node whose input ``wanted`` is not connected."""
    return Absent(f"{node} has no {output} output: connect its input '{wanted}', then run again")


def or_absent(value: Any, node: str, output: str, wanted: str) -> Any:
    return absent(node, output, wanted) if value is None else value


def shown(report: str, *result: Any, **ui: Any) -> dict[str, Any]:
    """A node's results, and its report as text on the node; ``ui`` is for the page besides (pictures)."""
    return {"ui": {"text": (report,), **ui}, "result": result}


def lines(*parts: str) -> str:
    """A report from its parts, without the empty ones."""
    return "\n".join(part for part in parts if part)


def words_of(*adapters: Any) -> str:
    """The trigger words of adapters, each once, with commas between."""
    words = [word for a in adapters for word in (*a.provenance.trigger_words, *a.tokens)]
    return ", ".join(dict.fromkeys(words))


def need_adapter(value: Any, name: str = "adapter") -> Any:
    """The value, if it is an ADAPTER. Raises SpectralAdapterError that says what to connect."""
    if not getattr(value, "is_spectral_adapter", False):
        raise SpectralAdapterError(
            f"input {name!r} is a {type(value).__name__}: expected an ADAPTER; connect Load FouRA, Load "
            "Spectral Adapter or Load LoRA as Adapter"
        )
    return value


def need_adapters(value: Any, name: str = "adapters") -> tuple[Any, ...]:
    """The adapters of a chained list; none where nothing is connected."""
    if value is None:
        return ()
    if not isinstance(value, tuple | list):
        raise SpectralAdapterError(
            f"input {name!r} is a {type(value).__name__}: connect the output 'adapters' of Adapter Strength"
        )
    return tuple(need_adapter(adapter, f"{name}, number {i + 1}") for i, adapter in enumerate(value))
