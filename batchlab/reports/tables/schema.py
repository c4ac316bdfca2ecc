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

    The suffix gives the unit: `_s` for seconds, `_usd` for US dollars, and `_bytes` for bytes. A
    moment (`…ed_s`, `at_s`) is in seconds since 1970 in UTC.
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
    ("schema_version", "INTEGER", "of these tables"),
    ("name", "VARCHAR", "the job's name; several runs of one job file share it"),
    ("backend", "VARCHAR", "name of the backend on which the job ran, such as local or aws"),
    ("is_final", "BOOLEAN", "whether it had ended when this was written"),
    ("state", "VARCHAR", "the job's state, such as SUCCEEDED"),
    ("reason", "VARCHAR", "why it ended so; empty where there is nothing to say"),
    ("rounds", "INTEGER", "1, and 1 more for each `job retry`"),
    ("priority", "INTEGER", "its priority"),
    ("tags", "VARCHAR", "its tags, as a JSON object"),
    ("submitted_s", "DOUBLE", "when it was submitted"),
    ("started_s", "DOUBLE", "when its first bundle began to run"),
    ("ended_s", "DOUBLE", "when it ended; NULL while it runs"),
    ("took_s", "DOUBLE", "from submission, or its start time, to its end; of its last round"),
    ("planned", "BIGINT", "tasks of all stages, as far as they are planned"),
    ("succeeded", "BIGINT", "of these, tasks that succeeded"),
    ("failed", "BIGINT", "tasks that failed for good"),
    ("cancelled", "BIGINT", "tasks that were cancelled, or can never come to be"),
    ("retried", "BIGINT", "attempts that failed and were followed by another"),
    ("bundles", "BIGINT", "bundles with an outcome"),
    ("run_s", "DOUBLE", "run time of succeeded tasks, summed; equals the stages' sum"),
    ("failed_run_s", "DOUBLE", "run time of failed attempts, summed"),
    ("lost_slot_s", "DOUBLE", "slot time of runs that went with their instance"),
    ("cost_usd", USD, "what it has cost at list prices; equals the sum of `cost`; NULL: no prices"),
    ("prices", "VARCHAR", "which list prices, of which region and day"),
    ("is_whole", "BOOLEAN", "instance time was counted from the job's start on, not derived"),
)

STAGES = _table(
    "stages",
    "one row per stage, in the job's order",
    "job, stage",
    _STAGE,
    ("position", "INTEGER", "0 for the first"),
    _POOL,
    ("slots", "INTEGER", "slots that a task takes"),
    ("after", "VARCHAR[]", "the stages it comes after"),
    ("planned", "BIGINT", "its tasks; NULL while it is not planned"),
    ("succeeded", "BIGINT", "tasks that succeeded"),
    ("failed", "BIGINT", "tasks that failed for good"),
    ("cancelled", "BIGINT", "tasks that were cancelled, or can never come to be"),
    ("retried", "BIGINT", "attempts that failed and were followed by another"),
    ("bundles", "BIGINT", "bundles with an outcome"),
    ("run_s", "DOUBLE", "run time of succeeded tasks, summed"),
    ("failed_run_s", "DOUBLE", "run time of failed attempts, summed"),
    ("started_s", "DOUBLE", "when its first bundle began to run"),
    ("ended_s", "DOUBLE", "when its last bundle ended"),
    ("cost_usd", USD, "its part of the cost: the rows of `cost` that name it"),
)

TASKS = _table(
    "tasks",
    "one row per task, as it stood in the last round",
    "job, stage, task",
    _STAGE,
    ("task", "BIGINT", "the task's index in its stage, from 0"),
    ("state", "VARCHAR", "SUCCEEDED, FAILED, CANCELLED; PLANNED while the job runs"),
    ("attempts", "INTEGER", "attempts in all rounds; 0 where it never ran"),
    ("run_s", "DOUBLE", "run time of its last attempt; NULL where it never ran"),
    ("failed_run_s", "DOUBLE", "run time of its failed attempts, summed"),
    ("wait_s", "DOUBLE", "of its last attempt: from ready to the start of its bundle"),
    ("ready_s", "DOUBLE", "when its first attempt could have started"),
    ("started_s", "DOUBLE", "when the bundle of its last attempt began to run"),
    ("ended_s", "DOUBLE", "when the bundle of its last attempt ended"),
    ("bundle", "VARCHAR", "the bundle of its last attempt"),
    ("worker", "VARCHAR", "the worker of its last attempt"),
    ("fingerprint", "VARCHAR", "of its last failure, where it has FAILED; else NULL"),
)

ATTEMPTS = _table(
    "attempts",
    "one row per attempt of a task that ran and ended",
    "job, stage, task, round, attempt, bundle",
    _STAGE,
    ("task", "BIGINT", "the task's index in its stage"),
    ("round", "INTEGER", "0, and 1 more for each `job retry`"),
    ("attempt", "INTEGER", "1 for the first of its round"),
    ("bundle", "VARCHAR", "the bundle it ran in"),
    ("worker", "VARCHAR", "the worker it ran on"),
    ("state", "VARCHAR", "SUCCEEDED or FAILED"),
    ("is_final", "BOOLEAN", "no retry followed by itself"),
    ("run_s", "DOUBLE", "its run time"),
    ("kind", "VARCHAR", "of the failure: exception, exit, timeout, memory, …; else NULL"),
    ("error", "VARCHAR", "the exception's class or the like; else NULL"),
    ("reason", "VARCHAR", "what went wrong, in a sentence of at most 500 characters; else NULL"),
    ("exit_code", "INTEGER", "of a command that failed; negative for a signal"),
    ("fingerprint", "VARCHAR", "the same for failures of one cause"),
)

BUNDLES = _table(
    "bundles",
    "one row per bundle that was planned",
    "job, stage, bundle",
    _STAGE,
    ("bundle", "VARCHAR", "the bundle's id within its stage"),
    ("round", "INTEGER", "0, and 1 more for each `job retry`"),
    ("attempt", "INTEGER", "1, and more where it holds tasks that are tried again"),
    ("state", "VARCHAR", "DONE, SPLIT (no task ended in it), CANCELLED, or PLANNED: no outcome"),
    ("tasks", "BIGINT", "tasks in it"),
    ("first_task", "BIGINT", "the lowest index"),
    ("last_task", "BIGINT", "the highest index"),
    ("source", "VARCHAR", "the bundle of the stage before whose results it takes; else NULL"),
    ("losses", "INTEGER", "earlier deliveries that had ended without an outcome"),
    ("worker", "VARCHAR", "who committed its outcome; NULL where there is none"),
    ("execution", "VARCHAR", "the execution that counts; names its files and its log"),
    ("ready_s", "DOUBLE", "when it could have started: cut, or due after what it follows from"),
    ("started_s", "DOUBLE", "when it began to run"),
    ("ended_s", "DOUBLE", "when it ended"),
    ("wait_s", "DOUBLE", "from ready to start, not below 0"),
    ("took_s", "DOUBLE", "from start to end"),
    ("run_s", "DOUBLE", "run time of its succeeded tasks"),
    ("failed_run_s", "DOUBLE", "run time of its failed attempts"),
    ("succeeded", "BIGINT", "tasks that succeeded in it"),
    ("failed", "BIGINT", "tasks that failed in it for good"),
    ("retried", "BIGINT", "attempts that failed in it and were followed by another"),
    ("cancelled", "BIGINT", "tasks that were cancelled in it"),
    ("slots", "INTEGER", "slots that it took while it ran"),
)

WORKERS = _table(
    "workers",
    "one row per worker that committed a bundle of the job, or was heard of while it ran",
    "job, worker",
    ("worker", "VARCHAR", "the worker's id, new at each start of the program"),
    ("instance", "VARCHAR", "its instance; NULL where nobody heard of it"),
    ("pool", "VARCHAR", "its pool; NULL where that is not known"),
    ("slots", "INTEGER", "tasks that it runs at once; NULL where nobody heard of it"),
    ("first_s", "DOUBLE", "first sign of it while the job ran"),
    ("last_s", "DOUBLE", "last sign of it while the job ran"),
    ("bundles", "BIGINT", "bundles of this job that it committed"),
    ("tasks", "BIGINT", "attempts of this job that it ran"),
    ("busy_slot_s", "DOUBLE", "slot time of these bundles, from start to end"),
    ("run_s", "DOUBLE", "run time of tasks that succeeded on it"),
    ("failed_run_s", "DOUBLE", "run time of attempts that failed on it"),
)

INSTANCES = _table(
    "instances",
    "one row per instance that was there while the job ran",
    "job, instance",
    ("instance", "VARCHAR", "the instance's id"),
    _POOL,
    ("type", "VARCHAR", "its type; empty where machines do not differ"),
    ("zone", "VARCHAR", "its availability zone; empty where there are none"),
    ("market", "VARCHAR", "on-demand or spot"),
    ("launched_s", "DOUBLE", "when it was launched"),
    ("in_service_s", "DOUBLE", "when it was first seen InService; NULL where it never was"),
    ("ended_s", "DOUBLE", "when the fleet first did not list it; NULL while it exists"),
    ("boot_s", "DOUBLE", "from launch to InService"),
    ("state", "VARCHAR", "its lifecycle state, as last seen"),
    ("note", "VARCHAR", "how it ended, as far as the fleet says"),
    ("slots", "INTEGER", "its task slots"),
)

SCALING = _table(
    "scaling",
    "one row per change of a pool's desired capacity while the job ran",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "when"),
    ("before", "INTEGER", "desired capacity before"),
    ("after", "INTEGER", "desired capacity after"),
    ("in_service", "INTEGER", "instances that were InService then"),
    ("backlog_tasks", "BIGINT", "tasks that waited or ran, of all jobs"),
    ("backlog_s", "DOUBLE", "the work in them, in slot seconds"),
    ("reason", "VARCHAR", "why, in words"),
)

QUEUES = _table(
    "queues",
    "the depth of each pool's queue over time, of all jobs",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "when it was looked at"),
    ("step_s", "DOUBLE", "the row stands for so long"),
    ("visible", "BIGINT", "messages that a worker could take; of the step the most"),
    ("in_flight", "BIGINT", "messages that workers hold; of the step the most"),
    ("delayed", "BIGINT", "messages that wait for their time; of the step the most"),
    ("backlog_tasks", "BIGINT", "tasks not yet ended, of all jobs; of the step the most"),
)

FLEET = _table(
    "fleet",
    "the fleet over time",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "when it was looked at"),
    ("step_s", "DOUBLE", "the row stands for so long"),
    ("desired", "INTEGER", "desired capacity, last in the step"),
    ("pending", "INTEGER", "instances that boot, last in the step"),
    ("in_service", "INTEGER", "instances InService, last in the step"),
    ("terminating", "INTEGER", "instances that leave, last in the step"),
    ("busy", "INTEGER", "instances that held a bundle, last in the step"),
    ("slots", "INTEGER", "slots of the instances InService"),
    ("busy_slots", "DOUBLE", "slots that ran something, as beats said; mean of the step"),
)

REQUESTS = _table(
    "requests",
    "requests that S3 and SQS bill, the job's share, summed up to each moment",
    "job, at_s",
    ("at_s", "DOUBLE", "when; the last row has the job's total"),
    ("step_s", "DOUBLE", "the row stands for so long"),
    ("sqs", "DOUBLE", "requests of SQS, in steps of 64 KiB"),
    ("sqs_empty", "DOUBLE", "of these, receives that brought nothing"),
    ("s3_puts", "DOUBLE", "PUT, COPY, POST and LIST"),
    ("s3_gets", "DOUBLE", "GET, HEAD and all other"),
    ("s3_deletes", "DOUBLE", "DELETE, which is free"),
)

COST = _table(
    "cost",
    "the job's bill: its lines, each split by stage where it has stages; the rows add up to it",
    "job, line, stage",
    ("line", "VARCHAR", "the bill's line, such as `compute, pool default`"),
    ("kind", "VARCHAR", "compute, wasted, idle, sqs, s3 or storage"),
    ("pool", "VARCHAR", "the pool, of a line that has one; else NULL"),
    ("stage", "VARCHAR", "the stage; NULL for what is no stage's"),
    ("seconds", "DOUBLE", "instance seconds that it pays for; NULL for requests and storage"),
    ("cost_usd", USD, "what it comes to at list prices"),
    ("how", "VARCHAR", "how the line was reckoned"),
)

DUPLICATES = _table(
    "duplicates",
    "work and messages that came twice, by stage and kind; stages without any have no row",
    "job, stage, kind",
    _STAGE,
    ("kind", "VARCHAR", "message, event, execution or result; see docs/report-data.md"),
    ("seen", "BIGINT", "how often it was seen"),
    ("harmless", "BIGINT", "of these, changed nothing"),
    ("harmful", "BIGINT", "of these, gave a task a second result; must be 0"),
    ("wasted_slot_s", "DOUBLE", "slot time that went into them"),
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
    known = {column.name: column.type for table in reversed(tables) for column in BY_NAME[table].columns}
    return {**{name: known[name] for name in names}, **others}
