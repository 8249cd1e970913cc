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
    ],
)
def test_repository(check: Check, folder: str) -> None:
    violations = run(check, folder)
    assert not violations, "\n" + "\n".join(violations)


CORE, NODES, DANGER = rules.core_violations, rules.node_violations, rules.danger
LAZY = "def f():\n    "


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (CORE, "spectral_core/svd.py", "import comfy.utils"),
        (CORE, "spectral_core/svd.py", LAZY + "import folder_paths"),
        (CORE, "spectral_core/svd.py", "import scipy"),
        (CORE, "spectral_core/adapter.py", LAZY + "import diffusers"),
        (CORE, "spectral_core/adapter.py", "from transformers.models import x"),
        (CORE, "spectral_core/pipelines.py", "import diffusers"),
        (CORE, "spectral_core/pipelines/loading.py", "from diffusers import DiffusionPipeline"),
        (CORE, "spectral_core/adapter.py", "from spectral_core.errors import SpectralAdapterError"),
        (CORE, "spectral_core/adapter.py", "from ..nodes import load"),
        (CORE, "spectral_core/errors.py", "from .svd import top_columns"),
        (CORE, "spectral_core/svd_cache.py", "from .gate import apply"),
        (CORE, "spectral_core/methods/foura.py", "from ..adapter import Adapter"),
        (CORE, "spectral_core/methods/foura.py", LAZY + "from ..training.loop import train"),
        (CORE, "spectral_core/methods/foura.py", "from .lora import fold"),
        (CORE, "spectral_core/methods/foura.py", "from . import spectral_a"),
        (CORE, "spectral_core/training/loop.py", "from ..cli import demo"),
        (CORE, "spectral_core/fusion.py", LAZY + "from .training.optim import make"),
        (CORE, "spectral_core/newcomer.py", "from .training.loop import train"),
        (CORE, "spectral_core/adapter.py", "from .newcomer import x"),
        (CORE, "spectral_core/svd.py", "import demo_model"),
        (NODES, "nodes/load.py", "import comfy.sd"),
        (NODES, "nodes/load.py", LAZY + "from server import PromptServer"),
        (NODES, "nodes/load.py", "from spectral_core.fileformat import load"),
        (NODES, "nodes/host/patching.py", "from ..load import LoadAdapter"),
        (NODES, "nodes/host/patching.py", "import diffusers"),
        (NODES, "nodes/load.py", "from ..dev import main"),
        (NODES, "nodes/load.py", "from ..spectral_core.cli.demo import main"),
        (DANGER, "nodes/load.py", "x = eval('1')"),
        (DANGER, "nodes/load.py", "exec('x = 1')"),
        (DANGER, "spectral_core/svd.py", "import torch\ntorch.load('x')"),
        (DANGER, "spectral_core/svd.py", "from torch import load"),
        (DANGER, "spectral_core/svd.py", LAZY + "import pickle"),
        (DANGER, "spectral_core/svd.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        (DANGER, "spectral_core/svd.py", "try:\n    x = 1\nexcept Exception:\n    x = 2"),
        (DANGER, "spectral_core/svd.py", "try:\n    x = 1\nexcept:\n    x = 2"),
    ],
)
def test_checker_sees(check: Check, file: str, source: str) -> None:
    assert list(check(source, Path(file)))


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (CORE, "spectral_core/svd_cache.py", "from .svd import top\nfrom .errors import E\nimport torch"),
        (CORE, "spectral_core/methods/__init__.py", "from . import foura\nfrom .lora import fold"),
        (CORE, "spectral_core/methods/foura.py", "from .common import Factors\nfrom ..gate import apply"),
        (CORE, "spectral_core/pipelines/loading.py", LAZY + "from diffusers import DiffusionPipeline"),
        (CORE, "spectral_core/pipelines.py", "if TYPE_CHECKING:\n    import diffusers"),
        (CORE, "spectral_core/training/optim.py", LAZY + "import schedulefree"),
        (CORE, "spectral_core/fusion/sum.py", "from .report import Report\nfrom ..adapter import Adapter"),
        (NODES, "nodes/load.py", "from ..spectral_core.fileformat import load\nfrom .host import paths"),
        (NODES, "nodes/host/paths.py", "import folder_paths\nfrom ...spectral_core import keys"),
        (DANGER, "spectral_core/svd.py", "model.eval()\ntry:\n    x = 1\nexcept BaseException:\n    raise"),
        (DANGER, "spectral_core/svd.py", "import re\nre.compile('x')"),
    ],
)
def test_checker_lets_pass(check: Check, file: str, source: str) -> None:
    assert not list(check(source, Path(file)))
