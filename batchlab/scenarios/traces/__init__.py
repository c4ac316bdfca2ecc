"""Traces of arrivals that others have recorded: the Standard Workload Format, tables of text, and
JSON Lines. Every record becomes an arrival, or is reported as odd; none is dropped in silence.
"""

from __future__ import annotations

from batchlab.scenarios.traces.columns import RUNS, SWF, Columns, Take, check_unit
from batchlab.scenarios.traces.rows import OddKind, Reading, Row, said, summary
from batchlab.scenarios.traces.source import Trace, TraceFormat

__all__ = [
    "RUNS",
    "SWF",
    "Columns",
    "OddKind",
    "Reading",
    "Row",
    "Take",
    "Trace",
    "TraceFormat",
    "check_unit",
    "said",
    "summary",
]
