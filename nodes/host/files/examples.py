"""The small adapters that come with the example workflows: one more, read-only place to look for files.

Their names begin with ``examples/``. They are offered by this pack's own loaders and registered nowhere
in the host; a file of the same name in the user's folders comes first.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3] / "example_workflows"
FOLDERS = {"spectral_adapters": _ROOT / "adapters", "loras": _ROOT / "loras"}


def names(key: str) -> set[str]:
    """``examples/<file>.safetensors`` of a kind of files (a key of the host's folders)."""
    folder = FOLDERS.get(key)
    if folder is None:
        return set()
    return {path.relative_to(folder).as_posix() for path in folder.glob("examples/*.safetensors")}
