"""The benchmarks' shared half: rounds are interleaved, ratios are paired, a missed target fails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.common import Spread, Target, Times, finish, interleave, table


def test_candidates_are_measured_in_turn_in_a_new_order_each_round() -> None:
    order: list[str] = []
    times = interleave({n: (lambda n=n: order.append(n)) for n in "abc"}, repetitions=20, warmup=1)
    assert order[:3] == ["a", "b", "c"], "warm-up, not measured"
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert len(rounds) == 20 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    before = {one[i - 1] for one in rounds for i in (1, 2) if one[i] == "b"}
    assert before == {"a", "c"}, "nobody always follows the same neighbour"
    assert {name: len(values) for name, values in times.seconds.items()} == {"a": 20, "b": 20, "c": 20}


def test_fast_candidates_are_called_several_times_per_measurement() -> None:
    calls = []
    times = interleave({"fast": lambda: calls.append(1)}, repetitions=3, warmup=1, minimum_seconds=0.01)
    assert len(calls) > 100
    assert times.median("fast") < 0.005, "seconds are per call"


def test_ratio_is_paired_by_round_not_a_ratio_of_medians() -> None:
    times = Times({"base": (1.0, 2.0, 40.0), "ours": (1.1, 2.4, 36.0)})
    ratio = times.ratio("ours", "base")
    assert ratio.median == pytest.approx(1.1)
    assert (ratio.low, ratio.high) == (pytest.approx(1.0), pytest.approx(1.15))
    assert times.row("ours", to="base")["seconds"] == 2.4
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("figure", "limit", "op", "holds"),
    [
        (1.05, 1.05, "<=", True),
        (1.0501, 1.05, "<=", False),
        (5.0, 5.0, ">=", True),
        (4.99, 5.0, ">=", False),
        (math.nan, 1.0, "<=", False),
        (math.nan, 1.0, ">=", False),
    ],
)
def test_target(figure: float, limit: float, op: str, holds: bool) -> None:
    assert Target("t", figure, limit, op).holds is holds


def test_unknown_comparison_is_refused() -> None:
    with pytest.raises(ValueError, match="'<' is none of <=, >="):
        Target("t", 1.0, 2.0, "<")


@pytest.mark.parametrize(("figure", "code"), [(1.0, 0), (1.2, 1)])
def test_result_file_and_exit_code(figure: float, code: int, tmp_path: Path, capsys) -> None:
    targets = [Target("always", 9.0, 5.0, ">="), Target("time", figure, 1.05)]
    assert finish("demo", [{"name": "ours", "ratio": figure}], targets, {"rank": 8}, folder=tmp_path) == code
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["holds"] is (code == 0)
    assert [target["holds"] for target in report["targets"]] == [True, code == 0]
    assert report["rows"] == [{"name": "ours", "ratio": figure}]
    assert report["settings"] == {"rank": 8}
    assert report["machine"]["cores"] and report["versions"]["torch"]
    assert [file.name for file in tmp_path.iterdir()] == ["demo.json"], "no partial file is left"
    printed = capsys.readouterr()
    assert "ours" in printed.out
    assert ("time" in printed.err) == (code == 1)


def test_failed_write_leaves_the_old_result(tmp_path: Path) -> None:
    finish("demo", [{"name": "old"}], [], folder=tmp_path)
    with pytest.raises(TypeError):
        finish("demo", [{"name": object()}], [], folder=tmp_path)
    assert json.loads((tmp_path / "demo.json").read_text())["rows"] == [{"name": "old"}]
    assert len(list(tmp_path.iterdir())) == 1


def test_table_aligns_numbers_to_the_right() -> None:
    rows = [{"name": "a", "x": 1.5, "ok": True}, {"name": "long name", "x": 12.25, "ok": False}]
    lines = table(rows).split("\n")
    assert lines[0] == "name           x  ok"
    assert lines[2] == "a            1.5  yes"
    assert lines[3] == "long name  12.25  NO"
