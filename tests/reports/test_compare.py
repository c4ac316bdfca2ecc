"""Comparisons of runs: findings, their certainty, gates, and the printed report."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from batchlab.cli import report
from batchlab.core.errors import UsageError
from batchlab.reports.comparison import MEASURES, Change, ComparedRun, Comparison, Gate, Sample, compare, gates, runs
from tests.support.cli import run
from tests.support.reports.made import Made, write_run

__all__ = ["run"]

SEED = 0


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write pairs of runs: the original, a repetition, and one with a slower stage and more retries."""
    folder = tmp_path_factory.mktemp("sides")
    usual = Made(tasks=160)
    worse = replace(usual, slow=1.3, failing=0.2)
    for side, made, first in (("main", usual, 0), ("again", usual, 10), ("branch", worse, 20)):
        for n in range(2):
            job = f"{side}-{n}"
            write_run(folder / side / job, replace(made, job=job, seed=first + n))
    return {side: folder / side for side in ("main", "again", "branch")}


@cache
def read(folder: Path) -> list[ComparedRun]:
    return runs([folder], SEED)


def compared(sides: dict[str, Path], a: str, b: str, *wanted: Gate) -> Comparison:
    return compare(read(sides[a]), read(sides[b]), wanted, seed=SEED)


def of(found: Comparison, measure: str, stage: str = "") -> Change:
    (one,) = (c for c in found.changes if (c.measure.name, c.stage) == (measure, stage))
    return one


def test_slower_stages_are_found_with_their_intervals(sides: dict[str, Path]) -> None:
    found = compared(sides, "main", "branch")
    p95 = of(found, "p95", "score")
    assert p95.verdict == "worse"
    assert p95.low is not None
    assert p95.high is not None
    assert 0.2 < p95.low < 0.3 < p95.high < 0.5
    assert p95.low < p95.relative < p95.high
    assert of(found, "retries", "score").verdict == "worse"
    assert of(found, "cost").verdict == "worse"
    assert of(found, "tasks_per_s").worse_by > 0.1
    assert of(found, "p50", "read").verdict == "same"
    assert found.causes[0].startswith("score: its tasks run longer")
    assert "were retried" in found.causes[0]
    assert not any(cause.startswith("read") for cause in found.causes), found.causes


def test_medians_are_those_of_the_runs(sides: dict[str, Path]) -> None:
    found = compared(sides, "main", "branch")
    each = [one.samples["p50", "score"].value for one in read(sides["main"])]
    assert of(found, "p50", "score").a == statistics.median(each)


def test_the_same_again_breaks_no_gate(sides: dict[str, Path]) -> None:
    """A comparison with swapped runs does not break a gate either, because random differences are reported as such."""
    wanted = gates("10%", [])
    for a, b in (("main", "again"), ("again", "main")):
        found = compared(sides, a, b, *wanted)
        assert not found.broken, found.causes
        assert of(found, "p95", "score").verdict == "same"


def test_comparison_is_reproducible(sides: dict[str, Path]) -> None:
    again = compare(runs([sides["main"]], SEED), read(sides["branch"]), seed=SEED)
    assert again.to_json() == compared(sides, "main", "branch").to_json()


def test_interval_covers_the_truth_at_its_stated_rate() -> None:
    """The intervals are those of the ratio of two medians, for runs with a known spread."""
    rng = random.Random(4)

    def side(mean: float) -> list[ComparedRun]:
        made = []
        for n in range(9):
            one = ComparedRun(str(n), "x", is_final=True, stages=["s"])
            one.samples["p50", "s"] = Sample(rng.gauss(mean, mean * 0.05))
            made.append(one)
        return made

    hits = 0
    for _ in range(40):
        (change,) = compare(side(1.0), side(1.2)).changes
        assert change.low is not None
        assert change.high is not None
        hits += change.low <= 0.2 <= change.high
    assert hits >= 34  # of 40, with 38 expected


def test_a_quantiles_spread_within_a_run_is_that_of_resamples(sides: dict[str, Path]) -> None:
    """Randomly drawn ranks replace real resamples."""
    from batchlab.reports.queries import store

    (run_, *_) = read(sides["main"])
    with store.open_store([sides["main"] / run_.job]) as connection:
        sql = "SELECT run_s FROM tasks WHERE stage = 'score' AND state = 'SUCCEEDED'"
        values = [row[0] for row in store.run_query(connection, sql)[1]]
    rng = random.Random(1)
    slow = [statistics.median(rng.choices(values, k=len(values))) for _ in range(400)]
    quick = run_.samples["p50", "score"].draws
    assert statistics.stdev(quick) == pytest.approx(statistics.stdev(slow), rel=0.25)
    assert statistics.mean(quick) == pytest.approx(statistics.mean(slow), rel=0.02)


def test_single_runs_can_be_compared(sides: dict[str, Path]) -> None:
    a, b = read(sides["main"])[:1], read(sides["branch"])[:1]
    found = compare(a, b, gates("10%", []), seed=SEED)
    assert of(found, "p95", "score").is_sure
    assert of(found, "took").low is None
    assert of(found, "p95", "merge").low is None  # the spread of a single task cannot be measured
    assert any("one side has a single run" in note for note in found.notes)
    assert {"p95", "tasks_per_s", "cost"} == {gate.measure for gate, _ in found.broken}


# --- Gates ---------------------------------------------------------------------------------------


def change(a: float, b: float, measure: str = "p95", stage: str = "s", **more: float) -> Change:
    return Change(MEASURES[measure], stage, a, b, more.get("low"), more.get("high"))


def broken(one: Change, *texts: str) -> bool:
    first, second = (ComparedRun(side, "x", is_final=True, stages=["s"]) for side in "ab")
    first.samples[one.measure.name, one.stage] = Sample(one.a)
    second.samples[one.measure.name, one.stage] = Sample(one.b)
    return bool(compare([first], [second], gates(None, texts)).broken)


def test_gates_are_of_what_got_worse() -> None:
    assert broken(change(1.0, 1.2), "p95 > 10%")
    assert not broken(change(1.0, 1.2), "p95 > 20.5%")
    assert not broken(change(1.2, 1.0), "p95 > 10%")
    assert broken(change(1.0, 1.2), "s.p95 > 10%")
    assert broken(change(100, 80, "tasks_per_s", ""), "tasks_per_s > 10%")
    assert not broken(change(80, 100, "tasks_per_s", ""), "tasks_per_s > 10%")
    assert broken(change(0.0, 3.0, "failed", ""), "failed > 10%")
    assert not broken(change(0.0, 0.0, "failed", ""), "failed > 0%")
    assert not broken(change(0.001, 0.009), "p95 > 10%")  # the change is below the machine's own noise


def test_uncertain_difference_breaks_no_gate() -> None:
    unsure = change(1.0, 1.5, low=-0.1, high=1.2)
    assert unsure.is_sure is False
    assert unsure.verdict == "same"
    assert change(1.0, 1.5, low=0.1, high=1.2).verdict == "worse"
    assert change(1.0, 0.5, low=-0.6, high=-0.4).verdict == "better"
    assert change(0.0, 2.0, "failed").relative == math.inf


@pytest.mark.parametrize("text", ["p95", "p95 > ten%", "p95 < 10%", "speed > 10%", "tasks > 1%", "p95 > 1.2.3%", ""])
def test_invalid_gate_is_reported(text: str) -> None:
    with pytest.raises(UsageError):
        gates(None, [text])


def test_invalid_threshold_and_stage_are_reported(sides: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="not a percentage"):
        gates("-3", [])
    assert [str(gate) for gate in gates("10", [])] == ["p95 > 10%", "tasks_per_s > 10%", "cost > 10%"]
    with pytest.raises(UsageError, match="the stage 'parse'"):
        compared(sides, "main", "again", *gates(None, ["parse.p95 > 10%"]))


def test_limited_comparability_is_reported(sides: dict[str, Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", Made(job="other", name="other", tasks=16))
    (other / "stages.parquet").unlink()
    found = compare(read(sides["main"]), runs([other], SEED))
    assert any("different jobs: other, shop" in note for note in found.notes)
    assert any("stage score is only in A" in note for note in found.notes)


# --- The command ---------------------------------------------------------------------------------


def test_the_command_and_its_exit_codes(sides: dict[str, Path], run: object) -> None:
    main, again, branch = (str(sides[name]) for name in ("main", "again", "branch"))
    call = run
    assert callable(call)
    code, out, _ = call("report", "diff", main, branch, "--threshold", "10%")
    assert code == 1
    assert "2 runs (A) against 2 runs (B)" in out
    assert "What got worse, and why" in out
    assert "TOO MUCH" in out
    assert re.search(r"^all +tasks_per_s +[\d.,]+ tasks/s +[\d.,]+ tasks/s ", out, re.MULTILINE)
    assert re.search(r"^all +cost per 1,000 tasks +\S+ USD +\S+ USD ", out, re.MULTILINE)
    code, out, _ = call("report", "diff", main, again, "--threshold", "10%", "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    code, out, _ = call("report", "diff", main, branch, "--fail-on", "score.p95 > 10%", "--json")
    told = json.loads(out)
    assert (code, told["ok"]) == (1, False)
    assert told["broken"][0]["gate"] == "score.p95 > 10%"
    code, _, err = call("report", "diff", main, branch, "--fail-on", "speed > 1%")
    assert code == 2
    assert "is not a gate" in err
    code, _, err = call("report", "diff", main, branch, "--json", "--markdown")
    assert code == 2


def test_runs_are_named_one_by_one_too(sides: dict[str, Path], run: object) -> None:
    assert callable(run)
    a = ",".join(str(sides["main"] / f"main-{n}") for n in range(2))
    code, out, _ = run("report", "diff", a, str(sides["branch"] / "branch-1"))
    assert code == 0
    assert "2 runs (A) against 1 run (B)" in out


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("@octocat", "@<!-- -->octocat"),
        ("team/@org/x", "team/@<!-- -->org/x"),
        ("fixes #12", "fixes \\#<!-- -->12"),
        ("fixes GH-12, a!7", "fixes GH<!-- -->-12, a!<!-- -->7"),
        ("https://evil.example www.evil.example", "https:<!-- -->//evil.example www<!-- -->.evil"),
        ("<!-- @x -->", "\\<!-- @<!-- -->x --\\>"),
        ("mail@host", "mail@<!-- -->host"),
        ("+3.1% & a: b", "+3.1% & a: b"),
    ],
)
def test_markdown_has_no_mentions_or_references(name: str, shown: str) -> None:
    assert report._md(name).startswith(shown)


def renamed(folder: Path) -> Path:
    """Rename the run's stage `score` to an odd name."""
    import duckdb

    with duckdb.connect(":memory:") as connection:
        for name in ("stages", "tasks", "bundles"):
            path = folder / f"{name}.parquet"
            connection.execute(
                "CREATE TABLE t AS SELECT * REPLACE "
                "(replace(stage, 'score', '<b>|`x`@you') AS stage) "
                f"FROM '{path}'; COPY t TO '{path}'; DROP TABLE t"
            )
    return folder


def test_markdown_escapes_any_stage_name(run: object, tmp_path: Path) -> None:
    assert callable(run)
    odd = renamed(write_run(tmp_path / "odd", Made(job="odd", tasks=16)))
    slow = renamed(write_run(tmp_path / "slow", Made(job="slow", tasks=16, slow=9.0)))
    code, out, _ = run("report", "diff", str(odd), str(slow), "--markdown", "--threshold", "10%")
    assert code == 1
    assert "Too much" in out.splitlines()[0]
    assert "x\\`@<!-- -->you" in out.splitlines()[0]
    assert "<b>" not in out.replace("\\<b\\>", "")
    assert "@you" not in out
    rows = [line.replace("\\|", "") for line in out.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in rows}
    assert widths == {8}
