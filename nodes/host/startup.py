"""What the pack tells the host when it is loaded: its folders, and whom to call when a prompt arrives."""

from __future__ import annotations

import os
import sys

IN_LOAD_LORA = "SPECTRAL_ADAPTERS_IN_LOAD_LORA"


def is_in_load_lora() -> bool:
    """The setting of :mod:`.apply.in_load_lora`: off unless it is 1."""
    return os.environ.get(IN_LOAD_LORA) == "1"


def start() -> None:
    """Register with the host; nothing happens where there is none (tests, tools)."""
    if "folder_paths" not in sys.modules:
        return
    from .files import paths

    paths.register()
    if "server" in sys.modules:
        from .files import metadata

        metadata.install()
        from .page import routes

        routes.install()
    if is_in_load_lora():  # off by default, and then not even imported
        from .apply import in_load_lora

        in_load_lora.install()
