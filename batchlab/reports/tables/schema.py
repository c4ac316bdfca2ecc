"""Schema of a job's performance data: the columns of the tables, their types, and their meanings.

Invariant: columns can be added, but not removed or changed. A column keeps its name, type, and meaning, so that reports
of different versions can be read together. A newer column is NULL in older reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

VERSION = 1
"""Version of the schema. It grows only for a change that readers must know, not for a new column."""

USD = "DECIMAL(24,12)"
"""Type of amounts in US dollars. Sums are exact."""


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a table, with DuckDB's type.

    The suffix gives the unit: `_s` for seconds, `_usd` for US dollars, and `_bytes` for bytes. A moment (`…ed_s`,
    `at_s`) is in seconds since 1970 in UTC.
    """

    name: str
    type: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Table:
    """Table of a run, stored as one Parquet file. The columns of `key` identify a row."""

    name: str
    meaning: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.parquet"

    def select(self) -> str:
        """Return the columns in order, cast to their types, for a SELECT on any version."""
        return ", ".join(f'"{c.name}"::{c.type} AS "{c.name}"' for c in self.columns)


def _table(name: str, meaning: str, key: str, *columns: tuple[str, str, str]) -> Table:
    table_columns = tuple(Column(*column) for column in columns)
    return Table(name, meaning, tuple(key.split(", ")), (_JOB, *table_columns))


_JOB = Column("job", "VARCHAR", "the job's id")
_STAGE = ("stage", "VARCHAR", "the stage")
_POOL = ("pool", "VARCHAR", "the pool of instances")

JOBS = _table(
    "jobs",
    "the job as a whole",
    "job",
    ("schema_version", "INTEGER", "version of this schema"),
    ("name", "VARCHAR", "the job's name; several runs of one job file share it"),
    ("backend", "VARCHAR", "name of the backend on which the job ran, such as local or aws"),
    ("is_final", "BOOLEAN", "whether the job had ended when this was written"),
    ("state", "VARCHAR", "the job's state, such as SUCCEEDED"),
    ("reason", "VARCHAR", "reason of the state; empty without one"),
    ("rounds", "INTEGER", "1, plus 1 for each `job retry`"),
    ("priority", "INTEGER", "the job's priority"),
    ("tags", "VARCHAR", "the job's tags, as a JSON object"),
    ("submitted_s", "DOUBLE", "time of the submission"),
    ("started_s", "DOUBLE", "start of the first bundle"),
    ("ended_s", "DOUBLE", "end of the job; NULL while it runs"),
    ("took_s", "DOUBLE", "time from the submission, or from the start time of the job, to the end; of the last round"),
    ("planned", "BIGINT", "tasks of all planned stages"),
    ("succeeded", "BIGINT", "tasks that succeeded"),
    ("failed", "BIGINT", "tasks that failed for good"),
    ("cancelled", "BIGINT", "tasks that were canceled or can never run"),
    ("retried", "BIGINT", "failed attempts that were retried"),
    ("bundles", "BIGINT", "bundles with an outcome"),
    ("run_s", "DOUBLE", "total run time of succeeded tasks; equals the sum over `stages`"),
    ("failed_run_s", "DOUBLE", "total run time of failed attempts"),
    ("lost_slot_s", "DOUBLE", "slot time of runs that were lost with their instance"),
    ("cost_usd", USD, "cost at list prices; equals the sum of `cost`; NULL without prices"),
    ("prices", "VARCHAR", "source of the list prices, with region and day"),
    ("is_whole", "BOOLEAN", "whether the instance time was recorded since the job's start, and not derived"),
)

STAGES = _table(
    "stages",
    "one row per stage, in the job's order",
    "job, stage",
    _STAGE,
    ("position", "INTEGER", "position of the stage in the job, from 0"),
    _POOL,
    ("slots", "INTEGER", "slots per task"),
    ("after", "VARCHAR[]", "the stages that must end first"),
    ("planned", "BIGINT", "tasks of the stage; NULL until the stage is planned"),
    ("succeeded", "BIGINT", "tasks that succeeded"),
    ("failed", "BIGINT", "tasks that failed for good"),
    ("cancelled", "BIGINT", "tasks that were canceled or can never run"),
    ("retried", "BIGINT", "failed attempts that were retried"),
    ("bundles", "BIGINT", "bundles with an outcome"),
    ("run_s", "DOUBLE", "total run time of succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of failed attempts"),
    ("started_s", "DOUBLE", "start of the first bundle"),
    ("ended_s", "DOUBLE", "end of the last bundle"),
    ("cost_usd", USD, "cost of the stage: the sum of its rows in `cost`"),
)

TASKS = _table(
    "tasks",
    "one row per task, with its state in the last round",
    "job, stage, task",
    _STAGE,
    ("task", "BIGINT", "the task's index in its stage, from 0"),
    ("state", "VARCHAR", "SUCCEEDED, FAILED, CANCELLED; PLANNED while the job runs"),
    ("attempts", "INTEGER", "attempts in all rounds; 0 if the task never ran"),
    ("run_s", "DOUBLE", "run time of the last attempt; NULL if the task never ran"),
    ("failed_run_s", "DOUBLE", "total run time of the failed attempts"),
    ("wait_s", "DOUBLE", "time of the last attempt from ready to the start of its bundle"),
    ("ready_s", "DOUBLE", "time from which the first attempt could start"),
    ("started_s", "DOUBLE", "start of the last attempt's bundle"),
    ("ended_s", "DOUBLE", "end of the last attempt's bundle"),
    ("bundle", "VARCHAR", "the bundle of the last attempt"),
    ("worker", "VARCHAR", "the worker of the last attempt"),
    ("fingerprint", "VARCHAR", "fingerprint of the last failure if the state is FAILED; else NULL"),
)

ATTEMPTS = _table(
    "attempts",
    "one row per ended attempt of a task",
    "job, stage, task, round, attempt, bundle",
    _STAGE,
    ("task", "BIGINT", "the task's index in its stage"),
    ("round", "INTEGER", "0, plus 1 for each `job retry`"),
    ("attempt", "INTEGER", "number of the attempt in its round, from 1"),
    ("bundle", "VARCHAR", "the attempt's bundle"),
    ("worker", "VARCHAR", "the attempt's worker"),
    ("state", "VARCHAR", "SUCCEEDED or FAILED"),
    ("is_final", "BOOLEAN", "whether batchlab did not retry it by itself"),
    ("run_s", "DOUBLE", "run time of the attempt"),
    ("kind", "VARCHAR", "kind of the failure, such as exception, exit, timeout, or memory; else NULL"),
    ("error", "VARCHAR", "class of the exception, or a similar name; else NULL"),
    ("reason", "VARCHAR", "description of the failure, at most 500 characters; else NULL"),
    ("exit_code", "INTEGER", "exit code of a failed command; negative for a signal"),
    ("fingerprint", "VARCHAR", "hash that is equal for failures with the same cause"),
)

BUNDLES = _table(
    "bundles",
    "one row per planned bundle",
    "job, stage, bundle",
    _STAGE,
    ("bundle", "VARCHAR", "the bundle's id within its stage"),
    ("round", "INTEGER", "0, plus 1 for each `job retry`"),
    ("attempt", "INTEGER", "1, or more for a bundle of retried tasks"),
    ("state", "VARCHAR", "DONE, SPLIT (no task ended in it), CANCELLED, or PLANNED (no outcome)"),
    ("tasks", "BIGINT", "tasks of the bundle"),
    ("first_task", "BIGINT", "lowest index of its tasks"),
    ("last_task", "BIGINT", "highest index of its tasks"),
    ("source", "VARCHAR", "bundle of the previous stage whose results it uses; else NULL"),
    ("losses", "INTEGER", "earlier deliveries without an outcome"),
    ("worker", "VARCHAR", "worker that committed the outcome; NULL without an outcome"),
    ("execution", "VARCHAR", "the committed execution, which identifies files and log"),
    ("ready_s", "DOUBLE", "time from which the bundle could start"),
    ("started_s", "DOUBLE", "start of the bundle"),
    ("ended_s", "DOUBLE", "end of the bundle"),
    ("wait_s", "DOUBLE", "time from ready to start, at least 0"),
    ("took_s", "DOUBLE", "time from start to end"),
    ("run_s", "DOUBLE", "total run time of its succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of its failed attempts"),
    ("succeeded", "BIGINT", "its tasks that succeeded"),
    ("failed", "BIGINT", "its tasks that failed for good"),
    ("retried", "BIGINT", "its failed attempts that were retried"),
    ("cancelled", "BIGINT", "its tasks that were canceled"),
    ("slots", "INTEGER", "slots that it used while it ran"),
)

WORKERS = _table(
    "workers",
    "one row per worker that committed a bundle of the job, or was known while the job ran",
    "job, worker",
    ("worker", "VARCHAR", "id of the worker process"),
    ("instance", "VARCHAR", "instance of the worker; NULL if unknown"),
    ("pool", "VARCHAR", "pool of the worker; NULL if unknown"),
    ("slots", "INTEGER", "task slots of the worker; NULL if unknown"),
    ("first_s", "DOUBLE", "first message of the worker while the job ran"),
    ("last_s", "DOUBLE", "last message of the worker while the job ran"),
    ("bundles", "BIGINT", "committed bundles of this job"),
    ("tasks", "BIGINT", "attempts of this job on the worker"),
    ("busy_slot_s", "DOUBLE", "slot time of these bundles from start to end"),
    ("run_s", "DOUBLE", "total run time of tasks that succeeded on the worker"),
    ("failed_run_s", "DOUBLE", "total run time of attempts that failed on the worker"),
)

INSTANCES = _table(
    "instances",
    "one row per instance that existed while the job ran",
    "job, instance",
    ("instance", "VARCHAR", "the instance's id"),
    _POOL,
    ("type", "VARCHAR", "instance type; empty if all machines are equal"),
    ("zone", "VARCHAR", "availability zone; empty without zones"),
    ("market", "VARCHAR", "on-demand or spot"),
    ("launched_s", "DOUBLE", "launch time"),
    ("in_service_s", "DOUBLE", "time when it was first seen InService; NULL if never"),
    ("ended_s", "DOUBLE", "time when the fleet first did not list it; NULL while it exists"),
    ("boot_s", "DOUBLE", "time from the launch to InService"),
    ("state", "VARCHAR", "last seen lifecycle state"),
    ("note", "VARCHAR", "the fleet's reason for its end"),
    ("slots", "INTEGER", "task slots of the instance"),
)

SCALING = _table(
    "scaling",
    "one row per change of a pool's desired capacity while the job ran",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the change"),
    ("before", "INTEGER", "desired capacity before"),
    ("after", "INTEGER", "desired capacity after"),
    ("in_service", "INTEGER", "instances InService at this time"),
    ("backlog_tasks", "BIGINT", "waiting and running tasks of all jobs"),
    ("backlog_s", "DOUBLE", "estimated work in the backlog, in slot seconds"),
    ("reason", "VARCHAR", "reason of the change, as a sentence"),
)

QUEUES = _table(
    "queues",
    "the depth of each pool's queue over time, for all jobs",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the record"),
    ("step_s", "DOUBLE", "length of the time that the row covers"),
    ("visible", "BIGINT", "messages that a worker could receive; the maximum in the step"),
    ("in_flight", "BIGINT", "messages that workers hold; the maximum in the step"),
    ("delayed", "BIGINT", "delayed messages; the maximum in the step"),
    ("backlog_tasks", "BIGINT", "tasks of all jobs that had not ended; the maximum in the step"),
)

FLEET = _table(
    "fleet",
    "the fleet of each pool over time",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the record"),
    ("step_s", "DOUBLE", "length of the time that the row covers"),
    ("desired", "INTEGER", "desired capacity at the end of the step"),
    ("pending", "INTEGER", "booting instances at the end of the step"),
    ("in_service", "INTEGER", "instances InService at the end of the step"),
    ("terminating", "INTEGER", "terminating instances at the end of the step"),
    ("busy", "INTEGER", "instances with a bundle at the end of the step"),
    ("slots", "INTEGER", "slots of the instances InService"),
    ("busy_slots", "DOUBLE", "busy slots according to heartbeats; the mean of the step"),
)

REQUESTS = _table(
    "requests",
    "requests that S3 and SQS bill: the job's share, as a running total",
    "job, at_s",
    ("at_s", "DOUBLE", "time of the record; the last row has the job's total"),
    ("step_s", "DOUBLE", "length of the time that the row covers"),
    ("sqs", "DOUBLE", "requests to SQS, in units of 64 KiB"),
    ("sqs_empty", "DOUBLE", "of these, receives without a message"),
    ("s3_puts", "DOUBLE", "PUT, COPY, POST, and LIST requests"),
    ("s3_gets", "DOUBLE", "GET, HEAD, and all other requests"),
    ("s3_deletes", "DOUBLE", "DELETE requests, which are free"),
)

COST = _table(
    "cost",
    "the job's bill: its lines, split by stage where possible; the rows add up to the bill",
    "job, line, stage",
    ("line", "VARCHAR", "line of the bill, such as `compute, pool default`"),
    ("kind", "VARCHAR", "compute, wasted, idle, sqs, s3, or storage"),
    ("pool", "VARCHAR", "the pool of the line; NULL without one"),
    ("stage", "VARCHAR", "the stage; NULL for a cost that belongs to no single stage"),
    ("seconds", "DOUBLE", "billed instance seconds; NULL for requests and storage"),
    ("cost_usd", USD, "cost at list prices"),
    ("how", "VARCHAR", "calculation of the line"),
)

DUPLICATES = _table(
    "duplicates",
    "duplicate work and messages by stage and kind; a stage without duplicates has no row",
    "job, stage, kind",
    _STAGE,
    ("kind", "VARCHAR", "message, event, execution, or result; see docs/report-data.md"),
    ("seen", "BIGINT", "number of duplicates"),
    ("harmless", "BIGINT", "of these, duplicates that changed nothing"),
    ("harmful", "BIGINT", "of these, duplicates that gave a task a second result; must be 0"),
    ("wasted_slot_s", "DOUBLE", "slot time of the duplicate work"),
)

TABLES: tuple[Table, ...] = (
    *(JOBS, STAGES, TASKS, ATTEMPTS, BUNDLES, WORKERS, INSTANCES),
    *(SCALING, QUEUES, FLEET, REQUESTS, COST, DUPLICATES),
)
BY_NAME = {table.name: table for table in TABLES}


def types(*tables: str, names: Iterable[str], **others: str) -> dict[str, str]:
    """Return DuckDB's types of the columns `names` of these tables, and add the types of `others`.

    If several tables have a column, the first of these tables determines its type.
    """
    column_types = {column.name: column.type for table in reversed(tables) for column in BY_NAME[table].columns}
    return {**{name: column_types[name] for name in names}, **others}
