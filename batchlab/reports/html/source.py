"""Queries of the report's page on the tables of one run, and the formats of moments, shares, and untrusted text.

Invariants: DuckDB computes all figures of a page from the run's Parquet files. Untrusted text, such as names and logs,
cannot change how the surrounding text reads: non-printable characters become visible escapes, and long text is
shortened.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import UsageError
from batchlab.core.fair_share import DEFAULT_SHARE
from batchlab.reports.queries import store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Row = Mapping[str, Any]

MIN_SPAN_S = 0.001
"""Minimum duration of a run in seconds. The time axis of a shorter run would be empty."""

# The place of a bundle is the instance of the bundle's worker, or the worker if the worker's instance is unknown.
PLACED = """(
  SELECT b.stage, b.bundle, b.ready_s, b.started_s, b.ended_s, b.tasks, b.succeeded, b.failed,
         b.retried, b.run_s, coalesce(b.slots, 1) AS slots,
         coalesce(w.instance, b.worker, '') AS place
  FROM bundles b LEFT JOIN workers w ON w.job = b.job AND w.worker = b.worker
  WHERE b.job = $job AND b.started_s IS NOT NULL AND b.ended_s IS NOT NULL
)"""
"""SQL for the bundles that ran, each with its place, which is an instance or a worker."""

LEVELS = f"""
moves AS (
  SELECT place, t, sum(d) AS d FROM (
    SELECT place, started_s AS t, slots AS d FROM {PLACED}
    UNION ALL SELECT place, ended_s, -slots FROM {PLACED}
  ) GROUP BY place, t
), levels AS (
  SELECT place, t, sum(d) OVER w AS level, coalesce(lead(t) OVER w, t) - t AS lasts_s
  FROM moves WINDOW w AS (PARTITION BY place ORDER BY t)
)"""
"""SQL for a WITH clause that lists the numbers of busy slots of each place, with their start times and durations."""

# An instance counts as in service from its recorded time in service, or from the start of its first bundle if the
# bundle started earlier. If the number of an instance's slots is unknown, the largest number of busy slots is used.
PLACES = f"""(
  SELECT coalesce(i.instance, u.place) AS place, coalesce(i.pool, u.pool, '') AS pool,
         coalesce(i.slots, u.slots, u.most, 1)::INTEGER AS slots,
         coalesce(i.launched_s, u.first_s) AS launched_s,
         i.in_service_s, least(i.in_service_s, u.first_s) AS begin_s,
         CASE WHEN i.instance IS NULL THEN u.last_s
              ELSE greatest(coalesce(i.ended_s, $b), u.last_s) END AS end_s,
         coalesce(i.market, '') AS market, u.place IS NOT NULL AS used,
         i.instance IS NOT NULL AS is_known
  FROM (SELECT * FROM instances WHERE job = $job) i
  FULL JOIN (
    SELECT p.place, any_value(w.pool) AS pool, max(w.slots) AS slots, any_value(p.most) AS most,
           any_value(p.first_s) AS first_s, greatest(any_value(p.last_s), max(w.last_s)) AS last_s
    FROM (WITH {LEVELS}
          SELECT place, min(t) AS first_s, max(t) AS last_s, max(level) AS most
          FROM levels GROUP BY place) p
    LEFT JOIN workers w ON w.job = $job AND coalesce(w.instance, w.worker) = p.place
    GROUP BY p.place
  ) u ON u.place = i.instance
)"""
"""SQL for the instances, with the time in service of each instance, and whether the instance ran a part of the job.

`begin_s` is NULL for an instance that was never in service.
"""


def only_job(connection: DuckDBPyConnection) -> str:
    """Return the only job of an opened store. Raise UsageError unless the store has exactly one job."""
    jobs = [str(row[0]) for row in connection.execute("SELECT job FROM jobs").fetchall()]
    if len(jobs) != 1:
        raise UsageError(
            f"The folder holds {len(jobs)} runs, but a page has one.", remedy="Name the folder of one run."
        )
    return jobs[0]


class ReportRun:
    """One job of an opened store (`batchlab.reports.queries.store.open_store`).

    The constructor raises UsageError if the store does not have the job.
    """

    def __init__(self, connection: DuckDBPyConnection, job: str) -> None:
        self._connection = connection
        self.id = job
        rows = self.rows("SELECT * FROM jobs WHERE job = $job")
        if not rows:
            raise UsageError(f"The data does not contain the job {job!r}.", remedy="Name a job of the table `jobs`.")
        self.job: Row = rows[0]

    def rows(self, sql: str, **values: object) -> list[Row]:
        """Run a query and return its rows. In the query, `$job` is the job's id, and `$a` and `$b` are the start and
        end of the run.
        """
        parameters = {"job": self.id, **values}
        if "$a" in sql or "$b" in sql:
            parameters |= {"a": self.start_s, "b": self.end_s}
        used = {name: value for name, value in parameters.items() if f"${name}" in sql}
        return list(store.rows(self._connection, sql, used))

    def one(self, sql: str, **values: object) -> Row:
        """Run a query that always returns one row, and return the row."""
        (row,) = self.rows(sql, **values)
        return row

    @property
    def share(self) -> str:
        """Share that the job names, or "" for the default share and for data without a share."""
        name: str | None = self.job["share"]
        return "" if name in (None, DEFAULT_SHARE) else name or ""

    @cached_property
    def stages(self) -> Sequence[Row]:
        """Rows of the table of stages, in the order of the job's stages."""
        return self.rows("SELECT * FROM stages WHERE job = $job ORDER BY position, stage")

    @cached_property
    def looks(self) -> Mapping[str, str]:
        """CSS class of each stage's color."""
        return {row["stage"]: f"s{n % 8}" for n, row in enumerate(self.stages)}

    @cached_property
    def _edges(self) -> Row:
        return self.one(
            """SELECT min(started_s) AS started_s, max(ended_s) AS ended_s
               FROM bundles WHERE job = $job"""
        )

    @cached_property
    def start_s(self) -> float:
        """Start of the time axis: the submission, or the due time of a scheduled job."""
        job = self.job
        began_s: float | None = job["submitted_s"]
        if job["rounds"] == 1 and job["ended_s"] is not None and job["took_s"] is not None:
            began_s = job["ended_s"] - job["took_s"]
        first_s: float | None = self._edges["started_s"]
        if began_s is None:
            began_s = first_s if first_s is not None else 0.0
        return began_s if first_s is None else min(began_s, first_s)

    @cached_property
    def end_s(self) -> float:
        """End of the time axis: the end of the job or the end of the job's last recorded bundle, whichever is later."""
        ends = [self.job["ended_s"], self._edges["ended_s"]]
        known_ends = [end for end in ends if end is not None]
        return max(self.start_s + MIN_SPAN_S, *known_ends) if known_ends else self.start_s + MIN_SPAN_S

    @property
    def span_s(self) -> float:
        return self.end_s - self.start_s

    def over(self, table: str, begin: str, end: str, weight: str, by: str, bins: int, **values: object) -> list[Row]:
        """Return rows with `by`, `bin`, and `amount` for `bins` equal intervals of the run.

        `amount` is the sum of `weight` over the rows of `table`, as a mean over the interval. A row of `table` counts
        from the time `begin` to the time `end`. `table`, `begin`, `end`, `weight`, and `by` are SQL constants of this
        package, and `values` are parameters of the SQL. `by` may contain several columns.
        """
        return self.rows(
            f"""WITH there AS (
              SELECT {by}, ({weight})::DOUBLE AS weight,
                     greatest({begin}, $a) AS s, least({end}, $b) AS e
              FROM {table} WHERE {begin} < $b AND {end} > $a
            ), placed AS (
              SELECT *, unnest(range(
                greatest(0, least($n - 1, floor((s - $a) / $w)::BIGINT)),
                greatest(0, least($n - 1, floor((e - $a) / $w)::BIGINT)) + 1
              )) AS bin FROM there
            )
            SELECT {by}, bin, sum(weight * greatest(0, least(e, $a + (bin + 1) * $w)
                                                       - greatest(s, $a + bin * $w))) / $w AS amount
            FROM placed GROUP BY ALL ORDER BY ALL""",
            n=bins,
            w=self.span_s / bins,
            **values,
        )


_RIGHT_TO_LEFT = frozenset({"R", "AL", "AN"})
ISOLATE, END = "\u2068", "\u2069"


def visible(text: str, most: int = 200) -> str:
    """Return `text` as one line of at most `most` characters, with control characters as escapes.

    Characters that change the writing direction are also escaped. Right-to-left text is isolated, so that the
    surrounding words keep their order.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    line = line if len(line) <= most else f"{line[: most - 1]}…"
    if any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in line):
        return f"{ISOLATE}{line}{END}"
    return line


def visible_lines(text: str, most: int = 4000) -> str:
    """Return `text` with line breaks and tabs unchanged, and with other control characters as escapes.

    If the text is longer than `most` characters, keep the beginning of the text (a third of `most`) and the end (two
    thirds of `most`).
    """
    shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text.replace("\r\n", "\n"))
    if len(shown) <= most:
        return shown
    head, tail = shown[: most // 3], shown[-(most * 2 // 3) :]
    left_out = len(shown) - len(head) - len(tail)
    return f"{head}\n… {left_out:,} characters are left out …\n{tail}"


def moment(at_s: float | None) -> str:
    """Format an epoch time as a date and time in UTC, to the second."""
    if at_s is None:
        return "–"
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def offset(seconds: float, span_s: float) -> str:
    """Format `seconds` as the time since the run's start. The precision depends on the length `span_s` of the run."""
    if span_s < 100:
        return f"{seconds:.2f} s" if span_s < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if span_s < 3600:
        return f"{minutes}:{rest:02d} min"
    return f"{hours}:{minutes:02d}:{rest:02d} h"


def at(run: ReportRun, part: int, parts: int) -> str:
    """Format the end time of interval `part` of `parts` equal intervals of the run."""
    return offset((part + 1) * run.span_s / parts, run.span_s)


def share(part: float, whole: float) -> str:
    """Format a share as a percentage, such as `42%` or `<0.1%`. Only a full share is shown as 100%."""
    if not whole or not part:
        return "0%"
    per_cent = part / whole * 100
    if per_cent < 0.1:
        return "<0.1%"
    if 99.5 <= per_cent < 100:
        return f"{min(per_cent, 99.9):.1f}%"
    return f"{per_cent:.1f}%" if per_cent < 9.95 else f"{per_cent:.0f}%"


def adding_up(parts: Sequence[Decimal], decimals: int) -> list[Decimal]:
    """Round the parts to `decimals` decimals so that the rounded parts add up to the rounded sum.

    The parts with the largest remainders are rounded up.
    """
    unit = Decimal(1).scaleb(-decimals)
    down = [part.quantize(unit, ROUND_FLOOR) for part in parts]
    missing = int((sum(parts, Decimal(0)).quantize(unit) - sum(down, Decimal(0))) / unit)
    order = sorted(range(len(parts)), key=lambda k: parts[k] - down[k], reverse=True)
    for k in order[:missing]:
        down[k] += unit
    return down
