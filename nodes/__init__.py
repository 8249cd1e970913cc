"""The node list: id -> class and id -> display name, written out; nothing registers itself.

A node id is `SpectralAdapters_<Name>` and never changes once released.
"""

from __future__ import annotations

NODE_CLASS_MAPPINGS: dict[str, type] = {}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
