"""What the pack tells the host when it is loaded: its folders, and whom to call when a prompt arrives."""

from __future__ import annotations

import sys


def start() -> None:
    """Register with the host; nothing happens where there is none (tests, tools)."""
    if "folder_paths" not in sys.modules:
        return
    from . import paths

    paths.register()
    if "server" in sys.modules:
        from . import metadata

        metadata.install()
