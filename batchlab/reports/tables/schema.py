"""Schema of a job's performance data: the columns of the tables, their types, and their meanings.

Invariant: columns can be added, but not removed or changed. A column keeps its name, type, and meaning, so that reports
of different versions can be read together. A newer column is NULL in older reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

VERSION = 1
"""Version of the schema. The version grows only with a change that readers must support, and not with a new column."""

USD = "DECIMAL(24,12)"
"""Type of amounts in US dollars. Sums of amounts are exact."""


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a table, with DuckDB's type.

    The suffix of a column's name gives the unit: `_s` for seconds, `_usd` for US dollars, and `_bytes` for bytes. A
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
        """Return the SQL list of the table's columns, cast to their types, for a SELECT on data of any version."""
        return ", ".join(f'"{c.name}"::{c.type} AS "{c.name}"' for c in self.columns)


def _table(name: str, meaning: str, key: str, *columns: tuple[str, str, str]) -> Table:
    table_columns = tuple(Column(*column) for column in columns)
    return Table(name, meaning, tuple(key.split(", ")), (_JOB, *table_columns))


_JOB = Column("job", "VARCHAR", "id of the job")
_STAGE = ("stage", "VARCHAR", "name of the stage")
_POOL = ("pool", "VARCHAR", "name of the pool of instances")
_METRICS = (
    ("cpu_s", "DOUBLE", "CPU time, with the programs that the task waited for; NULL below a run time of 5 ms"),
    ("memory_bytes", "BIGINT", "peak of the resident memory; NULL below a run time of 5 ms"),
    ("input_bytes", "BIGINT", "size of the input with its files; NULL below a run time of 5 ms"),
    ("output_bytes", "BIGINT", "size of the result with its files; NULL below a run time of 5 ms"),
    ("input", "VARCHAR", "name of the first input file; NULL without a file or below a run time of 5 ms"),
)

JOBS = _table(
    "jobs",
    "one row for the whole job",
    "job",
    ("schema_version", "INTEGER", "version of the schema of these tables"),
    ("name", "VARCHAR", "name of the job"),
    ("backend", "VARCHAR", "backend on which the job ran, such as local or aws"),
    ("is_final", "BOOLEAN", "whether the job had ended when the report was written"),
    ("state", "VARCHAR", "state of the job, such as SUCCEEDED"),
    ("reason", "VARCHAR", "reason for the state, or empty"),
    ("rounds", "INTEGER", "1, plus 1 for each `job retry`"),
    ("priority", "INTEGER", "priority of the job"),
    ("tags", "VARCHAR", "tags of the job, as a JSON object"),
    ("owner", "VARCHAR", "name of the user that submitted the job"),
    ("share", "VARCHAR", "share of the job, or `default` if the job names no share"),
    ("dependencies", "VARCHAR[]", "earlier jobs that the job waited for, such as sums-0123456789:succeeded"),
    ("submitted_s", "DOUBLE", "time at which the job was submitted"),
    ("started_s", "DOUBLE", "start time of the first bundle"),
    ("ended_s", "DOUBLE", "end time of the job; NULL while the job runs"),
    ("took_s", "DOUBLE", "duration of the last round, from the submission or the job's later start to the end"),
    ("planned", "BIGINT", "number of tasks in all planned stages"),
    ("succeeded", "BIGINT", "number of tasks that succeeded"),
    ("failed", "BIGINT", "number of tasks that failed and are not retried"),
    ("cancelled", "BIGINT", "number of tasks that were canceled or can never run"),
    ("retried", "BIGINT", "number of failed attempts that were retried"),
    ("bundles", "BIGINT", "number of bundles that have an outcome"),
    ("run_s", "DOUBLE", "total run time of succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of failed attempts"),
    ("lost_slot_s", "DOUBLE", "slot time of runs that were lost with their instance"),
    ("cost_usd", USD, "cost at list prices; NULL if no prices are known"),
    ("prices", "VARCHAR", "source of the list prices, with the region and the date"),
    ("is_whole", "BOOLEAN", "whether the instance time was recorded since the start of the job, and not derived later"),
)

STAGES = _table(
    "stages",
    "one row per stage of the job, in the order of the stages",
    "job, stage",
    _STAGE,
    ("position", "INTEGER", "position of the stage in the job, from 0"),
    _POOL,
    ("slots", "INTEGER", "number of task slots that one task uses"),
    ("after", "VARCHAR[]", "names of the stages that this stage follows"),
    ("planned", "BIGINT", "number of tasks; NULL until the stage is planned"),
    ("succeeded", "BIGINT", "number of tasks that succeeded"),
    ("failed", "BIGINT", "number of tasks that failed and are not retried"),
    ("cancelled", "BIGINT", "number of tasks that were canceled or can never run"),
    ("retried", "BIGINT", "number of failed attempts that were retried"),
    ("bundles", "BIGINT", "number of bundles that have an outcome"),
    ("run_s", "DOUBLE", "total run time of succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of failed attempts"),
    ("started_s", "DOUBLE", "start time of the first bundle"),
    ("ended_s", "DOUBLE", "end time of the last bundle"),
    ("cost_usd", USD, "cost at list prices"),
)

_MENDED = (
    "mended_sha256",
    "VARCHAR",
    "SHA-256 of the mended input with which `job retry` ran the attempt; NULL for the first input",
)

TASKS = _table(
    "tasks",
    "one row per task of the job, with the task's state in the last round",
    "job, stage, task",
    _STAGE,
    ("task", "BIGINT", "index of the task in its stage, from 0"),
    ("state", "VARCHAR", "SUCCEEDED, FAILED, CANCELLED, or (not ended yet) PLANNED"),
    ("attempts", "INTEGER", "number of attempts in all rounds; 0 if the task never ran"),
    ("run_s", "DOUBLE", "run time of the last attempt; NULL if the task never ran"),
    ("failed_run_s", "DOUBLE", "total run time of failed attempts"),
    ("wait_s", "DOUBLE", "wait of the last attempt, from the time when it could start to the start of its bundle"),
    ("ready_s", "DOUBLE", "time from which the first attempt could start"),
    ("started_s", "DOUBLE", "start time of the last attempt's bundle"),
    ("ended_s", "DOUBLE", "end time of the last attempt's bundle"),
    ("bundle", "VARCHAR", "id of the last attempt's bundle"),
    ("worker", "VARCHAR", "id of the worker that ran the last attempt"),
    ("fingerprint", "VARCHAR", "fingerprint of the last failure; NULL unless the state is FAILED"),
    *_METRICS,
    _MENDED,
)

ATTEMPTS = _table(
    "attempts",
    "one row per attempt that has ended",
    "job, stage, task, round, attempt, bundle",
    _STAGE,
    ("task", "BIGINT", "index of the task in its stage, from 0"),
    ("round", "INTEGER", "0, plus 1 for each `job retry`"),
    ("attempt", "INTEGER", "number of the attempt in its round, from 1"),
    ("bundle", "VARCHAR", "id of the attempt's bundle"),
    ("worker", "VARCHAR", "id of the worker that ran the attempt"),
    ("state", "VARCHAR", "SUCCEEDED or FAILED"),
    ("is_final", "BOOLEAN", "whether no automatic retry followed the attempt"),
    ("run_s", "DOUBLE", "run time of the attempt"),
    ("kind", "VARCHAR", "kind of failure, such as exception, exit, timeout, or memory; NULL after success"),
    ("error", "VARCHAR", "class name of the exception, or a similar name of the failure; NULL after success"),
    ("reason", "VARCHAR", "description of the failure, with at most 500 characters; NULL after success"),
    ("exit_code", "INTEGER", "exit code of the failed command, or the negative number of the signal that ended it"),
    ("fingerprint", "VARCHAR", "hash that is equal for failures with the same cause"),
    *_METRICS,
    _MENDED,
)

BUNDLES = _table(
    "bundles",
    "one row per planned bundle",
    "job, stage, bundle",
    _STAGE,
    ("bundle", "VARCHAR", "id of the bundle within its stage"),
    ("round", "INTEGER", "0, plus 1 for each `job retry`"),
    ("attempt", "INTEGER", "number of the attempt that the tasks make: 1, or more for retried tasks"),
    ("state", "VARCHAR", "DONE, SPLIT (no task ended in the bundle), CANCELLED, or PLANNED (no outcome)"),
    ("tasks", "BIGINT", "number of tasks"),
    ("first_task", "BIGINT", "lowest index of its tasks"),
    ("last_task", "BIGINT", "highest index of its tasks"),
    (
        "source",
        "VARCHAR",
        "id of the bundle of the previous stage whose results this bundle uses; NULL if it uses several or none",
    ),
    ("losses", "INTEGER", "number of earlier deliveries without an outcome"),
    ("worker", "VARCHAR", "id of the worker that committed the outcome; NULL without an outcome"),
    ("execution", "VARCHAR", "id of the committed execution, which identifies its files and its log"),
    ("ready_s", "DOUBLE", "time from which the bundle could start"),
    ("started_s", "DOUBLE", "start time of the bundle"),
    ("ended_s", "DOUBLE", "end time of the bundle"),
    ("wait_s", "DOUBLE", "time from `ready_s` to `started_s`, at least 0"),
    ("took_s", "DOUBLE", "time from `started_s` to `ended_s`"),
    ("run_s", "DOUBLE", "total run time of succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of failed attempts"),
    ("succeeded", "BIGINT", "number of tasks that succeeded"),
    ("failed", "BIGINT", "number of tasks that failed and are not retried"),
    ("retried", "BIGINT", "number of failed attempts that were retried"),
    ("cancelled", "BIGINT", "number of tasks that were canceled"),
    ("slots", "INTEGER", "number of task slots that the bundle used"),
)

WORKERS = _table(
    "workers",
    "one row per worker that committed a bundle of the job, or that the manager knew while the job ran",
    "job, worker",
    ("worker", "VARCHAR", "id of the worker process"),
    ("instance", "VARCHAR", "id of the worker's instance; NULL if unknown"),
    ("pool", "VARCHAR", "name of the worker's pool; NULL if unknown"),
    ("slots", "INTEGER", "number of task slots; NULL if unknown"),
    ("first_s", "DOUBLE", "time of the first message while the job ran"),
    ("last_s", "DOUBLE", "time of the last message while the job ran"),
    ("bundles", "BIGINT", "number of committed bundles of the job"),
    ("tasks", "BIGINT", "number of task attempts of the job"),
    ("busy_slot_s", "DOUBLE", "slot time of the job's bundles"),
    ("run_s", "DOUBLE", "total run time of the job's succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of the job's failed attempts"),
)

INSTANCES = _table(
    "instances",
    "one row per instance that existed while the job ran",
    "job, instance",
    ("instance", "VARCHAR", "id of the instance"),
    _POOL,
    ("type", "VARCHAR", "EC2 type; empty if all instances of the backend are equal"),
    ("zone", "VARCHAR", "availability zone; empty if the backend does not have zones"),
    ("market", "VARCHAR", "on-demand or spot"),
    ("launched_s", "DOUBLE", "launch time"),
    ("in_service_s", "DOUBLE", "time at which the manager first saw the instance InService; NULL if never"),
    ("ended_s", "DOUBLE", "time at which the fleet first did not list the instance; NULL while it exists"),
    ("boot_s", "DOUBLE", "time from the launch to InService"),
    ("state", "VARCHAR", "last seen lifecycle state"),
    ("note", "VARCHAR", "the fleet's reason for the end of the instance"),
    ("slots", "INTEGER", "number of task slots"),
    ("image", "VARCHAR", "container image of the pool at the launch; empty if the pool does not have an image"),
)

SCALING = _table(
    "scaling",
    "one row per change of a pool's desired capacity while the job ran",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the change"),
    ("before", "INTEGER", "desired capacity before the change"),
    ("after", "INTEGER", "desired capacity after the change"),
    ("in_service", "INTEGER", "number of InService instances at the time of the change"),
    ("backlog_tasks", "BIGINT", "number of waiting and running tasks of all jobs in the pool"),
    ("backlog_s", "DOUBLE", "estimated work of the pool's waiting and running tasks, in slot seconds"),
    ("reason", "VARCHAR", "reason for the change, as a sentence"),
)

QUEUES = _table(
    "queues",
    "depth of each pool's queue over time, for all jobs",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the record"),
    ("step_s", "DOUBLE", "time that the row covers (a step)"),
    ("visible", "BIGINT", "maximum number of visible messages, which a worker could receive"),
    ("in_flight", "BIGINT", "maximum number of in-flight messages, which workers hold"),
    ("delayed", "BIGINT", "maximum number of delayed messages"),
    ("backlog_tasks", "BIGINT", "maximum number of tasks of all jobs that had not ended"),
)

FLEET = _table(
    "fleet",
    "size of each pool's fleet over time",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the record"),
    ("step_s", "DOUBLE", "time that the row covers (a step)"),
    ("desired", "INTEGER", "desired capacity at the end of the step"),
    ("pending", "INTEGER", "number of booting instances at the end of the step"),
    ("in_service", "INTEGER", "number of InService instances at the end of the step"),
    ("terminating", "INTEGER", "number of terminating instances at the end of the step"),
    ("busy", "INTEGER", "number of instances that ran a bundle at the end of the step"),
    ("slots", "INTEGER", "number of task slots of InService instances"),
    ("busy_slots", "DOUBLE", "mean number of busy task slots during the step, from the workers' heartbeats"),
)

REQUESTS = _table(
    "requests",
    "the job's share of the requests that AWS bills for S3 and SQS, as a running total",
    "job, at_s",
    ("at_s", "DOUBLE", "time of the record; the last row has the total of the job"),
    ("step_s", "DOUBLE", "time that the row covers (a step)"),
    ("sqs", "DOUBLE", "number of requests to SQS, counted in units of 64 KiB"),
    ("sqs_empty", "DOUBLE", "number of the requests to SQS that received no message"),
    ("s3_puts", "DOUBLE", "number of PUT, COPY, POST, and LIST requests to S3"),
    ("s3_gets", "DOUBLE", "number of GET, HEAD, and all other requests to S3"),
    ("s3_deletes", "DOUBLE", "number of DELETE requests to S3, which are free"),
)

COST = _table(
    "cost",
    "lines of the job's bill, split by stage if possible; the rows add up to the total",
    "job, line, stage",
    ("line", "VARCHAR", "name of the line, such as `compute, pool default`"),
    ("kind", "VARCHAR", "compute, wasted, idle, sqs, or s3"),
    ("pool", "VARCHAR", "name of the pool; NULL if the line belongs to no pool"),
    ("stage", "VARCHAR", "name of the stage; NULL if the cost belongs to no single stage"),
    ("seconds", "DOUBLE", "number of billed instance seconds; NULL for requests"),
    ("cost_usd", USD, "cost at list prices"),
    ("how", "VARCHAR", "calculation of the cost, as text"),
)

DUPLICATES = _table(
    "duplicates",
    "duplicate messages and executions by stage and kind; a row exists only for duplicates",
    "job, stage, kind",
    _STAGE,
    ("kind", "VARCHAR", "kind: message, event, execution, copy, original, or result (see above)"),
    ("seen", "BIGINT", "number of duplicates of this kind"),
    ("harmless", "BIGINT", "number of duplicates that changed nothing"),
    ("harmful", "BIGINT", "number of duplicates that gave a task a second result; must be 0"),
    ("wasted_slot_s", "DOUBLE", "slot time of the duplicate work"),
)

TABLES: tuple[Table, ...] = (
    *(JOBS, STAGES, TASKS, ATTEMPTS, BUNDLES, WORKERS, INSTANCES),
    *(SCALING, QUEUES, FLEET, REQUESTS, COST, DUPLICATES),
)
BY_NAME = {table.name: table for table in TABLES}


def types(*tables: str, names: Iterable[str], **others: str) -> dict[str, str]:
    """Return DuckDB's types of the columns `names` of the tables `tables`, and add the types in `others`.

    If several of the tables have a column, the first table with the column determines the type.
    """
    column_types = {column.name: column.type for table in reversed(tables) for column in BY_NAME[table].columns}
    return {**{name: column_types[name] for name in names}, **others}
