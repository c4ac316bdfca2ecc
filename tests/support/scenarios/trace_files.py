"""Small trace files, and their jobs in a form that tests can compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

from batchlab.scenarios.model.values import Arrival
from batchlab.scenarios.traces.rows import SWF_COLUMNS, Columns, ColumnSum
from batchlab.scenarios.traces.source import Trace, TraceFormat

JOB = "{n} {at} -1 {run} 4 -1 -1 8 -1 -1 1 12 3 -1 0 -1 -1 -1"
LOG = Columns("at", tasks=ColumnSum(("size",), per=10), task_s=ColumnSum(("ms",), per=1000), label="name")
PROCESSORS = replace(SWF_COLUMNS, tasks=ColumnSum(("processors",)))


def job(n: int, at: float = 0, run: float = 5) -> str:
    return JOB.format(n=n, at=at, run=run)


def written(folder: Path, text: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def swf(path: Path, columns: Columns = SWF_COLUMNS) -> Trace:
    return Trace(template="j", path=path, format=TraceFormat.SWF, columns=columns)


def table(path: Path, columns: Columns, names: tuple[str, ...] = (), delimiter: str = "") -> Trace:
    return Trace(template="j", path=path, format=TraceFormat.TABLE, columns=columns, names=names, delimiter=delimiter)


def jsonl(path: Path, columns: Columns | None = None, template: str = "j") -> Trace:
    return Trace(template=template, path=path, format=TraceFormat.JSONL, columns=columns)


def arrivals(trace: Trace) -> list[Arrival]:
    return list(trace.arrivals(Random(1)))


def odd(trace: Trace) -> list[tuple[int, str, str, str]]:
    return [(one.line, one.what, one.done, one.detail) for one in trace.odd()]
