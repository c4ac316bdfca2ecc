"""A generated run of any size as Parquet files, for the tests and the benchmark of reports.

A generated run has three stages: `read`, then `score` for each task, then one `merge`. Attempts fail and are retried,
some tasks are slow, and one pool grows and shrinks. The seed determines every value, and the parts have the same sums
as in a real run.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import duckdb

from batchlab.reports.tables import build
from batchlab.reports.tables.schema import BY_NAME, TABLES


@dataclass(frozen=True, slots=True)
class Made:
    """The parameters of a generated run. `tasks` is the number of tasks in `read` and in `score`. `slow` multiplies the
    run time of `score`. `failing` is the share of `score`'s first attempts that fail."""

    job: str = "shop-0123456789"
    name: str = "shop"
    tasks: int = 240
    per_bundle: int = 8
    workers: int = 4
    slow: float = 1.0
    failing: float = 0.05
    seed: int = 1
    submitted_s: float = 1_760_000_000.0
    share: str = "default"


def write_run(folder: Path, run: Made = Made()) -> Path:
    """Write the run's files into `folder`, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(":memory:")
    spill = folder / ".spill"
    try:
        # Ten million tasks do not fit into memory, and DuckDB's temporary files must not be in the current folder.
        connection.execute(f"SET temp_directory = '{spill}'")
        connection.execute(_variables(run))
        for statement in _SQL.split(";\n"):
            if statement.strip():
                connection.execute(statement)
        for table in TABLES:
            build.save(connection, table, f"SELECT * FROM made_{table.name}", folder / table.file)
    finally:
        connection.close()
        shutil.rmtree(spill, ignore_errors=True)
    assert {one.stem for one in folder.glob("*.parquet")} == set(BY_NAME)
    return folder


def _variables(run: Made) -> str:
    known = {
        "job": f"'{run.job}'",
        "name": f"'{run.name}'",
        "n": run.tasks,
        "per": run.per_bundle,
        "w": run.workers,
        "slow": run.slow,
        "failing": run.failing,
        "seed": run.seed,
        "t0": f"{run.submitted_s}::DOUBLE",
        "share": f"'{run.share}'",
    }
    return ";\n".join(f"SET VARIABLE {name} = {value}" for name, value in known.items())


_SQL = """
CREATE MACRO v(x) AS getvariable(x);
CREATE MACRO chance(a, b) AS hash(a, b, v('seed')) / 18446744073709551616.0::DOUBLE;
CREATE MACRO bundle_id(a, b, attempt) AS printf('%08d-%08d.0.%d', a, b, attempt);

CREATE TABLE first AS
SELECT stage, task, task // v('per') AS b,
       round(base * (0.6 + 0.8 * chance(task, stage))
             * CASE WHEN chance(task, stage || 's') < 0.01 THEN 8 ELSE 1 END
             * CASE stage WHEN 'score' THEN v('slow') ELSE 1 END, 6) AS run_s,
       stage = 'score' AND chance(task, 'f') < v('failing') AS is_failed,
       chance(task, 'g') < 0.1 AS is_hopeless
FROM (SELECT 'read' AS stage, 0.2 AS base, range AS task FROM range(v('n'))
      UNION ALL SELECT 'score', 0.5, range FROM range(v('n'))
      UNION ALL SELECT 'merge', 2.0, 0);

CREATE TABLE tried AS
SELECT stage, task, b, 1 AS attempt, run_s, NOT is_failed AS is_good,
       NOT is_failed OR is_hopeless AS is_final
FROM first
UNION ALL
SELECT stage, task, b, 2, round(run_s * 1.1, 6), true, true
FROM first WHERE is_failed AND NOT is_hopeless;

CREATE TABLE packed AS
SELECT stage, b, attempt, bundle_id(min(task), max(task), attempt) AS bundle,
       count(*) AS tasks, min(task) AS first_task, max(task) AS last_task,
       coalesce(sum(run_s) FILTER (is_good), 0) AS run_s,
       coalesce(sum(run_s) FILTER (NOT is_good), 0) AS failed_run_s,
       count(*) FILTER (is_good) AS succeeded,
       count(*) FILTER (NOT is_good AND is_final) AS failed,
       count(*) FILTER (NOT is_good AND NOT is_final) AS retried,
       round(sum(run_s) + 0.02, 6) AS took_s,
       CASE stage WHEN 'read' THEN 0 WHEN 'score' THEN 1 ELSE 2 END * 2 + attempt AS turn
FROM tried GROUP BY stage, b, attempt;

CREATE TABLE placed AS
SELECT *, (b % v('w'))::INTEGER AS lane,
       v('t0') + 4 + sum(took_s) OVER (PARTITION BY b % v('w') ORDER BY turn, b) AS ended_s
FROM packed;
UPDATE placed SET ended_s = (SELECT max(ended_s) FROM placed WHERE stage <> 'merge') + took_s
WHERE stage = 'merge';

CREATE VIEW made_bundles AS
SELECT v('job') AS job, p.stage, p.bundle, 0 AS round, p.attempt, 'DONE' AS state, p.tasks,
       p.first_task, p.last_task,
       CASE WHEN p.stage = 'score' AND p.attempt = 1 THEN r.bundle END AS source, 0 AS losses,
       'w-' || p.lane AS worker, 'w-' || p.lane || '-' || p.b AS execution,
       CASE WHEN p.stage = 'read' THEN v('t0') + 0.1
            WHEN p.stage = 'merge' THEN p.ended_s - p.took_s ELSE r.ended_s END AS ready_s,
       p.ended_s - p.took_s AS started_s, p.ended_s,
       greatest(0, p.ended_s - p.took_s - CASE WHEN p.stage = 'read' THEN v('t0') + 0.1
                WHEN p.stage = 'merge' THEN p.ended_s - p.took_s ELSE r.ended_s END) AS wait_s,
       p.took_s, p.run_s, p.failed_run_s, p.succeeded, p.failed, p.retried, 0 AS cancelled,
       1 AS slots
FROM placed p LEFT JOIN placed r
  ON r.b = p.b AND (p.stage = 'score')
 AND ((p.attempt = 1 AND r.stage = 'read') OR (p.attempt = 2 AND r.stage = 'score'))
 AND r.attempt = 1;

CREATE TABLE bundle_rows AS SELECT * FROM made_bundles;

CREATE VIEW made_attempts AS
SELECT v('job') AS job, t.stage, t.task, 0 AS round, t.attempt, p.bundle,
       'w-' || p.lane AS worker, CASE WHEN t.is_good THEN 'SUCCEEDED' ELSE 'FAILED' END AS state,
       t.is_final, t.run_s,
       CASE WHEN NOT t.is_good THEN 'exception' END AS kind,
       CASE WHEN NOT t.is_good THEN CASE t.task % 3 WHEN 0 THEN 'KeyError' ELSE 'ValueError' END
       END AS error,
       CASE WHEN NOT t.is_good THEN 'row ' || t.task || ' has no price' END AS reason,
       NULL AS exit_code,
       CASE WHEN NOT t.is_good THEN 'exception ' ||
            CASE t.task % 3 WHEN 0 THEN 'KeyError' ELSE 'ValueError' END || ' shop.py:score' END
       AS fingerprint, round(t.run_s * 0.7, 6) AS cpu_s, 1048576 * (40 + t.task % 9)::BIGINT AS memory_bytes,
       1000 + t.task AS input_bytes, 200 AS output_bytes,
       CASE WHEN t.stage = 'read' THEN 'day-' || t.task % 30 || '.csv' END AS input, NULL::VARCHAR AS mended_sha256
FROM tried t JOIN placed p USING (stage, b, attempt);

CREATE VIEW made_tasks AS
SELECT v('job') AS job, f.stage, f.task,
       CASE WHEN f.is_failed AND f.is_hopeless THEN 'FAILED' ELSE 'SUCCEEDED' END AS state,
       CASE WHEN f.is_failed AND NOT f.is_hopeless THEN 2 ELSE 1 END AS attempts,
       CASE WHEN f.is_failed AND NOT f.is_hopeless THEN round(f.run_s * 1.1, 6) ELSE f.run_s END
       AS run_s,
       CASE WHEN f.is_failed THEN f.run_s ELSE 0 END AS failed_run_s,
       b.wait_s, o.ready_s, b.started_s, b.ended_s, b.bundle, b.worker,
       CASE WHEN f.is_failed AND f.is_hopeless THEN 'exception ' ||
            CASE f.task % 3 WHEN 0 THEN 'KeyError' ELSE 'ValueError' END || ' shop.py:score' END
       AS fingerprint, round(f.run_s * 0.7, 6) AS cpu_s, 1048576 * (40 + f.task % 9)::BIGINT AS memory_bytes,
       1000 + f.task AS input_bytes, 200 AS output_bytes,
       CASE WHEN f.stage = 'read' THEN 'day-' || f.task % 30 || '.csv' END AS input, NULL::VARCHAR AS mended_sha256
FROM first f
JOIN placed p ON p.stage = f.stage AND p.b = f.b AND p.attempt =
     CASE WHEN f.is_failed AND NOT f.is_hopeless THEN 2 ELSE 1 END
JOIN bundle_rows b ON b.stage = p.stage AND b.bundle = p.bundle
JOIN placed q ON q.stage = f.stage AND q.b = f.b AND q.attempt = 1
JOIN bundle_rows o ON o.stage = q.stage AND o.bundle = q.bundle;

CREATE TABLE spans AS
SELECT min(started_s) AS started_s, max(ended_s) AS ended_s FROM bundle_rows;

CREATE TABLE fails AS SELECT count(*) AS failed FROM first WHERE is_failed AND is_hopeless;

CREATE TABLE made_cost AS
WITH lines AS (
  SELECT stage, sum(run_s) AS useful_s, sum(failed_run_s) AS wasted_s, 60.0 AS idle_s
  FROM bundle_rows GROUP BY stage)
SELECT v('job') AS job, 'compute, pool default' AS line, 'compute' AS kind, 'default' AS pool,
       stage, useful_s / 2 AS seconds, (useful_s / 2 * 0.0000236)::DECIMAL(24,12) AS cost_usd,
       'on-demand' AS how FROM lines
UNION ALL
SELECT v('job'), 'wasted work, pool default', 'wasted', 'default', stage, wasted_s / 2,
       (wasted_s / 2 * 0.0000236)::DECIMAL(24,12), 'attempts that failed'
FROM lines WHERE wasted_s > 0
UNION ALL
SELECT v('job'), 'idle, pool default', 'idle', 'default', NULL, 100,
       (100 * 0.0000236)::DECIMAL(24,12), 'boot, waiting, tail'
UNION ALL
SELECT v('job'), 'SQS requests', 'sqs', NULL, stage, NULL,
       (count(*) * 7.5 * 0.0000004)::DECIMAL(24,12), 'counted' FROM bundle_rows GROUP BY stage
UNION ALL
SELECT v('job'), 'S3 requests', 's3', NULL, stage, NULL,
       (count(*) * 2 * 0.000005)::DECIMAL(24,12), 'counted' FROM bundle_rows GROUP BY stage
UNION ALL
SELECT v('job'), 'S3 storage', 'storage', NULL, NULL, NULL, 0.000001, '0.044 GB for a month';

CREATE VIEW made_stages AS
SELECT v('job') AS job, stage,
       CASE stage WHEN 'read' THEN 0 WHEN 'score' THEN 1 ELSE 2 END AS position,
       'default' AS pool, 1 AS slots,
       CASE stage WHEN 'read' THEN [] WHEN 'score' THEN ['read'] ELSE ['score'] END AS after,
       sum(succeeded) + sum(failed) AS planned, sum(succeeded) AS succeeded, sum(failed) AS failed,
       0 AS cancelled, sum(retried) AS retried, count(*) AS bundles, sum(run_s) AS run_s,
       sum(failed_run_s) AS failed_run_s, min(started_s) AS started_s, max(ended_s) AS ended_s,
       (SELECT sum(cost_usd) FROM made_cost c WHERE c.stage = b.stage) AS cost_usd
FROM bundle_rows b GROUP BY stage;

CREATE VIEW made_jobs AS
SELECT v('job') AS job, 1 AS schema_version, v('name') AS name, 'local' AS backend,
       true AS is_final, CASE WHEN failed > 0 THEN 'FAILED' ELSE 'SUCCEEDED' END AS state,
       CASE WHEN failed > 0 THEN failed || ' tasks failed' ELSE '' END AS reason,
       1 AS rounds, 0 AS priority, '{}' AS tags, 'owner' AS owner, v('share') AS share, [] AS dependencies,
       v('t0') AS submitted_s, started_s,
       ended_s + 0.05 AS ended_s, ended_s + 0.05 - v('t0') AS took_s,
       (SELECT sum(planned) FROM made_stages) AS planned,
       (SELECT sum(succeeded) FROM made_stages) AS succeeded, failed, 0 AS cancelled,
       (SELECT sum(retried) FROM made_stages) AS retried,
       (SELECT count(*) FROM bundle_rows) AS bundles,
       (SELECT sum(run_s) FROM made_stages) AS run_s,
       (SELECT sum(failed_run_s) FROM made_stages) AS failed_run_s, 0.75 AS lost_slot_s,
       (SELECT sum(cost_usd) FROM made_cost) AS cost_usd,
       'AWS''s list prices of eu-central-1 in USD, as of 2026-01-01' AS prices, true AS is_whole
FROM spans, fails;

CREATE VIEW made_workers AS
SELECT v('job') AS job, worker, 'i-' || substr(worker, 3)::INTEGER // 2 AS instance,
       'default' AS pool, 1 AS slots, min(started_s) AS first_s, max(ended_s) AS last_s,
       count(*) AS bundles, sum(succeeded + failed + retried) AS tasks, sum(took_s) AS busy_slot_s,
       sum(run_s) AS run_s, sum(failed_run_s) AS failed_run_s
FROM bundle_rows GROUP BY worker;

CREATE VIEW made_instances AS
SELECT v('job') AS job, 'i-' || i AS instance, 'default' AS pool, 'c7g.large' AS type, '' AS image,
       'eu-central-1' || substr('abc', i % 3 + 1, 1) AS zone,
       CASE i % 4 WHEN 3 THEN 'spot' ELSE 'on-demand' END AS market,
       v('t0') + 0.5 AS launched_s, v('t0') + 2 + 0.1 * i AS in_service_s,
       ended_s + 10 AS ended_s, 1.5 + 0.1 * i AS boot_s, 'Terminated' AS state,
       'terminated: an empty backlog' AS note, 2 AS slots
FROM spans, range((v('w') + 1) // 2) t(i);

CREATE VIEW made_scaling AS
SELECT v('job') AS job, 'default' AS pool, v('t0') + 0.4 AS at_s, 0 AS before,
       (v('w') + 1) // 2 AS after, 0 AS in_service, 2 * v('n') AS backlog_tasks,
       2.0 * v('n') AS backlog_s,
       'a backlog of ' || 2 * v('n') || ' tasks drains in 2 s on ' || (v('w') + 1) // 2 ||
       ' instances' AS reason
UNION ALL
SELECT v('job'), 'default', ended_s + 9, (v('w') + 1) // 2, 0, (v('w') + 1) // 2, 0, 0.0,
       'an empty backlog' FROM spans;

CREATE TABLE ticks AS
SELECT v('t0') + (ended_s + 10 - v('t0')) * i / 99 AS at_s, (ended_s + 10 - v('t0')) / 99 AS step_s
FROM spans, range(100) t(i);

CREATE VIEW made_queues AS
SELECT v('job') AS job, 'default' AS pool, at_s, step_s,
       greatest(0, least(3 * v('w'), waiting) - v('w')) AS visible, running AS in_flight,
       0 AS delayed, waiting * v('per') AS backlog_tasks
FROM (SELECT at_s, step_s,
             (SELECT count(*) FROM bundle_rows WHERE ready_s <= at_s AND ended_s > at_s)
             AS waiting,
             (SELECT count(*) FROM bundle_rows WHERE started_s <= at_s AND ended_s > at_s)
             AS running
      FROM ticks);

CREATE VIEW made_fleet AS
SELECT v('job') AS job, 'default' AS pool, at_s, step_s,
       CASE WHEN at_s < v('t0') + 0.4 OR at_s > ended_s + 9 THEN 0 ELSE size END AS desired,
       CASE WHEN at_s BETWEEN v('t0') + 0.5 AND v('t0') + 2 THEN size ELSE 0 END AS pending,
       CASE WHEN at_s BETWEEN v('t0') + 2 AND ended_s + 9 THEN size ELSE 0 END AS in_service,
       CASE WHEN at_s > ended_s + 9 THEN size ELSE 0 END AS terminating,
       CASE WHEN at_s BETWEEN started_s AND ended_s THEN size ELSE 0 END AS busy,
       CASE WHEN at_s BETWEEN v('t0') + 2 AND ended_s + 9 THEN 2 * size ELSE 0 END AS slots,
       (SELECT count(*) FROM bundle_rows b WHERE b.started_s <= at_s AND b.ended_s > at_s)
       AS busy_slots
FROM ticks, spans, (SELECT (v('w') + 1) // 2 AS size);

CREATE VIEW made_requests AS
SELECT v('job') AS job, at_s, step_s, 7.5 * done AS sqs, 0.1 * done AS sqs_empty,
       1.5 * done AS s3_puts, 1.0 * done AS s3_gets, 0 AS s3_deletes
FROM (SELECT at_s, step_s, (SELECT count(*) FROM bundle_rows WHERE ended_s <= at_s) AS done
      FROM ticks);

CREATE VIEW made_duplicates AS
SELECT v('job') AS job, 'score' AS stage, 'message' AS kind, 2 AS seen, 2 AS harmless, 0 AS harmful,
       0.0 AS wasted_slot_s
UNION ALL SELECT v('job'), 'score', 'execution', 1, 1, 0, 1.25;
"""
