"""Traces in text tables, in which every odd row is reported with its line and the other rows are read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.errors import UsageError
from batchlab.scenarios.model.values import Arrival
from batchlab.scenarios.traces.rows import Columns, ColumnSum
from tests.support.scenarios.trace_files import LOG, arrivals, odd, table, written


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_delimiter_of_a_table_is_detected(tmp_path: Path, delimiter: str) -> None:
    text = "name,at,size,ms\na,5,95,1500\nb,7.5,1e2,0\n".replace(",", delimiter)
    assert arrivals(table(written(tmp_path, text), LOG)) == [
        Arrival(0.0, "j", 10, 1.5, "a"),
        Arrival(2.5, "j", 10, 0.0, "b"),
    ]


def test_table_may_lack_a_header_or_have_another_delimiter(tmp_path: Path) -> None:
    path = written(tmp_path, "a:5:95:1500\nb:6:5:0\n")
    names = ("name", "at", "size", "ms")
    found = arrivals(table(path, LOG, names, delimiter=":"))
    assert [(one.label, one.tasks) for one in found] == [("a", 10), ("b", 1)]


def test_quotes_and_bom_are_understood(tmp_path: Path) -> None:
    text = '\ufeff"at","name"\n"5","Smith, ""Al"""\n6, b \n'
    found = arrivals(table(written(tmp_path, text), Columns("at", label="name")))
    assert [one.label for one in found] == ['Smith, "Al"', "b"]


def test_odd_rows_of_a_table(tmp_path: Path) -> None:
    rows = [
        "name,at,size,ms",
        "a,0,10,1000",
        '"b,1,10,1000',
        "c,2,10,1000,extra",
        "d,3,10",
        "e,later,10,1000",
        "f,,10,1000",
        "g,6,10,-4",
        "h,7,nan,1000",
        "i,8,10,inf",
        "j,9,1_0,1000",
        "",
        "k,10,1e30,1000",
        "l,4,10,1000",
        '"m",11,0,1000',
    ]
    trace = table(written(tmp_path, "\n".join(rows)), LOG)
    assert [arrival.label for arrival in arrivals(trace)] == ["a", "c", "l", "m"]
    assert odd(trace) == [
        (3, "a quote that is not closed", "left out", ""),
        (4, "more fields than columns", "the first 4 were read", "5"),
        (5, "fewer fields than columns", "those that are there were read", "3"),
        (5, "ms is missing", "left out", ""),
        (6, "at is not a time", "left out", "'later'"),
        (7, "at is missing", "left out", ""),
        (8, "ms is below 0", "left out", "-4.0"),
        (9, "size is not a number", "left out", "'nan'"),
        (10, "ms is not a number", "left out", "'inf'"),
        (11, "size is not a number", "left out", "'1_0'"),
        (12, "a blank line", "skipped", ""),
        (13, "more tasks than a job may have", "left out", "1e+29"),
    ]
    assert trace.reading().records == 13


@pytest.mark.parametrize(
    ("first", "second", "unit", "gap_s"),
    [
        ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:50.9951690", "s", 4.314579),
        ("2023-11-16T18:15:46Z", "2023-11-16T20:15:46+01:00", "s", 3600.0),
        ("20231116T181546", "2023-11-17 18:15:46", "s", 86_400.0),
        ("1700158546", "1700158546.25", "s", 0.25),
        ("1700158546000", "1700158546250", "ms", 0.25),
        ("1700158546000000", "1700158546250000", "us", 0.25),
        ("1700158546000000000", "1700158546250000000", "ns", 0.25),
        ("16/Nov/2023:18:15:46 +0000", "16/Nov/2023:19:15:47 +0100", "%d/%b/%Y:%H:%M:%S %z", 1.0),
        ("11/16/2023 18:15", "11/16/2023 18:16", "%m/%d/%Y %H:%M", 60.0),
        ("Feb 28 23:59:59", "Feb 29 00:00:01", "%b %d %H:%M:%S", 2.0),
        ("-5", "5", "s", 10.0),
    ],
)
def test_forms_of_timestamps(tmp_path: Path, first: str, second: str, unit: str, gap_s: float) -> None:
    trace = table(written(tmp_path, f"at;n\n{first};1\n{second};2\n"), Columns("at", unit=unit))
    assert [arrival.at_s for arrival in arrivals(trace)] == pytest.approx([0.0, gap_s], abs=2e-6)
    assert not trace.odd()


def test_a_zone_unlike_the_first_is_odd(tmp_path: Path) -> None:
    text = "at\n2026-01-01 00:00\n2026-01-01T02:00+01:00\n2026-01-01 02:00\n"
    trace = table(written(tmp_path, text), Columns("at"))
    assert [arrival.at_s for arrival in arrivals(trace)] == [0.0, 3600.0, 7200.0]
    assert odd(trace) == [
        (3, "at has a zone, unlike the first", "what has none is read as UTC", "'2026-01-01T02:00+01:00'")
    ]


@pytest.mark.parametrize(
    ("text", "kept", "told"),
    [
        ("at\n5\n2026-01-01 00:00\n6\n", 2, (3, "at is a timestamp, unlike the first")),
        ("at\n2026-01-01\n2026-01-02T00:00\n7\n", 2, (4, "at is a number, unlike the first")),
        ("at\n-1e308\n5\n", 1, (2, "at is too large")),
        ("at,minus\n5,0\n6,1e300\n", 1, (3, "minus is too large")),
        ("at,tasks\n5,1\n6,1e300\n", 1, (3, "more tasks than a job may have")),
        ("at,task_s\n5,1\n6,1e300\n", 1, (3, "task_s is too large")),
        ("at,count\n0,1\n60,0\n120,1e300\n", 1, (4, "count is too large")),
    ],
)
def test_outliers_in_time_are_dropped(tmp_path: Path, text: str, kept: int, told: tuple[int, str]) -> None:
    extra = text.split("\n")[0].partition(",")[2]
    columns = Columns("at", **({} if not extra else {extra: _COLUMNS.get(extra, extra)}))
    trace = table(written(tmp_path, text), columns)
    assert len(arrivals(trace)) == kept
    assert [(line, what) for line, what, done, _ in odd(trace) if done == "left out"] == [told]


_COLUMNS: dict[str, Any] = {one: ColumnSum((one,)) for one in ("tasks", "task_s")}


def test_table_with_cr_line_ends_is_read(tmp_path: Path) -> None:
    trace = table(written(tmp_path, "at,name\r5,a\r6,b"), Columns("at", label="name"))
    assert [arrival.label for arrival in arrivals(trace)] == ["a", "b"]


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_table_is_detected(tmp_path: Path, code: str) -> None:
    path = written(tmp_path, ("at,name\n" + "5,a\n" * 40).encode(code))
    with pytest.raises(UsageError, match="is UTF-16, and only UTF-8 is read") as caught:
        arrivals(table(path, Columns("at")))
    assert "iconv" in caught.value.remedy


def test_column_names_are_printed_without_control_characters(tmp_path: Path) -> None:
    path = written(tmp_path, f"a\x1b[2J,{'b' * 1000}\n1,2\n")
    with pytest.raises(UsageError) as caught:
        arrivals(table(path, Columns("at")))
    assert caught.value.remedy.startswith(r"Its columns are: 'a\x1b[2J', 'bbb")
    assert len(caught.value.remedy) < 100


def test_counts_become_arrivals_within_their_intervals(tmp_path: Path) -> None:
    text = "t,n\n0,2\n60,0\n120,3.0\n240,1\n270,4\n330,x\n390,-1\n450,1\n"
    columns = Columns("t", count="n")
    trace = table(written(tmp_path, text), columns)
    found = [arrival.at_s for arrival in arrivals(trace)]
    assert found == sorted(found)
    spans = [(0, 60), (120, 180), (240, 270), (270, 330), (450, 510)]
    assert [sum(a <= at < b for at in found) for a, b in spans] == [2, 3, 1, 4, 1]
    assert len(found) == 11
    assert odd(trace) == [
        (4, "the next record is late", "nothing arrives in the gap", "120 s, not 60 s"),
        (5, "the next record is early", "its interval ends there", "30 s, not 60 s"),
        (6, "the next record is late", "nothing arrives in the gap", "180 s, not 60 s"),
        (7, "n is not a number", "left out", "'x'"),
        (8, "n is below 0", "left out", "-1.0"),
    ]


def test_counts_are_spread_evenly_and_sum_up_at_any_scale(tmp_path: Path) -> None:
    rows = "".join(f"{60 * n},{7}\n" for n in range(1000))
    path = written(tmp_path, f"t,n\n{rows}")
    few = arrivals(table(path, Columns("t", count="n", scale=0.01)))
    assert len(few) == 70
    gaps = [b.at_s - a.at_s for a, b in pairwise(few)]
    assert max(gaps) < 60 * 17
    many = [arrival.at_s % 60 for arrival in arrivals(table(path, Columns("t", count="n", every_s=60.0)))]
    assert len(many) == 7000
    quarters = [sum(a <= at < a + 15 for at in many) for a in (0, 15, 30, 45)]
    # The tolerance is four standard deviations for 1,750 of 7,000.
    assert all(abs(count - 1750) < 145 for count in quarters)


def test_length_of_a_single_interval_is_required(tmp_path: Path) -> None:
    path = written(tmp_path, "t,n\n0,2\n")
    with pytest.raises(UsageError, match="cannot be derived") as caught:
        arrivals(table(path, Columns("t", count="n")))
    assert "every: 5m" in caught.value.remedy
    assert len(arrivals(table(path, Columns("t", count="n", every_s=5.0)))) == 2
