"""Traces of arrivals that others have recorded: the Standard Workload Format, tables of text, and
JSON Lines. Every record becomes an arrival, or is reported as odd; none is dropped in silence.
"""

from batchlab.scenario.traces.columns import RUNS, SWF, Columns, Take
from batchlab.scenario.traces.moments import check_unit
from batchlab.scenario.traces.odds import OddKind, said, summary
from batchlab.scenario.traces.rows import Reading, Row
from batchlab.scenario.traces.source import Trace, TraceFormat

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
