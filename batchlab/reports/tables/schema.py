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
    (
        "cpu_s",
        "DOUBLE",
        "CPU time of the last attempt, with the programs that it waited for; NULL for attempts of less than 5 ms",
    ),
    ("memory_bytes", "BIGINT", "peak of the resident memory during the attempt; NULL for attempts of less than 5 ms"),
    ("input_bytes", "BIGINT", "size of the task's input with its files; NULL for attempts of less than 5 ms"),
    ("output_bytes", "BIGINT", "size of the task's result with its files; NULL for attempts of less than 5 ms"),
    ("input", "VARCHAR", "name of the task's first input file; NULL if the task does not read a file, or was short"),
)

JOBS = _table(
    "jobs",
    "the table has one row for the whole job",
    "job",
    ("schema_version", "INTEGER", "version of the schema of these tables"),
    ("name", "VARCHAR", "name of the job, which all runs of a job file share"),
    ("backend", "VARCHAR", "name of the backend on which the job ran, such as local or aws"),
    ("is_final", "BOOLEAN", "whether the job had ended when the report was written"),
    ("state", "VARCHAR", "state of the job, such as SUCCEEDED"),
    ("reason", "VARCHAR", "reason for the job's state; empty if the state does not have a reason"),
    ("rounds", "INTEGER", "number of rounds of the job: 1, plus 1 for each `job retry`"),
    ("priority", "INTEGER", "priority of the job"),
    ("tags", "VARCHAR", "tags of the job, as a JSON object"),
    ("submitted_s", "DOUBLE", "time at which the job was submitted"),
    ("started_s", "DOUBLE", "start time of the job's first bundle"),
    ("ended_s", "DOUBLE", "end time of the job; NULL while the job runs"),
    (
        "took_s",
        "DOUBLE",
        "duration of the job's last round, from the submission or the job's start time to the end of the job",
    ),
    ("planned", "BIGINT", "number of tasks in all planned stages of the job"),
    ("succeeded", "BIGINT", "number of the job's tasks that succeeded"),
    ("failed", "BIGINT", "number of the job's tasks that failed and are not retried"),
    ("cancelled", "BIGINT", "number of the job's tasks that were canceled or can never run"),
    ("retried", "BIGINT", "number of the job's failed attempts that were retried"),
    ("bundles", "BIGINT", "number of the job's bundles that have an outcome"),
    ("run_s", "DOUBLE", "total run time of the job's succeeded tasks, which equals the sum over the rows of `stages`"),
    ("failed_run_s", "DOUBLE", "total run time of the job's failed attempts"),
    ("lost_slot_s", "DOUBLE", "slot time of the job's runs that were lost with their instance"),
    (
        "cost_usd",
        USD,
        "cost of the job at list prices, which equals the sum over the rows of `cost`; NULL if no prices are known",
    ),
    ("prices", "VARCHAR", "source of the list prices, with the region and the date"),
    (
        "is_whole",
        "BOOLEAN",
        "whether the instance time was recorded since the start of the job; if false, the "
        "instance time was derived later",
    ),
)

STAGES = _table(
    "stages",
    "the table has one row per stage of the job, in the order of the stages",
    "job, stage",
    _STAGE,
    ("position", "INTEGER", "position of the stage in the job, counted from 0"),
    _POOL,
    ("slots", "INTEGER", "number of task slots that one task of the stage uses"),
    ("after", "VARCHAR[]", "names of the stages that this stage follows"),
    ("planned", "BIGINT", "number of tasks of the stage; NULL until the stage is planned"),
    ("succeeded", "BIGINT", "number of the stage's tasks that succeeded"),
    ("failed", "BIGINT", "number of the stage's tasks that failed and are not retried"),
    ("cancelled", "BIGINT", "number of the stage's tasks that were canceled or can never run"),
    ("retried", "BIGINT", "number of the stage's failed attempts that were retried"),
    ("bundles", "BIGINT", "number of the stage's bundles that have an outcome"),
    ("run_s", "DOUBLE", "total run time of the stage's succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of the stage's failed attempts"),
    ("started_s", "DOUBLE", "start time of the stage's first bundle"),
    ("ended_s", "DOUBLE", "end time of the stage's last bundle"),
    ("cost_usd", USD, "cost of the stage, which equals the sum over the stage's rows in `cost`"),
)

TASKS = _table(
    "tasks",
    "the table has one row per task of the job, with the task's state in the last round",
    "job, stage, task",
    _STAGE,
    ("task", "BIGINT", "index of the task in its stage, counted from 0"),
    (
        "state",
        "VARCHAR",
        "state of the task: SUCCEEDED, FAILED, or CANCELLED; PLANNED while the job runs and the task has not ended",
    ),
    ("attempts", "INTEGER", "number of attempts of the task in all rounds; 0 if the task never ran"),
    ("run_s", "DOUBLE", "run time of the task's last attempt; NULL if the task never ran"),
    ("failed_run_s", "DOUBLE", "total run time of the task's failed attempts"),
    (
        "wait_s",
        "DOUBLE",
        "waiting time of the task's last attempt, from the time when the attempt could start to "
        "the start of its bundle",
    ),
    ("ready_s", "DOUBLE", "time from which the task's first attempt could start"),
    ("started_s", "DOUBLE", "start time of the bundle of the task's last attempt"),
    ("ended_s", "DOUBLE", "end time of the bundle of the task's last attempt"),
    ("bundle", "VARCHAR", "id of the bundle of the task's last attempt"),
    ("worker", "VARCHAR", "id of the worker that ran the task's last attempt"),
    ("fingerprint", "VARCHAR", "fingerprint of the task's last failure; NULL if the task's state is not FAILED"),
    *_METRICS,
)

ATTEMPTS = _table(
    "attempts",
    "the table has one row per attempt that has ended",
    "job, stage, task, round, attempt, bundle",
    _STAGE,
    ("task", "BIGINT", "index of the task in its stage, counted from 0"),
    ("round", "INTEGER", "round of the attempt: 0 in the first round, plus 1 for each `job retry`"),
    ("attempt", "INTEGER", "number of the attempt in its round, counted from 1"),
    ("bundle", "VARCHAR", "id of the attempt's bundle"),
    ("worker", "VARCHAR", "id of the worker that ran the attempt"),
    ("state", "VARCHAR", "state of the attempt: SUCCEEDED or FAILED"),
    ("is_final", "BOOLEAN", "whether no automatic retry followed the attempt"),
    ("run_s", "DOUBLE", "run time of the attempt"),
    (
        "kind",
        "VARCHAR",
        "kind of the attempt's failure, such as exception, exit, timeout, or memory; NULL if the attempt succeeded",
    ),
    (
        "error",
        "VARCHAR",
        "class name of the exception that the attempt raised, or a similar name of its failure; "
        "NULL if the attempt succeeded",
    ),
    (
        "reason",
        "VARCHAR",
        "description of the attempt's failure, with at most 500 characters; NULL if the attempt succeeded",
    ),
    (
        "exit_code",
        "INTEGER",
        "exit code of the command of a failed attempt; the negative number of the signal if a signal ended the command",
    ),
    (
        "fingerprint",
        "VARCHAR",
        "fingerprint of the attempt's failure: a hash that is equal for failures with the same cause",
    ),
    *_METRICS,
)

BUNDLES = _table(
    "bundles",
    "the table has one row per planned bundle",
    "job, stage, bundle",
    _STAGE,
    ("bundle", "VARCHAR", "id of the bundle within its stage"),
    ("round", "INTEGER", "round of the bundle: 0 in the first round, plus 1 for each `job retry`"),
    (
        "attempt",
        "INTEGER",
        "number of the attempt that the bundle's tasks make: 1, or more if the bundle has retried tasks",
    ),
    (
        "state",
        "VARCHAR",
        "state of the bundle: DONE, SPLIT (no task ended in the bundle), CANCELLED, or PLANNED "
        "(the bundle has no outcome)",
    ),
    ("tasks", "BIGINT", "number of tasks in the bundle"),
    ("first_task", "BIGINT", "lowest index of the bundle's tasks"),
    ("last_task", "BIGINT", "highest index of the bundle's tasks"),
    (
        "source",
        "VARCHAR",
        "id of the bundle of the previous stage whose results this bundle uses; NULL if the "
        "bundle does not use the results of a single bundle",
    ),
    ("losses", "INTEGER", "number of the bundle's earlier deliveries without an outcome"),
    ("worker", "VARCHAR", "id of the worker that committed the bundle's outcome; NULL if the bundle has no outcome"),
    (
        "execution",
        "VARCHAR",
        "id of the committed execution of the bundle, which identifies the files and the log of the execution",
    ),
    ("ready_s", "DOUBLE", "time from which the bundle could start"),
    ("started_s", "DOUBLE", "start time of the bundle"),
    ("ended_s", "DOUBLE", "end time of the bundle"),
    ("wait_s", "DOUBLE", "waiting time of the bundle from `ready_s` to `started_s`, which is at least 0"),
    ("took_s", "DOUBLE", "duration of the bundle from `started_s` to `ended_s`"),
    ("run_s", "DOUBLE", "total run time of the bundle's succeeded tasks"),
    ("failed_run_s", "DOUBLE", "total run time of the bundle's failed attempts"),
    ("succeeded", "BIGINT", "number of the bundle's tasks that succeeded"),
    ("failed", "BIGINT", "number of the bundle's tasks that failed and are not retried"),
    ("retried", "BIGINT", "number of the bundle's failed attempts that were retried"),
    ("cancelled", "BIGINT", "number of the bundle's tasks that were canceled"),
    ("slots", "INTEGER", "number of task slots that the bundle used while it ran"),
)

WORKERS = _table(
    "workers",
    "the table has one row per worker that committed a bundle of the job, or that the manager knew while the job ran",
    "job, worker",
    ("worker", "VARCHAR", "id of the worker process"),
    ("instance", "VARCHAR", "id of the worker's instance; NULL if the instance is unknown"),
    ("pool", "VARCHAR", "name of the worker's pool; NULL if the pool is unknown"),
    ("slots", "INTEGER", "number of task slots of the worker; NULL if the number is unknown"),
    ("first_s", "DOUBLE", "time of the worker's first message while the job ran"),
    ("last_s", "DOUBLE", "time of the worker's last message while the job ran"),
    ("bundles", "BIGINT", "number of the job's bundles that the worker committed"),
    ("tasks", "BIGINT", "number of the job's task attempts that the worker ran"),
    ("busy_slot_s", "DOUBLE", "slot time of the job's bundles on the worker, from the start to the end of each bundle"),
    ("run_s", "DOUBLE", "total run time of the job's tasks that succeeded on the worker"),
    ("failed_run_s", "DOUBLE", "total run time of the job's attempts that failed on the worker"),
)

INSTANCES = _table(
    "instances",
    "the table has one row per instance that existed while the job ran",
    "job, instance",
    ("instance", "VARCHAR", "id of the instance"),
    _POOL,
    ("type", "VARCHAR", "EC2 type of the instance; empty if all instances of the backend are equal"),
    ("zone", "VARCHAR", "availability zone of the instance; empty if the backend does not have zones"),
    ("market", "VARCHAR", "market of the instance: on-demand or spot"),
    ("launched_s", "DOUBLE", "launch time of the instance"),
    (
        "in_service_s",
        "DOUBLE",
        "time at which the manager first saw the instance InService; NULL if the instance was never InService",
    ),
    ("ended_s", "DOUBLE", "time at which the fleet first did not list the instance; NULL while the instance exists"),
    ("boot_s", "DOUBLE", "boot time of the instance, from its launch to InService"),
    ("state", "VARCHAR", "lifecycle state of the instance that the manager saw last"),
    ("note", "VARCHAR", "reason that the fleet gave for the end of the instance"),
    ("slots", "INTEGER", "number of task slots of the instance"),
)

SCALING = _table(
    "scaling",
    "the table has one row per change of a pool's desired capacity while the job ran",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time at which the desired capacity of the pool changed"),
    ("before", "INTEGER", "desired capacity of the pool before the change"),
    ("after", "INTEGER", "desired capacity of the pool after the change"),
    ("in_service", "INTEGER", "number of the pool's instances that were InService at the time of the change"),
    ("backlog_tasks", "BIGINT", "number of waiting and running tasks of all jobs in the pool"),
    ("backlog_s", "DOUBLE", "estimated work of the pool's waiting and running tasks, in slot seconds"),
    ("reason", "VARCHAR", "reason for the change of the desired capacity, as a sentence"),
)

QUEUES = _table(
    "queues",
    "the table has the depth of each pool's queue over time, for all jobs",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the record of the queue"),
    ("step_s", "DOUBLE", "length of the step, which is the time that the row covers"),
    (
        "visible",
        "BIGINT",
        "maximum number of visible messages in the queue during the step, which a worker could receive",
    ),
    ("in_flight", "BIGINT", "maximum number of in-flight messages during the step, which workers hold"),
    ("delayed", "BIGINT", "maximum number of delayed messages in the queue during the step"),
    ("backlog_tasks", "BIGINT", "maximum number of tasks of all jobs that had not ended, during the step"),
)

FLEET = _table(
    "fleet",
    "the table has the size of each pool's fleet over time",
    "job, pool, at_s",
    _POOL,
    ("at_s", "DOUBLE", "time of the record of the fleet"),
    ("step_s", "DOUBLE", "length of the step, which is the time that the row covers"),
    ("desired", "INTEGER", "desired capacity of the pool at the end of the step"),
    ("pending", "INTEGER", "number of the pool's instances that were booting at the end of the step"),
    ("in_service", "INTEGER", "number of the pool's instances that were InService at the end of the step"),
    ("terminating", "INTEGER", "number of the pool's instances that were terminating at the end of the step"),
    ("busy", "INTEGER", "number of the pool's instances that ran a bundle at the end of the step"),
    ("slots", "INTEGER", "number of task slots of the pool's instances that were InService"),
    (
        "busy_slots",
        "DOUBLE",
        "mean number of busy task slots during the step, according to the heartbeats of the workers",
    ),
)

REQUESTS = _table(
    "requests",
    "the table has the job's share of the requests that AWS bills for S3 and SQS, as a running total",
    "job, at_s",
    ("at_s", "DOUBLE", "time of the record of the requests; the last row has the total of the job"),
    ("step_s", "DOUBLE", "length of the step, which is the time that the row covers"),
    ("sqs", "DOUBLE", "number of requests to SQS, counted in units of 64 KiB"),
    ("sqs_empty", "DOUBLE", "number of the requests to SQS that received no message"),
    ("s3_puts", "DOUBLE", "number of PUT, COPY, POST, and LIST requests to S3"),
    ("s3_gets", "DOUBLE", "number of GET, HEAD, and all other requests to S3"),
    ("s3_deletes", "DOUBLE", "number of DELETE requests to S3, which are free"),
)

COST = _table(
    "cost",
    "the table has the lines of the job's bill; a line is split by stage if possible; the rows add up to the total of "
    "the bill",
    "job, line, stage",
    ("line", "VARCHAR", "name of the line of the bill, such as `compute, pool default`"),
    ("kind", "VARCHAR", "kind of the cost: compute, wasted, idle, sqs, or s3"),
    ("pool", "VARCHAR", "name of the pool that the line of the bill belongs to; NULL if the line belongs to no pool"),
    ("stage", "VARCHAR", "name of the stage that the cost belongs to; NULL if the cost belongs to no single stage"),
    ("seconds", "DOUBLE", "number of billed instance seconds; NULL for the cost of requests"),
    ("cost_usd", USD, "cost at list prices"),
    ("how", "VARCHAR", "calculation of the cost in the line, as text"),
)

DUPLICATES = _table(
    "duplicates",
    "the table has the number of duplicate messages and executions by stage and kind; a stage "
    "without duplicates is not in the table",
    "job, stage, kind",
    _STAGE,
    ("kind", "VARCHAR", "kind of the duplicate: message, event, execution, or result; see docs/report-data.md"),
    ("seen", "BIGINT", "number of duplicates of this kind"),
    ("harmless", "BIGINT", "number of duplicates that changed nothing"),
    ("harmful", "BIGINT", "number of duplicates that gave a task a second result; this number must be 0"),
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
