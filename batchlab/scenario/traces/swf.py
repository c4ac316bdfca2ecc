"""The Standard Workload Format of the Parallel Workloads Archive (version 2.2, swf.html there).

Lines that begin with ';' are the header and comments; every other line is one job of 18 fields,
with -1 where a value is unknown. Times are seconds and may be fractions; a run time of 0 is legal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from batchlab.scenario.model import Odd
from batchlab.scenario.traces.columns import SWF, Columns
from batchlab.scenario.traces.lines import lines
from batchlab.scenario.traces.moments import all_numbers, as_number
from batchlab.scenario.traces.rows import LEFT_OUT, Fields, Mapper, Reading, check, without_blanks
from batchlab.spec.units import shown

FIELDS = (
    "job",
    "submit",
    "wait",
    "run",
    "processors",
    "cpu",
    "memory",
    "requested_processors",
    "requested_time",
    "requested_memory",
    "status",
    "user",
    "group",
    "executable",
    "queue",
    "partition",
    "preceding",
    "think",
)
"""Names of the 18 fields, in order. memory and requested_memory are KB per processor."""

_UNKNOWN = -1.0
_PARTIAL = frozenset({"2", "3", "4"})
_RECORDS = re.compile(r";\s*(MaxRecords|MaxJobs)\s*:\s*(\d+)\s*", re.IGNORECASE)


def read(path: Path, columns: Columns = SWF) -> Reading:
    """UsageError where the file cannot be read or the columns are none of FIELDS."""
    odd: list[Odd] = []
    mapper = Mapper(path, columns, odd, unknown=_UNKNOWN)
    reader = _Reader(path, columns, mapper, odd)
    return mapper.reading(reader.records())


class _Reader:
    def __init__(self, path: Path, columns: Columns, mapper: Mapper, odd: list[Odd]) -> None:
        check(columns.used(), FIELDS, path)
        self._path = path
        self._mapper = mapper
        self._odd = odd
        self._used = frozenset(columns.used())
        self._needed = frozenset(columns.needed())
        self._promised: dict[str, tuple[int, int]] = {}

    def records(self) -> Iterator[Fields | None]:
        found = 0
        jobs: set[str] = set()
        for number, line in without_blanks(lines(self._path, self._odd), self._path, self._odd):
            if line.lstrip().startswith(";"):
                if match := _RECORDS.fullmatch(line.strip()):
                    self._promised[match[1].lower()] = (number, int(match[2]))
                continue
            found += 1
            yield self._record(number, line, jobs)
        # MaxRecords counts lines; MaxJobs does too where no job was swapped out.
        at, promised = self._promised.get("maxrecords") or self._promised.get("maxjobs", (0, found))
        if promised != found:
            self._mapper.note(
                at,
                "the header promises another number of records",
                "those that are there were read",
                f"{promised:,}, not {found:,}",
            )

    def _record(self, number: int, line: str, jobs: set[str]) -> Fields | None:
        parts = line.split()
        values = dict(zip(FIELDS, parts, strict=False))
        if len(parts) < len(FIELDS):
            enough = self._needed <= values.keys()
            done = "those that are there were read" if enough else LEFT_OUT
            self._mapper.note(number, "fewer than 18 fields", done, str(len(parts)))
            if not enough:
                return None
        elif len(parts) > len(FIELDS):
            self._mapper.note(
                number, "more than 18 fields", "the first 18 were read", str(len(parts))
            )
        if values.get("status") in _PARTIAL:
            self._mapper.note(
                number,
                "part of a job that was swapped out (status 2, 3 or 4)",
                "left out, since the job has a line of its own",
            )
            return None
        if parts[0] in jobs:
            self._mapper.note(number, "a job number that was there before", "kept", parts[0])
        jobs.add(parts[0])
        if not all_numbers(line):
            for name, value in values.items():
                if name not in self._used and as_number(value) is None:
                    self._mapper.note(number, f"{name} is no number", "not needed", shown(value))
        return Fields(number, values)
