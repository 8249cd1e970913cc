"""Train, fuse, distil, export, look at and draw with spectral adapters, without a host.

Exit codes: 0 done; 1 something cannot be used as it is (one line says what and what to do); 2 a wrong command
line; 130 interrupted (a training has saved its checkpoint: the same command goes on).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..demo import command
from ..errors import SpectralAdapterError
from . import distil, files, pictures, slider, train


def parser() -> argparse.ArgumentParser:
    build = argparse.ArgumentParser(
        prog="spectral-adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Each command has a --help of its own: spectral-adapters train --help",
    )
    commands = build.add_subparsers(dest="command", required=True, metavar="command")
    train.add_parser(commands)
    slider.add_parser(commands)
    distil.add_parser(commands)
    files.add_parsers(commands)
    pictures.add_parser(commands)
    command.add_parser(commands)
    return build


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns on import, before one can ask
    options = parser().parse_args(arguments)
    try:
        with _terminated_like_interrupted():
            return int(options.run(options))
    except SpectralAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which schedulers and containers send, saves what Ctrl-C saves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
