"""The repository keeps its import arrows, and the checker would notice if it did not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.core import import_rules as rules

ROOT = Path(__file__).resolve().parents[2]
Check = Callable[[str, Path], Iterator[str]]


def run(check: Check, folder: str) -> list[str]:
    files = sorted(ROOT.joinpath(folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    return [
        violation
        for file in files
        for violation in check(file.read_text(encoding="utf-8"), file.relative_to(ROOT))
    ]


@pytest.mark.parametrize(
    ("check", "folder"),
    [
        (rules.core_violations, "spectral_core"),
        (rules.node_violations, "nodes"),
        (rules.danger, "spectral_core"),
        (rules.danger, "nodes"),
        (rules.webui_violations, "spectral_webui"),
        (rules.danger, "spectral_webui"),
    ],
)
def test_repository(check: Check, folder: str) -> None:
    violations = run(check, folder)
    assert not violations, "\n" + "\n".join(violations)


CORE, NODES, DANGER = rules.core_violations, rules.node_violations, rules.danger
LAZY = "def f():\n    "


def test_no_module_imports_itself_by_way_of_others() -> None:
    files = [
        file
        for folder in ("spectral_core", "nodes", "spectral_webui")
        for file in sorted(ROOT.joinpath(folder).rglob("*.py"))
    ]
    sources = {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}
    assert not list(rules.cycles(sources))


@pytest.mark.parametrize(
    ("sources", "seen"),
    [
        ({"a.py": "from .b import x", "b.py": "from .a import y"}, True),
        ({"a.py": "def f():\n    from .b import x", "b.py": "if TYPE_CHECKING:\n    from . import a"}, True),
        ({"a.py": "from .b import x", "b.py": "from .c import y", "c.py": "from .a import z"}, True),
        (
            {"a.py": "from .b import x", "b.py": "from .c import y", "c.py": "", "d.py": "from . import a"},
            False,
        ),
    ],
)
def test_cycles_are_seen(sources: dict[str, str], seen: bool) -> None:
    assert bool(list(rules.cycles({Path("spectral_core", k): v for k, v in sources.items()}))) is seen


def test_every_room_is_in_the_list() -> None:
    """A new folder has a place in the arrow before anything imports it."""
    for folder, rooms in [
        ("spectral_core", rules.CORE),
        ("nodes/host", rules.IN_HOST),
        ("spectral_webui", rules.WEBUI),
    ]:
        found = {rules.room_of(("x", p.name)) for p in ROOT.joinpath(folder).iterdir() if p.suffix == ".py"}
        found |= {p.name for p in ROOT.joinpath(folder).iterdir() if list(p.glob("*.py"))}
        assert found - {""} == set(rooms)
    found = {p.name for p in ROOT.joinpath("spectral_core/training").iterdir() if list(p.glob("*.py"))}
    assert found == set(rules.TRAINING)


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (CORE, "spectral_core/maths/svd.py", "import comfy.utils"),
        (CORE, "spectral_core/maths/svd.py", LAZY + "import folder_paths"),
        (CORE, "spectral_core/maths/svd.py", "import scipy"),
        (CORE, "spectral_core/adapter/adapter.py", LAZY + "import diffusers"),
        (CORE, "spectral_core/adapter/adapter.py", "from transformers.models import x"),
        (CORE, "spectral_core/pipelines/loading.py", "import diffusers"),
        (CORE, "spectral_core/pipelines/loading.py", "from diffusers import DiffusionPipeline"),
        (CORE, "spectral_core/adapter/adapter.py", "from spectral_core.errors import SpectralAdapterError"),
        (CORE, "spectral_core/adapter/adapter.py", "from ..nodes import load"),
        (CORE, "spectral_core/errors.py", "from .maths.svd import top_columns"),
        (CORE, "spectral_core/maths/svd_cache.py", "from ..gates.formula import apply"),
        (CORE, "spectral_core/methods/foura.py", "from ..adapter.adapter import Adapter"),
        (CORE, "spectral_core/methods/foura.py", LAZY + "from ..training.engine.loop import train"),
        (CORE, "spectral_core/methods/foura.py", "from .lora import fold"),
        (CORE, "spectral_core/methods/foura.py", "from . import spectral_a"),
        (CORE, "spectral_core/training/engine/loop.py", "from ...cli import main"),
        (CORE, "spectral_core/fusion/sum.py", LAZY + "from ..training.engine.optim import make"),
        (CORE, "spectral_core/newcomer/x.py", "from ..errors import E"),
        (CORE, "spectral_core/adapter/adapter.py", "from ..newcomer import x"),
        (CORE, "spectral_core/maths/svd.py", "import demo_model"),
        (
            CORE,
            "spectral_core/files/config.py",
            "if TYPE_CHECKING:\n    from ..fusion.report import FusionReport",
        ),
        (CORE, "spectral_core/training/runs/place.py", "from ..engine.loop import train"),
        (NODES, "nodes/load.py", "import comfy.sd"),
        (NODES, "nodes/load.py", LAZY + "from server import PromptServer"),
        (NODES, "nodes/load.py", "from spectral_core.files.adapter_file import load"),
        (NODES, "nodes/host/apply/merged.py", "from ...load import LoadAdapter"),
        (NODES, "nodes/host/apply/merged.py", "import diffusers"),
        (NODES, "nodes/host/model/noise.py", "from ..apply import merged"),
        (NODES, "nodes/host/demo/model.py", "from ..files import paths"),
        (NODES, "nodes/load.py", "from ..dev import main"),
        (NODES, "nodes/load.py", "from ..spectral_core.demo.command import main"),
        (DANGER, "nodes/load.py", "x = eval('1')"),
        (DANGER, "nodes/load.py", "exec('x = 1')"),
        (DANGER, "spectral_core/maths/svd.py", "import torch\ntorch.load('x')"),
        (DANGER, "spectral_core/maths/svd.py", "from torch import load"),
        (DANGER, "spectral_core/maths/svd.py", LAZY + "import pickle"),
        (DANGER, "spectral_core/maths/svd.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        (DANGER, "spectral_core/maths/svd.py", "try:\n    x = 1\nexcept Exception:\n    x = 2"),
        (DANGER, "spectral_core/maths/svd.py", "try:\n    x = 1\nexcept:\n    x = 2"),
    ],
)
def test_checker_sees(check: Check, file: str, source: str) -> None:
    assert list(check(source, Path(file)))


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (
            CORE,
            "spectral_core/maths/svd_cache.py",
            "from .svd import top\nfrom ..errors import E\nimport torch",
        ),
        (CORE, "spectral_core/methods/__init__.py", "from . import foura\nfrom .lora import fold"),
        (CORE, "spectral_core/methods/foura.py", "from .common import Factors\nfrom ..gates import formula"),
        (CORE, "spectral_core/pipelines/loading.py", LAZY + "from diffusers import DiffusionPipeline"),
        (CORE, "spectral_core/pipelines/loading.py", "if TYPE_CHECKING:\n    import diffusers"),
        (CORE, "spectral_core/training/engine/optim.py", LAZY + "import schedulefree"),
        (
            CORE,
            "spectral_core/fusion/sum.py",
            "from .report import Report\nfrom ..adapter.adapter import Adapter",
        ),
        (
            NODES,
            "nodes/load.py",
            "from ..spectral_core.files.adapter_file import load\nfrom .host.files import paths",
        ),
        (
            NODES,
            "nodes/host/files/paths.py",
            "import folder_paths\nfrom ....spectral_core.names import spellings",
        ),
        (
            DANGER,
            "spectral_core/maths/svd.py",
            "model.eval()\ntry:\n    x = 1\nexcept BaseException:\n    raise",
        ),
        (DANGER, "spectral_core/maths/svd.py", "import re\nre.compile('x')"),
    ],
)
def test_checker_lets_pass(check: Check, file: str, source: str) -> None:
    assert not list(check(source, Path(file)))


def folders(below: str) -> set[str]:
    """Those that hold tests; a room's own folders are the room's."""
    return {test.relative_to(ROOT / below).parts[0] for test in (ROOT / below).glob("*/**/test_*.py")}


def test_tests_mirror_the_rooms() -> None:
    """So that a room's tests are found without looking; beside them stand tests of several rooms together."""
    assert folders("tests/core") <= {*rules.CORE}
    assert folders("tests/nodes") == {"host"} and folders("tests/nodes/host") <= {*rules.IN_HOST}
    assert folders("tests/host") <= {*rules.IN_HOST, "conformance", "programs"}
    assert not list((ROOT / "tests" / "pipelines").glob("*.py")), "tests/core/pipelines is the place"
