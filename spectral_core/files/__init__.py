"""Files: the adapter's own format, and ordinary LoRA files in and out. Nothing but safetensors is read."""

from .adapter_file import Loaded, Summary, inspect, is_adapter_file, load, read, save
from .lora_export import ExportReport, export_lora
from .lora_import import ImportedLoRA, import_lora, read_lora

__all__ = [
    "ExportReport",
    "ImportedLoRA",
    "Loaded",
    "Summary",
    "export_lora",
    "import_lora",
    "inspect",
    "is_adapter_file",
    "load",
    "read",
    "read_lora",
    "save",
]
