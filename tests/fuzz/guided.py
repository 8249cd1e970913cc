"""Coverage-guided inputs for the readers of bytes, where atheris is installed (``pip install atheris``):

    python -m tests.fuzz.guided picture -max_total_time=300

The first word names a reader, as ``tests.fuzz.run`` calls it; what follows goes to libFuzzer. Branches of the
project's code lead the search, from the reader's own seeds. A fault ends it, and libFuzzer keeps its input as
``crash-…``: it becomes a case in tests.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> int:
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 0
    with atheris.instrument_imports(include=["spectral_core"]):
        from tests.fuzz.readers import all_readers
        from tests.fuzz.run import empty, memory_folder

    scratch = Path(tempfile.mkdtemp(dir=memory_folder()))
    readers: dict[str, Any] = {
        name: reader
        for name, reader in all_readers(scratch).items()
        if all(isinstance(seed, bytes) for seed in reader.seeds)
    }
    empty(scratch)
    if not arguments or arguments[0] not in readers:
        print(f"expected one of: {', '.join(readers)}", file=sys.stderr)
        return 2
    reader = readers[arguments[0]]
    seeds = Path(tempfile.mkdtemp(dir=memory_folder()))
    for number, seed in enumerate(reader.seeds):
        (seeds / str(number)).write_bytes(seed)
    warnings.simplefilter("ignore")

    def one(content: bytes) -> None:
        try:
            reader.read(content, scratch)
        except Exception as error:
            if not any(kind.__name__ == "SpectralAdapterError" for kind in type(error).__mro__):
                raise

    atheris.Setup([sys.argv[0], *arguments[1:], "-timeout=5", "-rss_limit_mb=4096", str(seeds)], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
