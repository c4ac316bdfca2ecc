"""Construction of a job's tables with DuckDB, from the data that `gather` read.

Invariants: the gathered data alone determines the contents of the files. A file has the columns of its table in the
order of the schema and with the types of the schema. The metadata of a file contains the schema version. Memory is
bounded, because DuckDB writes larger data to the scratch folder. DuckDB uses one core, so that the manager has the
other cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.core.fair_share import share_of
from batchlab.core.model import Pool
from batchlab.core.pricing.bill import PoolFacts, StageUse
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.users import owner_name
from batchlab.reports import costs
from batchlab.reports.queries.store import sections
from batchlab.reports.tables.gather import JobData
from batchlab.reports.tables.schema import BY_NAME, TABLES, VERSION, Table, types
from batchlab.reports.tables.staging import FILES, plain

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROW_GROUP_ROWS = 122_880
"""Number of rows in a row group of a Parquet file. DuckDB reads a row group on one core."""


def save(connection: DuckDBPyConnection, table: Table, query: str, path: Path, *, ordered: bool = False) -> int:
    """Write the rows of a query to a Parquet file and return the number of rows.

    The rows are sorted by the table's key. If `ordered` is True, the query already sorts the rows. The query must
    return every column of the table, in any order. DuckDB raises duckdb.Error if a column is missing or if a value does
    not have the column's type.
    """
    order = "" if ordered else "ORDER BY " + ", ".join(f'"{name}"' for name in table.key)
    target = str(path).replace("'", "''")
    connection.execute(
        f"COPY (SELECT {table.select()} FROM ({query}) {order}) "  # noqa: S608 - own queries
        f"TO '{target}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP_ROWS}, "
        f"KV_METADATA {{batchlab_schema: '{VERSION}'}})"
    )
    row = connection.fetchone()
    return int(row[0]) if row else 0


MAX_MEMORY = "512MB"
MAX_LINE_BYTES = 64 * 1024 * 1024
_STEPS = Path(__file__).with_name("tables.sql")

_JOB = types(
    "jobs",
    names=(
        *("job", "schema_version", "name", "backend", "is_final", "state", "reason", "priority", "tags", "owner"),
        *("share", "dependencies", "submitted_s", "ended_s", "lost_slot_s", "is_whole"),
    ),
    round="INTEGER",
    began_s="DOUBLE",
)
_STAGE = types("stages", names=("stage", "position", "pool", "slots", "after"), is_planned="BOOLEAN")
_COST = types("cost", names=("line", "kind", "pool", "stage", "seconds", "cost_usd", "how"))
_POOL_POINT = (
    *("at_s", "step_s", "visible", "in_flight", "delayed", "backlog_tasks"),
    *("desired", "pending", "in_service", "terminating", "busy", "slots", "busy_slots"),
)
_RECORDED = {
    "scaling": ("pool", "at_s", "before", "after", "in_service", "backlog_tasks", "backlog_s", "reason"),
    "instances": (
        *("instance", "pool", "type", "zone", "market", "launched_s", "in_service_s", "ended_s", "state", "note"),
        *("slots", "image"),
    ),
    "workers": ("worker", "instance", "pool", "slots", "first_s", "last_s"),
    "requests": ("at_s", "step_s", "sqs", "sqs_empty", "s3_puts", "s3_gets", "s3_deletes"),
    "duplicates": ("stage", "kind", "seen", "harmless", "harmful", "wasted_slot_s"),
}
"""Columns of the recorded data, in the order of the values in a recorded row."""
_VALUES = len(_RECORDED["instances"]) - 1
"""Number of recorded values of an instance."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Facts about a grid that the grid's bucket does not contain: backend, pools, poll intervals, and prices.

    `pools` is used for pools without recorded data. If `book` is None, the tables do not contain costs.
    """

    backend: str
    pools: Sequence[Pool]
    pace: Pace
    book: PriceBook | None = None


class TableBuilder:
    """Builder of one job's tables. `scratch` contains the staged files."""

    def __init__(self, gathered: JobData, setting: Setting, scratch: Path) -> None:
        import duckdb

        self._gathered = gathered
        self._setting = setting
        self._scratch = scratch
        self._steps = sections(_STEPS.read_text())
        self._connection: DuckDBPyConnection = duckdb.connect(str(scratch / "work.duckdb"))

    def interrupt(self) -> None:
        """Stop the running query as soon as possible. Another thread may call `interrupt` at any time."""
        import duckdb

        with suppress(duckdb.ConnectionException):
            self._connection.interrupt()

    def run(self, folder: Path) -> dict[str, int]:
        """Write every table into `folder` and return the number of rows of each table.

        Raise duckdb.Error or OSError if a table cannot be written.
        """
        try:
            return self._run(folder)
        finally:
            self._connection.close()

    def _run(self, folder: Path) -> dict[str, int]:
        do = self._connection.execute
        do("SET threads = 1")
        do(f"SET memory_limit = '{MAX_MEMORY}'")
        for name, columns in FILES.items():
            self._read(name, columns, self._scratch / f"{name}.ndjson")
        self._facts()
        for step in ("done", "tries", "last_failures", "stopped", "others"):
            do(self._steps[step])
        if self._gathered.ending is None:
            self._follow_losses()
        do(self._steps["good"])
        rows = {"tasks": self._save_tasks(folder), "attempts": self._save(folder, "attempts")}
        tasks = str(folder / BY_NAME["tasks"].file).replace("'", "''")
        do(f"CREATE VIEW written_tasks AS SELECT * FROM read_parquet('{tasks}')")  # noqa: S608
        do(self._steps["stage_sums"])
        self._check_seen()
        prices = self._cost()
        do("ALTER TABLE job ADD COLUMN prices VARCHAR")
        do("UPDATE job SET prices = ?", [prices])
        for table in TABLES:
            if table.name not in rows:
                rows[table.name] = self._save(folder, table.name)
        return rows

    def _save(self, folder: Path, name: str) -> int:
        table = BY_NAME[name]
        query, path = self._steps[f"table_{name}"], folder / table.file
        return save(self._connection, table, query, path, ordered=name == "attempts")

    def _save_tasks(self, folder: Path) -> int:
        query, table = self._steps["table_tasks"], BY_NAME["tasks"]
        if self._gathered.results_twice:
            # A task must never have two results. If a task has two results, the table still contains the task only
            # once.
            query = f"SELECT DISTINCT ON (stage, task) * FROM ({query})"  # noqa: S608 - own queries
        return save(self._connection, table, query, folder / table.file, ordered=True)

    # --- Initial tables --------------------------------------------------------------------------

    def _read(self, name: str, columns: Mapping[str, str], path: Path) -> None:
        types = ", ".join(f"'{column}': '{type_}'" for column, type_ in columns.items())
        self._connection.execute(
            f"CREATE TABLE {name} AS SELECT * FROM read_json(?, "  # noqa: S608 - own names
            f"format = 'newline_delimited', columns = {{{types}}}, "
            f"maximum_object_size = {MAX_LINE_BYTES})",
            [str(path)],
        )

    def _fill(self, name: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Create the table `name` from a small number of rows."""
        path = self._scratch / f"{name}.ndjson"
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, default=str) + "\n")
        self._read(name, columns, path)

    def _facts(self) -> None:
        gathered, job = self._gathered, self._gathered.job
        ending = gathered.ending
        lost_slot_s = sum(gathered.account.lost_s.values()) if gathered.account else 0.0
        row = {
            "job": job.id,
            "schema_version": VERSION,
            "name": job.name,
            "backend": self._setting.backend,
            "is_final": ending is not None,
            "state": ending.state.value if ending else "RUNNING",
            "reason": plain(ending.reason) if ending else "",
            "round": gathered.round,
            "priority": job.priority,
            "tags": json.dumps(dict(job.tags), ensure_ascii=False),
            "owner": owner_name(job.owner),
            "share": share_of(job),
            "dependencies": list(map(str, job.after)),
            "submitted_s": job.submitted_s,
            "began_s": gathered.began_s,
            "ended_s": ending.ended_s if ending else None,
            "lost_slot_s": lost_slot_s,
            "is_whole": gathered.account is not None and gathered.account.is_whole,
        }
        self._fill("job", _JOB, [row])
        stages = (
            {
                "stage": stage.name,
                "position": n,
                "pool": stage.pool,
                "slots": stage.slots,
                "after": list(stage.after),
                "is_planned": stage.name in gathered.planned,
            }
            for n, stage in enumerate(job.stages)
        )
        self._fill("stage_facts", _STAGE, stages)

    def _follow_losses(self) -> None:
        """In a running job, mark a task as canceled if the task that it follows has failed or was canceled."""
        for stage in self._gathered.job.stages:
            if stage.chained:
                self._connection.execute(
                    "UPDATE others SET state = 'CANCELLED' FROM others up "
                    "WHERE others.stage = $stage AND up.stage = $source AND up.task = others.task "
                    "AND others.state = 'PLANNED' AND up.state IN ('FAILED', 'CANCELLED')",
                    {"stage": stage.name, "source": stage.after[0]},
                )

    # --- Data recorded while the job ran ---------------------------------------------------------

    def _check_seen(self) -> None:
        record = self._gathered.record
        self._fill(
            "seen_pools",
            types("queues", "fleet", names=("pool", *_POOL_POINT)),
            (
                {"pool": name, **dict(zip(_POOL_POINT, point, strict=True))}
                for name, pool in record["pools"].items()
                for point in pool["series"]
            ),
        )
        recorded: dict[str, Iterable[Sequence[Any]]] = {
            "scaling": record["scaling"],
            # Managers of earlier releases did not record the image.
            "instances": (
                [name, *values, *[""] * (_VALUES - len(values))] for name, values in record["instances"].items()
            ),
            "workers": ([name, *values] for name, values in record["workers"].items()),
            "requests": self._requests(),
            "duplicates": self._duplicates(),
        }
        for table, names in _RECORDED.items():
            rows = (dict(zip(names, row, strict=True)) for row in recorded[table])
            self._fill(f"seen_{table}", types(table, names=names), rows)

    def _requests(self) -> list[Sequence[Any]]:
        """Return the recorded numbers of requests. If the job has an account, the last row has the total from the
        account.
        """
        rows: list[Sequence[Any]] = list(self._gathered.record["requests"])
        if account := self._gathered.account:
            requests = account.requests
            total = [requests.sqs, requests.sqs_empty, requests.s3_puts, requests.s3_gets, requests.s3_deletes]
            ending = self._gathered.ending
            if not rows or list(rows[-1][2:]) != total:
                last_s = rows[-1][0] if rows else self._gathered.began_s
                rows.append([max(last_s, ending.ended_s if ending else last_s), 0.0, *total])
        return rows

    def _duplicates(self) -> list[Sequence[Any]]:
        duplicates: list[Sequence[Any]] = [
            [stage, kind, int(count), int(count), 0, slot_s]
            for stage, kinds in self._gathered.record["duplicates"].items()
            for kind, (count, slot_s) in kinds.items()
        ]
        twice = self._gathered.results_twice
        return [*duplicates, *([stage, "result", n, 0, n, 0.0] for stage, n in twice.items())]

    # --- The bill --------------------------------------------------------------------------------

    def _cost(self) -> str | None:
        """Create the table of the bill's lines. Return the name of the price list, or None without a price book."""
        prices, rows = None, []
        if self._setting.book:
            bill, parts = costs.parts(
                self._uses(), self._gathered.account, self._pools(), self._setting.book, pace=self._setting.pace
            )
            prices = bill.prices
            rows = [{**asdict(part), "cost_usd": f"{part.cost_usd:f}"} for part in parts]
        self._fill("cost_lines", _COST, rows)
        return prices

    def _uses(self) -> list[costs.StageUsage]:
        rows = self._connection.execute(
            "SELECT stage, pool, run_s, slots, failed_slot_s, bundles FROM stage_sums ORDER BY position"
        ).fetchall()
        return [
            costs.StageUsage(StageUse(stage, pool, run_s, slots), failed_slot_s, bundles)
            for stage, pool, run_s, slots, failed_slot_s, bundles in rows
        ]

    def _pools(self) -> dict[str, PoolFacts]:
        facts = {pool.name: PoolFacts(pool.slots, pool.instance_type) for pool in self._setting.pools}
        for name, pool in self._gathered.record["pools"].items():
            facts[name] = PoolFacts(pool["slots"], pool["type"])
        return facts
