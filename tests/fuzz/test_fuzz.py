"""A while of the harness in every run: no foreign exception, nothing slow, large or not finite."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from spectral_core.errors import SpectralAdapterError
from tests.fuzz import run
from tests.fuzz.readers import Reader, all_readers

CASES = 120  # of each reader; fixed, so that every run of the tests sees the same
SEED = 20261127


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return dict(all_readers(tmp_path_factory.mktemp("seeds")))


def test_sound_inputs_are_accepted(readers: dict[str, Reader], tmp_path: Path) -> None:
    for reader in readers.values():
        for seed in reader.seeds:
            try:
                reader.read(seed, tmp_path)
            except SpectralAdapterError:
                assert reader.name == "picture" and seed[:3] in (b"GIF", b"II*"), reader.name
        run.empty(tmp_path)


def test_hostile_inputs(readers: dict[str, Reader]) -> None:
    *_, tallies = run.rounds(list(readers.values()), SEED, 600.0, CASES)
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    assert not faults, "\n".join(faults)
    assert all(tally.cases == CASES for tally in tallies.values())
    for name, tally in tallies.items():
        assert tally.refused > 5 or not readers[name].refuses, (name, tally)


def test_the_same_seed_gives_the_same_cases(readers: dict[str, Reader]) -> None:
    for reader in readers.values():
        assert run.case(reader, 1, 3) == run.case(reader, 1, 3)
    state = random.getstate()
    run.case(readers["adapter"], 1, 4)
    assert random.getstate() == state


def test_a_fault_is_noticed(readers: dict[str, Reader], tmp_path: Path) -> None:
    def broken(content: object, scratch: Path) -> None:
        raise KeyError("foreign")

    tally = run.Tally()
    run.attempt(Reader("broken", (b"x",), lambda rng, seed: seed, broken), 1, 7, tmp_path, tally)
    assert tally.cases == 1 and "broken, seed 1, case 7: KeyError" in tally.faults[0]
