"""What ``import spectral_core`` offers: complete, lazy, typed, and answering mistakes in its own words."""

from __future__ import annotations

import ast
import doctest
import importlib
import operator
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import spectral_core as sc
from spectral_core import words

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "spectral_core" / "__init__.py"
NAMES = [*sc.__all__]


def fresh(code: str) -> str:
    """What a new Python prints; this one has imported everything already."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_name_is_there_and_shown() -> None:
    assert all(getattr(sc, name).__name__ == name for name in NAMES)
    assert {*NAMES} < {*dir(sc)}
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = sc.lode


@pytest.mark.parametrize("first", ["import spectral_core.attach.targets", "sc.find_targets", "sc.load"])
def test_attach_is_the_function_whatever_was_imported_before(first: str) -> None:
    assert fresh(f"import spectral_core as sc; {first}; print(callable(sc.attach))") == "True"


def test_importing_costs_nothing_beyond_torch() -> None:
    heavy = "diffusers transformers scipy PIL torch._dynamo torch._inductor sympy"
    found = fresh(
        "import sys, torch; before = set(sys.modules); import spectral_core; "
        f"print([m for m in '{heavy}'.split() if m in set(sys.modules) - before])"
    )
    assert found == "[]"


def test_the_type_checker_sees_the_same_names() -> None:
    tree = ast.parse(DOOR.read_text(encoding="utf-8"))
    seen = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    assert {*NAMES} <= seen


def rooms() -> list[ModuleType]:
    found = [m.name for m in pkgutil.walk_packages(sc.__path__, "spectral_core.") if m.ispkg]
    return [importlib.import_module(name) for name in found]


@pytest.mark.parametrize("room", rooms(), ids=lambda room: room.__name__)
def test_rooms_say_what_they_hold(room: ModuleType) -> None:
    assert room.__doc__ and len(room.__doc__) > 30
    assert all(hasattr(room, name) for name in room.__all__)
    assert room.__all__ or room.__name__ == "spectral_core.cli"


# README shows training, and tests/test_wheel.py runs its lines. What needs diffusers is run by
# tests/core/pipelines/test_examples.py. The rest of these say their own in a line.
WITHOUT_EXAMPLES = {"train_adapter", "distil", "Job", "Output", "Adapter", "SpectralAdapterError"}
WITH_DIFFUSERS = {"load_pipeline", "apply", "generate"}
SHOWN = [name for name in NAMES if name not in WITHOUT_EXAMPLES | WITH_DIFFUSERS]
OTHERS = ["words.expected", "words.chosen", "Adapter.scaled", "maths.grouping.alike"]


def run_example(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstring of a name below the front door, as a doctest in this folder."""
    monkeypatch.chdir(folder)
    value = operator.attrgetter(name)(sc)
    module = sys.modules[value.__module__]
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(value, name, module, vars(module).copy()):
        runner.run(test)
    assert runner.tries and not runner.failures


@pytest.mark.parametrize("name", [*SHOWN, *OTHERS])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example(name, tmp_path, monkeypatch)


def adapter(layers: int = 40) -> sc.Adapter:
    generator = torch.Generator().manual_seed(1)
    weights = {f"unet.{i}": torch.randn(64, 48, generator=generator) for i in range(layers)}
    made = sc.create(weights, sc.LoRAConfig(4), generator=generator)
    return made.map_terms(
        lambda _, term: type(term)(term.config, {k: v + 0.1 for k, v in term.params.items()})
    )


BAD: Any = None


def bad(value: object) -> Any:
    """What the type checker would refuse."""
    return value


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fusion": (lambda _: sc.fuse([adapter()], method=bad("clsed-form")), "did you mean 'closed-form'"),
    "naming": (
        lambda p: sc.export_lora(adapter(), p / "x.safetensors", bad("koya")),
        "did you mean 'kohya'",
    ),
    "transform": (lambda _: sc.FouRAConfig(2, transform=bad("dctt")), "did you mean 'dct'"),
    "optimiser": (lambda _: sc.TrainConfig(optimiser=bad("adam")), "did you mean 'adamw'"),
    "strength as text": (lambda _: adapter().scaled(bad("1")), "strength is '1': expected a finite number"),
    "layers' strength": (
        lambda _: adapter().with_layer_strength("*", bad("1")),
        "expected a finite number",
    ),
    "no weights": (lambda _: sc.create(BAD, sc.LoRAConfig(2)), "expected a mapping of layer names"),
    "no configuration": (lambda _: sc.create({}, bad("foura")), "expected a method's configuration"),
    "apply nothing": (lambda _: sc.apply(None), "NoneType is no pipeline"),
    "attach nothing": (lambda _: sc.attach(nn.Linear(2, 2), BAD), "expected an adapter"),
    "attach to nothing": (lambda _: sc.attach(BAD, adapter()), "expected a torch module"),
    "fuse a path": (lambda _: sc.fuse(bad(["a.safetensors"])), "open files with load"),
    "fuse nothing": (lambda _: sc.fuse(BAD), "nothing to fuse"),
    "save nothing": (lambda p: sc.save(BAD, p / "x.safetensors"), "expected an adapter"),
    "export nothing": (lambda p: sc.export_lora(BAD, p / "x.safetensors"), "expected an adapter"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_our_words(mistake: str, tmp_path: Path) -> None:
    make, said = MISTAKES[mistake]
    with pytest.raises(sc.SpectralAdapterError, match=said):
        make(tmp_path)


def test_spectral_methods_find_their_columns() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    made = sc.create({"unet.a": weight}, sc.SpectralAConfig((0, 1)))
    found = torch.linalg.svdvals(weight)[:2]
    assert torch.allclose(made.layers["unet.a"].terms[0].params["s"], found, atol=1e-5)


def test_a_value_is_one_line(tmp_path: Path) -> None:
    one = adapter()
    fused = sc.fuse([one, one])
    path = sc.save(one, tmp_path / "a.safetensors")
    report = sc.export_lora(one, tmp_path / "b.safetensors")
    layer = next(iter(one.layers.values()))
    with sc.attach(nn.Sequential(*[nn.Linear(48, 64) for _ in range(40)]), one) as attachment:
        shown = [one, layer, layer.terms[0], fused, fused.report, report, sc.inspect(path), attachment.report]
    for value in shown:
        assert "\n" not in repr(value) and len(repr(value)) < 700, repr(value)
    assert repr(one) == "Adapter('': 40 layers, lora ×40)"
    for report_for_people in (fused.report, fused, report, sc.inspect(path)):
        text = str(report_for_people)
        assert "40 layers" in text and "=" not in text


def test_values_are_still_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        adapter().strength = 2.0  # type: ignore[misc]


def test_choices_are_strings_that_are_listed() -> None:
    assert words.chosen("b", ("a", "b"), "letter") == "b"
    for wrong in ("c", 1, None, ["a"]):
        with pytest.raises(sc.SpectralAdapterError, match="letter"):
            words.chosen(wrong, ("a", "b"), "letter")
