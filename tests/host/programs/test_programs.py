"""Random programs of nodes in a real host: whatever is done, afterwards the models are what they were.

Hypothesis draws the programs and shrinks those that fail; ``inside_programs.py`` does what they say. A
program may be refused by the project's own error at any node; nothing else may be raised, the base models
sample the same to the bit at its end, and no tensor is left. ``SPECTRAL_PROGRAMS=500`` for more of them than
the few of every run.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.host.apply import tiny_checkpoints
from tests.host.booted import Checkout
from tests.host.inside import BOOTSTRAP, checkouts, script_path

pytestmark = pytest.mark.host
PROGRAMS = int(os.environ.get("SPECTRAL_PROGRAMS", "6"))
COMMANDS = 8  # of a program at most
SECONDS = 300  # for one command, on a machine that is busy

NUMBER = st.integers(0, 11)
STRENGTH = st.sampled_from([0.0, 1.0, -1.0, 0.3, 2.5, 100.0])
SHARE = st.sampled_from([0.0, 0.2, 0.5, 1.0])
MODE = st.sampled_from(["auto", "merged", "live"])
CURVE = st.sampled_from(["constant", "linear in", "cosine out", "bell", "custom"])
POINTS = st.sampled_from(["", "0:1, 1:0", "0:1, 0.5:0.3", "1:1, 0:0", "x", "0:1e9"])
BLOCKS = st.sampled_from(["", "down_blocks.1: 0.5", "attn2: 0", "IN: 2", "nothing: 1", "*: nan", "to_q: -1"])
FUSION = st.sampled_from(["sum", "average", "spectral", "orthogonal", "subspaces", "closed-form"])


class Inside:
    """The process that does it. ``bytes``: of tensors that were left at the ends of programs."""

    def __init__(self, checkout: Checkout, folder: Path) -> None:
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        env = {k: v for k, v in os.environ.items() if k not in hidden}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
        self.bytes: list[int] = []
        self.commands = self.refused = 0
        self.log = folder / "log"
        self._stderr = self.log.open("wb")
        self._process = subprocess.Popen(
            [str(checkout.python), "-c", BOOTSTRAP, str(script_path("inside_programs.py")), str(folder)],
            cwd=checkout.root,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        assert self._answer().get("ready"), "the host did not start"

    def do(self, command: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **values}).encode() + b"\n")
        self._process.stdin.flush()
        found = self._answer()
        self.commands += 1
        self.refused += "refused" in found
        assert not found.get("said"), found["said"]
        return found

    def _answer(self) -> dict[str, Any]:
        stream = self._process.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], SECONDS)
        line = stream.readline() if ready else b""
        if not line:
            said = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise AssertionError(f"{'it ended' if ready else f'no answer in {SECONDS} s'}:\n{said}")
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()


@pytest.fixture(scope="module", params=checkouts())
def inside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("programs")
    tiny_checkpoints.write(tiny_checkpoints.sd1(), folder / "sd1.ckpt")
    found = Inside(request.param, folder)
    yield found
    found.close()


def programs(inside: Inside) -> type[RuleBasedStateMachine]:
    """The commands, done by this process."""

    class Programs(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            inside.do("begin")

        @rule(file=NUMBER, strength=STRENGTH, on=st.none() | NUMBER)
        def load(self, **values: Any) -> None:
            inside.do("load", **values)

        @rule(file=NUMBER, strength=STRENGTH, on=st.none() | NUMBER)
        def load_lora(self, **values: Any) -> None:
            inside.do("load_lora", **values)

        @rule(
            adapter=NUMBER,
            model=STRENGTH,
            clip=STRENGTH,
            start=SHARE,
            end=SHARE,
            curve=CURVE,
            points=POINTS,
            blocks=BLOCKS,
        )
        def strength(self, **values: Any) -> None:
            inside.do("strength", **values)

        @rule(rows=st.lists(st.tuples(NUMBER, STRENGTH, CURVE), max_size=3))
        def stack(self, **values: Any) -> None:
            inside.do("stack", **values)

        @rule(
            first=NUMBER,
            second=NUMBER,
            method=FUSION,
            weights=st.tuples(STRENGTH, STRENGTH),
            rank=st.sampled_from([0, 1, 8]),
            freeze=st.booleans(),
        )
        def fuse(self, **values: Any) -> None:
            inside.do("fuse", **values)

        @rule(adapter=NUMBER, rank=st.sampled_from([1, 2, 64]))
        def resize(self, **values: Any) -> None:
            inside.do("resize", **values)

        @rule(adapter=NUMBER, on=NUMBER, mode=MODE, strength=STRENGTH, chained=st.booleans())
        def apply(self, **values: Any) -> None:
            inside.do("apply", **values)

        @rule(adapter=NUMBER, precision=st.sampled_from(["as is", "fp16", "bf16"]))
        def save(self, **values: Any) -> None:
            inside.do("save", **values)

        @rule(adapter=NUMBER, naming=st.sampled_from(["kohya", "diffusers"]), drop=st.booleans())
        def export(self, **values: Any) -> None:
            inside.do("export", **values)

        @rule(adapter=NUMBER)
        def report(self, **values: Any) -> None:
            inside.do("report", **values)

        @rule(on=NUMBER, cancel=st.none() | st.integers(0, 1))
        def sample(self, **values: Any) -> None:
            inside.do("sample", **values)

        def teardown(self) -> None:
            inside.bytes.append(inside.do("end")["bytes"])

    return Programs


def test_whatever_is_done_the_models_are_what_they_were(inside: Inside) -> None:
    run_state_machine_as_test(
        programs(inside),
        settings=settings(
            max_examples=PROGRAMS,
            stateful_step_count=COMMANDS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{len(inside.bytes)} programs, {inside.commands} commands, {inside.refused} refused")
    print(f"bytes left after each: first {inside.bytes[:3]}, last {inside.bytes[-3:]}")
    assert len(inside.bytes) >= PROGRAMS


def test_a_fault_is_noticed(inside: Inside) -> None:
    """What is no project's error ends the program, with the host's own words."""
    inside.do("begin")
    with pytest.raises(AssertionError, match="AttributeError"):
        inside.do("no such command")
    inside.do("end")
