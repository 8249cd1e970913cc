"""What all tests share: no network, the pack as the host would load it, groups for parallel runs, and the
count of host tests."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACK = "pack_under_test"
ON_HOST = ("on", "host")  # the property of a test that runs on a real ComfyUI

# Every run draws the same numbers, so that a change is what makes a test fail; to look for more, give a word.
SEED = os.environ.get("SPECTRAL_ADAPTERS_TEST_SEED", "")
hypothesis.settings.register_profile("steady", derandomize=not SEED)
hypothesis.settings.load_profile("steady")

# Set before anything imports diffusers or transformers: a test that reaches for the network fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def imported_pack() -> ModuleType:
    """The repository's root, imported under a name of its own with the root not needed on ``sys.path``.

    This is how the host imports a custom node folder. ``pack.nodes`` and ``pack.spectral_core`` are second
    copies beside the ``spectral_core`` that the core's tests import: compare by attribute, not by isinstance.
    """
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK]


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """See :func:`imported_pack`."""
    return imported_pack()


def version_of(name: str) -> str:
    """Which host's a test is, by its name: ``test_boot.py::test_starts[0.28.0-cpu]`` -> ``0.28.0``; "" for
    none. Collected alone, the host's tests have their parameters in another order: ``[cpu-0.28.0]``."""
    found = re.search(r"[\[-](\d+\.\d+\.\d+\w*)[]-]", name)
    return found[1] if found else ""


def one_process(name: str) -> str:
    """A name that tests share which must run in one worker, in their order: the file, and for tests on a host
    its version, because one booted host serves many files."""
    file, version = name.partition("::")[0], version_of(name)
    return f"host {version}" if "/host/" in file and version else file


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where it is used
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return one_process(nodeid)

    return Scheduling(config, log)


class HostTests:
    """Counts the tests with the fixture ``host``, a real ComfyUI, for the last line of the summary."""

    def __init__(self) -> None:
        self.selected = False
        self.outcomes: Counter[str] = Counter()
        self.versions: set[str] = set()
        self.reasons: set[str] = set()

    @pytest.hookimpl(tryfirst=True)  # before -m selects by the marker
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if "host" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.host)
            if item.get_closest_marker("host"):
                item.user_properties.append(ON_HOST)  # reports take these along from other processes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if ON_HOST not in map(tuple, report.user_properties):
            return
        self.selected = True
        if report.skipped:
            self.outcomes["skipped"] += 1
            if isinstance(report.longrepr, tuple):
                self.reasons.add(report.longrepr[2].removeprefix("Skipped: "))
        elif report.when == "call":
            self.outcomes["ran"] += 1
            self.versions.add(version_of(report.nodeid))
        elif report.failed:
            self.outcomes["could not start"] += 1

    def line(self) -> str:
        """``host tests: 8 ran on ComfyUI 0.28.0, 0.3.64, 0 skipped``, with the reasons when some were."""
        ran, skipped, broken = (self.outcomes[kind] for kind in ("ran", "skipped", "could not start"))
        text = f"host tests: {ran} ran"
        if self.versions:
            text += f" on ComfyUI {', '.join(sorted(self.versions))}"
        text += f", {skipped} skipped"
        if broken:
            text += f", {broken} could not start"
        if self.reasons:
            text += f" ({'; '.join(sorted(self.reasons))})"
        return text if self.selected else "host tests: none selected"

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and not config.option.collectonly:
            reporter.ensure_newline()
            reporter.write_line(self.line())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses a set as a parameter: its order, and with it the test's name, differs between the processes of
    a parallel run, which then stops with 'Different tests were collected'."""
    for item in items:
        for name, value in getattr(getattr(item, "callspec", None), "params", {}).items():
            if isinstance(value, set | frozenset):
                raise pytest.UsageError(f"{item.nodeid}: give {name!r} as a tuple, not as a set")


@pytest.hookimpl(tryfirst=True)  # before fixtures are set up
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random numbers are a test's own, whichever tests ran before it in its process: a parallel run deals the
    files out anew each time."""
    seed = zlib.crc32(f"{item.nodeid}{SEED}".encode())
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(HostTests(), "host_tests")
