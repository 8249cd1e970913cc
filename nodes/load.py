"""Loaders: a file becomes an ADAPTER, and is put on MODEL and CLIP where they are connected.

The strengths act on MODEL and CLIP only; the ADAPTER leaves at strength 1, ready to be fused or saved.
"""

from __future__ import annotations

from typing import Any

from . import inputs, results

_MODEL = "The model that the adapter changes. Not needed when only the ADAPTER output is used."
_CLIP = "The text encoder that the adapter changes. Not needed when only the ADAPTER output is used."
_LOADER_TOOLTIPS = (
    "The model with the adapter. Needs a connected model input.",
    "The text encoder with the adapter. Needs a connected clip input.",
    "The adapter itself at strength 1, for fusing, scheduling, saving and reports.",
    "What the file holds and where it was put, layer by layer where something did not fit.",
    "The words that the adapter was trained on, with commas between, for a prompt.",
)


def _adapter_name() -> inputs.Input:
    from .host.files import paths

    tooltip = "An adapter file from models/spectral_adapters or output/spectral_adapters, with subfolders."
    return inputs.combo(paths.list_adapters(), tooltip)


def _put_on(
    node: str,
    adapter_name: str,
    opened: Any,
    strengths: tuple[float, float],
    base_mismatch: str,
    model: Any,
    clip: Any,
) -> dict[str, Any]:
    """Apply an opened file to what is connected, report both."""
    from ..spectral_core.errors import SpectralAdapterError
    from .host.files import adapters as files

    report = [opened.path.name, opened.summary, *opened.notes]
    if model is None and clip is None:
        report.append("not applied: neither model nor clip is connected; the ADAPTER output is ready")
    else:
        from .host.apply import adapters as applying

        try:
            applied = applying.apply(opened.adapter, model, clip, *strengths, base_mismatch=base_mismatch)
        except SpectralAdapterError as error:
            raise SpectralAdapterError(f"{opened.path.name}: {error}") from error
        model, clip = applied.model, applied.clip
        report.append(applied.report)
    text = results.lines(*report)
    return results.shown(
        text,
        results.or_absent(model, node, "MODEL", "model"),
        results.or_absent(clip, node, "CLIP", "clip"),
        opened.adapter,
        text,
        results.words_of(opened.adapter),
        spectral_adapters=files.identity(adapter_name, opened.path),
    )


def _lora_name() -> inputs.Input:
    from .host.files import paths

    tooltip = "A LoRA file from models/loras; none when a LORA_MODEL is connected."
    return inputs.combo(paths.list_loras(), tooltip)


class LoadFouRA:
    """A FouRA file, or any other adapter file of this pack, onto MODEL and CLIP."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Loads a FouRA adapter and puts it on the model and the text encoder, like Load LoRA. Its gates "
        "adapt the rank to each step while the picture is made."
    )
    SEARCH_ALIASES = ["foura", "fourier lora", "lora", "load adapter", "trigger", "spectral adapters"]
    RETURN_TYPES = ("MODEL", "CLIP", inputs.ADAPTER, "STRING", "STRING")
    RETURN_NAMES = ("MODEL", "CLIP", "ADAPTER", "report", "trigger words")
    OUTPUT_TOOLTIPS = _LOADER_TOOLTIPS
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "adapter_name": _adapter_name(),
                "strength_model": inputs.strength_model(),
                "strength_clip": inputs.strength_clip(),
            },
            "optional": {"model": inputs.model(_MODEL), "clip": inputs.clip(_CLIP)},
        }

    def load(
        self,
        adapter_name: str,
        strength_model: float,
        strength_clip: float,
        model: Any = None,
        clip: Any = None,
    ) -> dict[str, Any]:
        strengths = (strength_model, strength_clip)
        opened = self._open(adapter_name, model, clip)
        return _put_on("Load FouRA", adapter_name, opened, strengths, "delta", model, clip)

    def _open(self, adapter_name: str, model: Any, clip: Any) -> Any:
        from .host.files import adapters as files

        self._opened = files.open_adapter(adapter_name, model, clip)  # held while the host keeps this node
        return self._opened

    @classmethod
    def VALIDATE_INPUTS(cls, adapter_name: Any = None) -> bool | str:
        from .host.files import adapters as files

        return files.problem_with(adapter_name) or True

    @classmethod
    def IS_CHANGED(cls, adapter_name: Any = None, **_others: Any) -> str:
        from .host.files import adapters as files

        return files.state_of(adapter_name) if isinstance(adapter_name, str) else ""


class LoadSpectralAdapter(LoadFouRA):
    """The same, with a choice for models other than the one trained on."""

    DESCRIPTION = (
        "Loads a Spectral Adapter (additive or rotational) and puts it on the model and the text encoder, "
        "like Load LoRA. base_mismatch says what happens on another base model than the one trained on."
    )
    SEARCH_ALIASES = [
        "spectral adapter",
        "singular value adapter",
        "lora",
        "load adapter",
        "trigger",
        "spectral adapters",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        types = super().INPUT_TYPES()
        types["required"]["base_mismatch"] = inputs.base_mismatch()
        return types

    def load(
        self,
        adapter_name: str,
        strength_model: float,
        strength_clip: float,
        model: Any = None,
        clip: Any = None,
        base_mismatch: str = "delta",
    ) -> dict[str, Any]:
        strengths = (strength_model, strength_clip)
        opened = self._open(adapter_name, model, clip)
        return _put_on("Load Spectral Adapter", adapter_name, opened, strengths, base_mismatch, model, clip)


class LoadLoRAAsAdapter:
    """An ordinary LoRA, from a file or from the host's trainer, as an ADAPTER."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Reads an ordinary LoRA file as an ADAPTER, so that it can be fused with others, scheduled over the "
        "steps, saved or examined. Apply it with Apply Adapter."
    )
    SEARCH_ALIASES = ["lora", "import lora", "convert lora", "trigger", "spectral adapters"]
    RETURN_TYPES = (inputs.ADAPTER, "STRING", "STRING")
    RETURN_NAMES = ("ADAPTER", "report", "trigger words")
    OUTPUT_TOOLTIPS = (
        "The LoRA as an adapter at strength 1.",
        "Its layers and ranks, and what of the file was not used.",
        "The words that the LoRA was trained on, as far as its file says, for a prompt.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "lora_name": _lora_name(),
            },
            "optional": {
                "lora_model": (
                    "LORA_MODEL",
                    {"tooltip": "A LoRA straight from the host's Train LoRA; used instead of the file."},
                ),
                "model": inputs.model(
                    "The model that the LoRA is for. Only needed to understand the layer names of families "
                    "other than Stable Diffusion 1, 2 and XL; it is not changed."
                ),
                "clip": inputs.clip(
                    "The text encoder that the LoRA is for; only for its layer names, it is not changed."
                ),
            },
        }

    def load(
        self, lora_name: str, lora_model: Any = None, model: Any = None, clip: Any = None
    ) -> dict[str, Any]:
        from ..spectral_core.analysis.spectra import summary_text
        from .host.files import loras

        self._opened = opened = loras.open_lora(lora_name, lora_model, model, clip)  # held, as above
        text = results.lines(opened.title, summary_text(opened.adapter), *opened.notes)
        return results.shown(text, opened.adapter, text, results.words_of(opened.adapter))

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: Any = None) -> bool | str:
        from .host.files import adapters as files
        from .host.files import paths

        return lora_name == paths.NO_LORA or files.problem_with(lora_name, paths.LORAS) or True

    @classmethod
    def IS_CHANGED(cls, lora_name: Any = None, **_others: Any) -> str:
        from .host.files import adapters as files
        from .host.files import paths

        is_file = isinstance(lora_name, str) and lora_name != paths.NO_LORA
        return files.state_of(lora_name, paths.LORAS) if is_file else ""
