"""One run's tables as the page asks for them.

Invariant: all figures of a page are answers of DuckDB over the run's Parquet; whoever asks the
same of the same files gets the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Row = Mapping[str, Any]

LEAST_S = 0.001
"""How long a run counts at the least, so that it has a time axis."""

# Whoever ran bundles without an instance that anybody heard of stands for one itself.
PLACED = """(
  SELECT b.stage, b.bundle, b.ready_s, b.started_s, b.ended_s, b.tasks, b.succeeded, b.failed,
         b.retried, b.run_s, coalesce(b.slots, 1) AS slots,
         coalesce(w.instance, b.worker, '') AS place
  FROM bundles b LEFT JOIN workers w ON w.job = b.job AND w.worker = b.worker
  WHERE b.job = $job AND b.started_s IS NOT NULL AND b.ended_s IS NOT NULL
)"""
"""Bundles that ran, and where."""

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
"""For a WITH: how many slots are busy at each place from each moment on, and for how long."""

# An instance is in service from when that was first seen; what it ran before that counts too. Where
# nobody knows how many slots it had, it had as many as were busy at once.
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
"""Instances, what they are, from when to when they were in service, and whether they ran any of
the job; `begin_s` is NULL for one that never was in service."""


def only_job(connection: DuckDBPyConnection) -> str:
    """The one job of an opened store; UsageError where it has more."""
    found = [str(row[0]) for row in connection.execute("SELECT job FROM jobs").fetchall()]
    if len(found) != 1:
        raise UsageError(
            f"That holds {len(found)} runs, and a page is of one.",
            remedy="Name the folder of one run.",
        )
    return found[0]


class Run:
    """One job of an opened store (`batchlab.reports.queries.store.opened`).

    Raise UsageError if the store does not have the job."""

    def __init__(self, connection: DuckDBPyConnection, job: str) -> None:
        self._connection = connection
        self.id = job
        found = self.rows("SELECT * FROM jobs WHERE job = $job")
        if not found:
            raise UsageError(
                f"There is no job {job!r} in this data.", remedy="Name one that `jobs` has."
            )
        self.job: Row = found[0]

    def rows(self, sql: str, **values: object) -> list[Row]:
        """What a query says; `$job` is the job's id, `$a` and `$b` begin and end of the run."""
        known = {"job": self.id, **values}
        if "$a" in sql or "$b" in sql:
            known |= {"a": self.start_s, "b": self.end_s}
        used = {name: value for name, value in known.items() if f"${name}" in sql}
        cursor = self._connection.execute(sql, used)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def one(self, sql: str, **values: object) -> Row:
        """The one row of a query that always has one."""
        (found,) = self.rows(sql, **values)
        return found

    @cached_property
    def stages(self) -> Sequence[Row]:
        """In the job's order."""
        return self.rows("SELECT * FROM stages WHERE job = $job ORDER BY position, stage")

    @cached_property
    def looks(self) -> Mapping[str, str]:
        """A class of the style sheet for each stage's colour."""
        return {row["stage"]: f"s{n % 8}" for n, row in enumerate(self.stages)}

    @cached_property
    def _edges(self) -> Row:
        return self.one(
            """SELECT min(started_s) AS started_s, max(ended_s) AS ended_s
               FROM bundles WHERE job = $job"""
        )

    @cached_property
    def start_s(self) -> float:
        """When the time axis begins: at submission, or when a scheduled job was due."""
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
        """When it ends: with the job, or with the last that is known of it."""
        ends = [self.job["ended_s"], self._edges["ended_s"]]
        known = [one for one in ends if one is not None]
        return max(self.start_s + LEAST_S, *known) if known else self.start_s + LEAST_S

    @property
    def span_s(self) -> float:
        return self.end_s - self.start_s

    def over(
        self,
        table: str,
        begin: str,
        end: str,
        weight: str,
        by: str,
        bins: int,
        **values: object,
    ) -> list[Row]:
        """Rows (`by`, `bin`, `amount`): of `bins` equal parts of the run, the mean of the sum of
        `weight` over the rows of `table`, each there from `begin` to `end`. All five are SQL of
        ours with `values` for its parameters; `by` may be several columns."""
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
