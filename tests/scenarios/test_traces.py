"""The common rules of all traces: selected parts, refused traces, and complete reading."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchlab.core.errors import UsageError
from batchlab.scenarios.model.values import Anomaly
from batchlab.scenarios.traces.rows import AnomalyKind, Columns, ColumnSum, describe, summarize
from batchlab.scenarios.traces.source import Trace, TraceFormat
from tests.support.properties import PROPERTY
from tests.support.scenarios.trace_files import LOG, PROCESSORS, arrivals, job, jsonl, swf, table, written


def test_a_part_of_a_trace(tmp_path: Path) -> None:
    path = written(tmp_path, "\n".join(job(n, 100 + 10 * n, 6) for n in range(20)))
    part = replace(swf(path), from_s=50.0, until_s=100.0, starts_s=1000.0)
    assert [(arrival.at_s, arrival.label) for arrival in arrivals(part)] == [
        (1000.0 + 10 * n, str(5 + n)) for n in range(5)
    ]
    assert len(arrivals(replace(part, limit=2))) == 2
    assert [(arrival.at_s, arrival.task_s) for arrival in arrivals(replace(part, limit=2).compress(10))] == [
        (100.0, 0.6),
        (101.0, 0.6),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"from_s": 5.0, "until_s": 5.0}, "must be after from"),
        ({"from_s": -1.0}, "must not be negative"),
        ({"starts_s": -1.0}, "cannot start"),
        ({"limit": 0}, "leaves nothing"),
        ({"format": TraceFormat.TABLE, "columns": None}, "needs a map of its columns"),
        ({"template": ""}, "names the job"),
    ],
)
def test_invalid_trace_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(swf(tmp_path), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Columns(""), "with the arrival time"),
        (lambda: Columns("at", unit="days"), "one of s, ms, us, ns or a time format"),
        (lambda: Columns("at", unit="%Q"), "not a strptime format"),
        (lambda: Columns("at", every_s=0.0), "longer than 0 s"),
        (lambda: Columns("at", scale=-1.0), "scale must be"),
        (lambda: ColumnSum(()), "at least one column"),
        (lambda: ColumnSum(("a",), per=0.0), "per must be"),
    ],
)
def test_invalid_map_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_file_or_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trace .*gone cannot be read: No such file"):
        arrivals(swf(tmp_path / "gone"))
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        arrivals(swf(tmp_path))
    path = written(tmp_path, "at,at,size\n1,2,3\n")
    with pytest.raises(UsageError, match="has no column 'when'") as caught:
        arrivals(table(path, Columns("when")))
    assert caught.value.remedy == "Its columns are: at, at, size."
    with pytest.raises(UsageError, match="has 2 columns called 'at'"):
        arrivals(table(path, Columns("at")))
    with pytest.raises(UsageError, match="is empty"):
        arrivals(table(written(tmp_path, "\n\n", "empty"), Columns("at")))
    with pytest.raises(UsageError, match="has no column 'runtime'"):
        arrivals(swf(path, Columns("submit", task_s=ColumnSum(("runtime",)))))


def test_a_trace_of_which_nothing_can_be_used(tmp_path: Path) -> None:
    path = written(tmp_path, "at\nx\ny\n")
    with pytest.raises(UsageError, match="None of the 2 records") as caught:
        arrivals(table(path, Columns("at")))
    assert f"{path}:2: at is not a time ('x'): left out" in str(caught.value)


def test_unreadable_date_suggests_a_format(tmp_path: Path) -> None:
    path = written(tmp_path, "at,size\n31.10.2026 18:05:00,3\n")
    with pytest.raises(UsageError) as caught:
        arrivals(table(path, Columns("at")))
    assert 'unit: "%d.%m.%Y %H:%M:%S"' in (caught.value.remedy or "")
    with pytest.raises(UsageError) as caught:
        arrivals(table(path, Columns("at", unit="%d.%m.%Y %H:%M:%S", tasks=ColumnSum(("at",)))))
    assert "unit:" not in (caught.value.remedy or "")
    assert len(arrivals(table(path, Columns("at", unit="%d.%m.%Y %H:%M:%S")))) == 1


def test_a_trace_with_nothing_below_its_header(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no records"):
        arrivals(table(written(tmp_path, "at,size\n"), Columns("at")))


@pytest.mark.parametrize(
    ("at", "begins"),
    [
        ("2026-10-30 15:05:26.9", "2026-10-30T15:00:27"),
        ("2026-10-30T15:05:26+01:00", "2026-10-30T14:00:26Z"),
        ("9999-12-31 23:59:59", "9999-12-31T23:54:59"),
        ("0001-01-01 00:00:00", ""),
        ("1793372726", ""),
    ],
)
def test_wall_clock_time_at_the_start_of_a_scenario(tmp_path: Path, at: str, begins: str) -> None:
    path = written(tmp_path, f"at\n{at}\n")
    assert replace(table(path, Columns("at")), starts_s=300.0).begins() == begins


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, job(1))
    assert len(arrivals(swf(path))) == 1
    written(tmp_path, f"{job(1)}\n{job(2)}")
    assert len(arrivals(swf(path))) == 2


def test_odd_records_in_words_and_by_kind() -> None:
    odds = [
        Anomaly("b", 9, "run is below 0", "left out", "'-3'"),
        Anomaly("b", 4, "run is below 0", "left out", "'-7'"),
        Anomaly("b", 2, "a blank line", "skipped"),
        Anomaly("a", 7, "a blank line", "skipped"),
    ]
    assert describe(odds[0]) == "b:9: run is below 0 ('-3'): left out"
    assert describe(odds[2]) == "b:2: a blank line: skipped"
    assert summarize(odds) == (
        AnomalyKind("a", "a blank line", "skipped", 1, 7),
        AnomalyKind("b", "run is below 0", "left out", 2, 4),
        AnomalyKind("b", "a blank line", "skipped", 1, 2),
    )


ANY = st.text(alphabet=string.printable + "é\x00\u2028", max_size=60)
NUMBERS = count()
TRACES: dict[str, Callable[[Path], Trace]] = {
    "swf": lambda path: swf(path, PROCESSORS),
    "table": lambda path: table(path, LOG, names=("name", "at", "size", "ms")),
    "jsonl": jsonl,
}


@settings(PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("form", TRACES)
@given(
    lines=st.lists(
        ANY
        | st.lists(st.sampled_from(["-1", "0", "7", "1e3", "x", "", "nan", '"', "{", "5.5"]), max_size=22).map(" ".join)
        | st.lists(st.sampled_from(["-1", "0", "7", "x", "", '"', "2026-01-01"]), max_size=6).map(",".join)
        | st.fixed_dictionaries(
            {},
            optional={
                "due_s": st.none() | st.floats() | ANY,
                "tasks": st.integers() | st.booleans() | st.lists(st.none()),
                "planned": st.integers(-5, 5),
                "tenant": st.integers() | ANY,
            },
        ).map(json.dumps),
        max_size=12,
    )
)
def test_every_line_is_a_job_or_is_reported(tmp_path: Path, form: str, lines: list[str]) -> None:
    """Each record of any file is either among the rows or reported as left out."""
    path = written(tmp_path, "\n".join(lines), f"{form}-{next(NUMBERS)}")
    trace = TRACES[form](path)
    reading = trace.reading()
    left = {one.line for one in reading.odd if one.done.startswith("left out")}
    kept = [row.line for row in reading.rows]
    assert len(set(kept)) == len(kept)
    assert not left & set(kept)
    assert len(left) + len(kept) == reading.records
    whole = path.read_bytes().decode()
    text = whole.split("\r" if "\r" in whole and "\n" not in whole else "\n")
    comments = sum(line.lstrip().startswith(";") for line in text) if form == "swf" else 0
    blank = sum(not line or line.isspace() for line in text)
    assert reading.records == len(text) - blank - comments
    last = max((n for n, line in enumerate(text, 1) if line and not line.isspace()), default=0)
    skipped = {one.line for one in reading.odd if one.what == "a blank line"}
    assert skipped == {n for n, line in enumerate(text, 1) if n < last and (not line or line.isspace())}
