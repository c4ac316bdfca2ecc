"""Traces in the Standard Workload Format, in which every odd record is reported and the other records are read."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from batchlab.scenarios.model.values import Arrival
from batchlab.scenarios.traces.rows import SWF_COLUMNS, ColumnSum
from tests.support.scenarios.trace_files import JOB, PROCESSORS, arrivals, job, odd, swf, written


def test_swf_fields_become_a_job(tmp_path: Path) -> None:
    path = written(tmp_path, f"; Version: 2.2\n;\n{job(7, 100.5, 3.25)}\n{job(8, 160, 0)}\n")
    columns = replace(PROCESSORS, tenant="user")
    assert arrivals(swf(path, columns)) == [
        Arrival(0.0, "j", 4, 3.25, "7", "12"),
        Arrival(59.5, "j", 4, 0.0, "8", "12"),
    ]
    assert not swf(path, columns).odd()
    assert arrivals(swf(path))[0].tasks is None


def test_swf_gzip_is_detected_under_any_name(tmp_path: Path) -> None:
    text = f"{job(1)}\n{job(2)}\n".encode()
    several = gzip.compress(text) + gzip.compress(job(3, 9).encode())
    assert len(arrivals(swf(written(tmp_path, several)))) == 3
    assert len(arrivals(swf(written(tmp_path, text, "plain.gz")))) == 2


def test_swf_with_other_numbers_of_fields(tmp_path: Path) -> None:
    lines = [job(1), f"{job(2)} 1 2 3", "3 20 -1 5", "4 30", f"{job(5)} 9"]
    trace = swf(written(tmp_path, "\n".join(lines)))
    assert [arrival.label for arrival in arrivals(trace)] == ["1", "2", "5", "3"]
    assert odd(trace) == [
        (2, "more than 18 fields", "the first 18 were read", "21"),
        (3, "fewer than 18 fields", "those that are there were read", "4"),
        (4, "fewer than 18 fields", "left out", "2"),
        (5, "more than 18 fields", "the first 18 were read", "19"),
        (5, "earlier than the record before it", "put in order of time", ""),
    ]


def test_short_record_without_a_name_is_accepted(tmp_path: Path) -> None:
    path = written(tmp_path, "1 0 -1 5 2\n2 1 -1")
    trace = swf(path, replace(PROCESSORS, tenant="user"))
    assert arrivals(trace) == [Arrival(0.0, "j", 2, 5.0, "1", "")]
    assert [one.done for one in trace.odd()] == ["those that are there were read", "left out"]


def test_invalid_swf_run_times_are_skipped(tmp_path: Path) -> None:
    lines = [job(1, 0, -1), job(2, 1, -50), job(3, 2, 0), JOB.format(n=4, at=3, run="x"), job(5, -1)]
    trace = swf(written(tmp_path, "\n".join(lines)))
    assert [arrival.label for arrival in arrivals(trace)] == ["3"]
    assert odd(trace) == [
        (1, "run is unknown (-1)", "left out", ""),
        (2, "run is below 0", "left out", "-50.0"),
        (4, "run is not a number", "left out", "'x'"),
        (5, "submit is unknown (-1)", "left out", ""),
    ]


def test_invalid_swf_processor_counts_are_skipped(tmp_path: Path) -> None:
    lines = [job(1), job(2).replace(" 4 ", " -1 "), job(3).replace(" 4 ", " 0 ")]
    path = written(tmp_path, "\n".join(lines))
    assert [arrival.tasks for arrival in arrivals(swf(path, PROCESSORS))] == [4, 1]
    assert odd(swf(path, PROCESSORS)) == [
        (2, "processors is unknown (-1)", "left out", ""),
        (3, "processors is 0", "counted as one task", ""),
    ]
    asked = replace(SWF_COLUMNS, tasks=ColumnSum(("requested_processors",)))
    assert [arrival.tasks for arrival in arrivals(swf(path, asked))] == [8, 8, 8]


def test_swf_job_parts_duplicates_and_invalid_numbers(tmp_path: Path) -> None:
    part = job(1).replace(" 1 12 ", " 2 12 ")
    lines = [job(1), part, job(1), job(4).replace(" 12 ", " anna ")]
    trace = swf(written(tmp_path, "\n".join(lines)))
    assert [arrival.label for arrival in arrivals(trace)] == ["1", "1", "4"]
    assert odd(trace) == [
        (
            2,
            "part of a job that was swapped out (status 2, 3 or 4)",
            "left out, since the job has a line of its own",
            "",
        ),
        (3, "a repeated job number", "kept", "1"),
        (4, "user is not a number", "not needed", "'anna'"),
    ]
    assert trace.reading().records == 4


def test_blank_lines_at_the_end_are_nothing_and_between_records_odd(tmp_path: Path) -> None:
    trace = swf(written(tmp_path, f"\n{job(1)}\n  \n\n; a comment\n{job(2)}\r\n \n\n\n"))
    assert len(arrivals(trace)) == 2
    assert odd(trace) == [(at, "a blank line", "skipped", "") for at in (1, 3, 4)]


def test_a_header_that_promises_more(tmp_path: Path) -> None:
    trace = swf(written(tmp_path, f"; MaxJobs: 9\n; MaxRecords: 2000\n{job(1)}\n"))
    assert odd(trace) == [
        (2, "the header promises another number of records", "those that are there were read", "2,000, not 1")
    ]
    assert not swf(written(tmp_path, f"; MaxJobs: 9\n; MaxRecords: 1\n{job(1)}\n", "b")).odd()


ROWS = "".join(f"{job(n, n * 10, Random(n).randrange(10**6))}\n" for n in range(2000)).encode()
PACKED = gzip.compress(ROWS)
DAMAGED = "the file is damaged from here"
SUM = ("the file's checksum is wrong here", "what is before was read, and may be spoilt")
BEHIND = ("bytes that are no gzip follow its end", "left out")


def cut(whole: int, end: bytes) -> bytes:
    """Return the first `whole` bytes of the packed ROWS, followed by `end`."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(ROWS[:whole]) + packer.flush(zlib.Z_FULL_FLUSH) + end


@pytest.mark.parametrize("whole", [len(ROWS) // 3, len(ROWS)])
@pytest.mark.parametrize("end", [b"", b"\xff" * 400])
def test_rows_before_the_damage_of_a_gzip_file_are_read(tmp_path: Path, whole: int, end: bytes) -> None:
    trace = swf(written(tmp_path, cut(whole, end)))
    rows = ROWS[:whole].count(b"\n")
    assert [f"{arrival.task_s:.0f}" for arrival in arrivals(trace)] == [
        line.split()[3].decode() for line in ROWS.splitlines()[:rows]
    ]
    assert [one[:3] for one in odd(trace)] == [(rows + 1, DAMAGED, "left out")]


@pytest.mark.parametrize(
    ("data", "jobs", "told"),
    [
        (gzip.compress(ROWS[:-1]) + b"\0" * 70_000, 2000, None),
        (PACKED + b"\0" * 9 + gzip.compress(job(2001).encode()), 2001, None),
        (PACKED + b"\x1f", 2000, (2001, *BEHIND)),
        (gzip.compress(ROWS[:-1]) + b"\0\0and a note", 2000, (2001, *BEHIND)),
        (PACKED[:-8] + b"\1" * 8, 2000, (2001, *SUM)),
        (PACKED[:-8] + b"\1" * 8 + PACKED, 2000, (2001, *SUM)),
        (PACKED[:-4] + b"\1" * 4, 2000, (2001, *SUM)),
    ],
)
def test_data_after_a_gzip_file_is_handled(
    tmp_path: Path, data: bytes, jobs: int, told: tuple[int, str, str] | None
) -> None:
    trace = swf(written(tmp_path, data))
    assert len(arrivals(trace)) == jobs
    odds = [one[:3] for one in odd(trace) if "before" not in one[1]]
    assert odds == ([told] if told else [])


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, job(1).encode() + b"\n" + job(2).replace("12", "").encode() + b" \xff")
    trace = swf(path)
    assert len(arrivals(trace)) == 2
    assert [one.what for one in trace.odd()] == ["not UTF-8", "think is not a number"]
