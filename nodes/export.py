"""Save Adapter, in this pack's own format, and Export Adapter as LoRA, for everyone else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import images, inputs, results, tensors

COVER = (
    "IMAGE",
    {
        "tooltip": "A picture of what the adapter does, written beside the file as <name>.preview.png: model "
        "browsers, LoRA managers and the webuis show it."
    },
)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"


class SaveAdapter:
    """An ADAPTER as a file that keeps everything: gates, spectra, strengths, schedule, words."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Saves an adapter with everything that belongs to it into output/spectral_adapters, where the "
        "loaders find it. Never overwrites: files are numbered."
    )
    SEARCH_ALIASES = ["save lora", "write adapter", "spectral adapters"]
    RETURN_TYPES = (inputs.ADAPTER, "STRING", "STRING")
    RETURN_NAMES = ("ADAPTER", "file", "report")
    OUTPUT_TOOLTIPS = (
        "The same adapter, with the trigger words.",
        "The new file, relative to the output folder.",
        "Where it was written and what it holds.",
    )
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "adapter": inputs.adapter("The adapter to save, at its present strengths and schedule."),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "adapter",
                        "tooltip": "The beginning of the file's name; a / makes a subfolder. %year%, "
                        "%month%, %day%, %hour%, %minute% and %second% are filled in.",
                    },
                ),
                "precision": inputs.combo(
                    ("as is", "fp32", "fp16", "bf16"),
                    "How exactly numbers are stored. as is: no change; fp16 and bf16 halve the file and "
                    "rarely change the picture visibly.",
                ),
                "compact": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Leaves out the singular vectors of rotational Spectral Adapters: a much "
                        "smaller file that can only be loaded with its base model connected.",
                    },
                ),
                "trigger_words": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Words that call the concept in a prompt, separated by commas; written "
                        "into the file. Empty keeps those that it has.",
                    },
                ),
            },
            "optional": {"cover": COVER},
        }

    def save(
        self,
        adapter: Any,
        filename_prefix: str = "adapter",
        precision: str = "as is",
        compact: bool = False,
        trigger_words: str = "",
        cover: Any = None,
    ) -> dict[str, Any]:
        from ..spectral_core.analysis.spectra import summary_text
        from ..spectral_core.files import adapter_file as fileformat
        from .host import startup
        from .host.files import paths

        results.need_adapter(adapter)
        if words := tuple(word.strip() for word in trigger_words.split(",") if word.strip()):
            adapter = adapter.with_provenance(trigger_words=words)
        with tensors.lasting():
            path = paths.new_file(filename_prefix, in_saved=True)
            fileformat.save(
                adapter,
                path,
                compact=compact,
                dtype=tensors.dtype(precision),
                config_tensor=startup.is_in_load_lora(),
            )
        file = paths.below_output(path)
        told = images.add_cover(path, cover)
        report = results.lines(f"saved as {file}, {_size(path)}", told, summary_text(adapter))
        return results.shown(report, adapter, file, report)


class ExportAdapterAsLoRA:
    """An ADAPTER as an ordinary LoRA file."""

    CATEGORY = inputs.CATEGORY
    HAS_INTERMEDIATE_OUTPUT = inputs.REPORTS
    DESCRIPTION = (
        "Writes an adapter as an ordinary LoRA file for Load LoRA, Automatic1111, Forge, diffusers and "
        "others, and reports what that format cannot hold."
    )
    SEARCH_ALIASES = ["convert to lora", "save lora", "kohya", "spectral adapters"]
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("file", "report")
    OUTPUT_TOOLTIPS = (
        "The new file, relative to the output folder.",
        "Layers, ranks, rounding, and what was lost through frozen gates.",
    )
    FUNCTION = "export"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> inputs.Inputs:
        return {
            "required": {
                "adapter": inputs.adapter("The adapter to export, at its present strengths."),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "loras/adapter",
                        "tooltip": "The beginning of the file's name in the output folder; Load LoRA lists "
                        "what lies in output/loras.",
                    },
                ),
                "naming": inputs.combo(
                    ("kohya", "diffusers"),
                    "How layers are called in the file. kohya: read by ComfyUI, Automatic1111, Forge and "
                    "most others. diffusers: for Python pipelines.",
                ),
                "precision": inputs.combo(
                    ("fp16", "bf16", "fp32"),
                    "How exactly numbers are stored. fp16 is usual; fp32 doubles the file, rounds nothing.",
                ),
                "drop_schedule": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "A LoRA file cannot hold a schedule over the steps: off refuses to export "
                        "a scheduled adapter, on exports it at full strength for all steps.",
                    },
                ),
            },
            "optional": {
                "model": (
                    "MODEL",
                    {
                        "tooltip": "The base model. Its own names are used for layers that are rows of a "
                        "fused weight (Flux, Z-Image and others), and its block numbers where it is not "
                        "built like Stable Diffusion, so that others read the file whole."
                    },
                ),
                "cover": COVER,
                "trained_words": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Writes the adapter's trained words into the file too, as bundle_emb. "
                        "Automatic1111 reads them; ComfyUI, Forge and others pass them over. kohya naming "
                        "only.",
                    },
                ),
            },
        }

    def export(
        self,
        adapter: Any,
        filename_prefix: str = "loras/adapter",
        naming: str = "kohya",
        precision: str = "fp16",
        drop_schedule: bool = False,
        model: Any = None,
        cover: Any = None,
        trained_words: bool = False,
    ) -> dict[str, Any]:
        from ..spectral_core.files.lora_export import export_lora
        from .host.files import paths

        results.need_adapter(adapter)
        dtype = tensors.dtype(precision)
        assert dtype is not None, "every choice of this node is a type"
        with tensors.lasting():
            path = paths.new_file(filename_prefix, in_saved=False)
            names, layout = {}, None
            if model is not None:
                from .host.files.fitting import file_names, layout_of

                names, layout = file_names(adapter, model), layout_of(model)
            exported = export_lora(
                adapter,
                path,
                naming,
                dtype,
                drop_schedule=drop_schedule,
                names=names,
                layout=layout,
                words=trained_words and naming == "kohya",
            )
        file = paths.below_output(path)
        told = images.add_cover(path, cover)
        report = results.lines(f"exported as {file}, {_size(path)}", told, str(exported))
        return results.shown(report, file, report)
