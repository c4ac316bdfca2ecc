-- Steps that build a job's tables. The files of `staging.py` are in the tables outcomes, runs,
-- failures, metrics, cancelled, planned, and rest. The tables `job` and `stage_facts` contain further facts.
-- `build.py` runs the steps in order. The rows of a step `table_NAME` are written to a file.

-- name: done
-- Outcomes with the facts of their stages, and with corrected start times. If a worker gives away a
-- part of a bundle, the rest starts at the commit of that outcome and not at the bundle's start.
CREATE TABLE done AS
WITH spans AS (
  SELECT *, greatest(started_s, coalesce(max(ended_s) OVER (
           PARTITION BY execution ORDER BY ended_s, n
           ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), started_s)) AS begun_s
  FROM outcomes
), due AS (
  SELECT stage, bundle, min(ready_s) AS ready_s FROM planned GROUP BY stage, bundle
)
SELECT o.* EXCLUDE (started_s, begun_s), s.position, s.pool, s.slots, d.ready_s,
       o.succeeded + o.failed + o.retried > 0 AS has_run,
       CASE WHEN o.succeeded + o.failed + o.retried > 0 OR o.ended_s > o.begun_s THEN o.begun_s END
       AS started_s,
       CASE WHEN o.succeeded + o.failed + o.retried > 0 THEN 'DONE'
            WHEN o.cancelled > 0 THEN 'CANCELLED' ELSE 'SPLIT' END AS state,
       greatest(0, o.ended_s - o.begun_s) AS took_s,
       greatest(0, o.ended_s - o.started_s - o.run_s) AS beside_s
FROM spans o JOIN stage_facts s USING (stage) LEFT JOIN due d USING (stage, bundle);

-- name: tries
-- Number of unsuccessful attempts per task: failed attempts, and attempts of a void plan.
CREATE TABLE tries AS
SELECT stage, task, count(*) AS tries, sum(failed_run_s) AS failed_run_s, min(ready_s) AS ready_s
FROM (
  SELECT f.stage, f.task, f.run_s AS failed_run_s, d.ready_s FROM failures f JOIN done d USING (n)
  UNION ALL
  SELECT r.stage, r.first_task + unnest(range(len(r.run_s))), 0, d.ready_s
  FROM runs r JOIN done d USING (n) WHERE d.is_void
)
GROUP BY stage, task;

-- name: last_failures
CREATE TABLE last_failures AS
SELECT f.stage, f.task, arg_max(f.n, (d.round, d.attempt, d.ended_s)) AS n,
       arg_max(f.run_s, (d.round, d.attempt, d.ended_s)) AS run_s,
       arg_max(f.fingerprint, (d.round, d.attempt, d.ended_s)) AS fingerprint,
       bool_or(f.is_final AND NOT d.is_void AND d.round = (SELECT round FROM job)) AS is_failed
FROM failures f JOIN done d USING (n)
GROUP BY f.stage, f.task;

-- name: stopped
CREATE TABLE stopped AS
SELECT DISTINCT c.stage, unnest(range(c.start, c.stop)) AS task
FROM cancelled c JOIN done d USING (n)
WHERE NOT d.is_void AND d.round = (SELECT round FROM job);

-- name: others
-- Tasks that did not succeed, with their states.
CREATE TABLE others AS
SELECT l.stage, l.task, f.n, f.run_s, f.fingerprint,
       CASE WHEN f.is_failed THEN 'FAILED'
            WHEN s.task IS NOT NULL OR (SELECT is_final FROM job) THEN 'CANCELLED'
            ELSE 'PLANNED' END AS state
FROM (SELECT stage, unnest(range(start, stop)) AS task FROM rest) l
LEFT JOIN last_failures f ON f.stage = l.stage AND f.task = l.task
LEFT JOIN stopped s ON s.stage = l.stage AND s.task = l.task;

-- name: good
-- Tasks that succeeded, in order. Each line of run times contains adjacent tasks of one bundle.
CREATE VIEW good AS
SELECT stage, n, first_task + unnest(range(len(run_s))) AS task, unnest(run_s) AS run_s
FROM (SELECT r.* FROM runs r JOIN stage_facts s USING (stage) ORDER BY s.position, r.first_task);

-- name: table_tasks
-- Tasks have all columns of the outcome of their last attempt, from which the schema selects.
SELECT j.job, g.task, d.* REPLACE (
         'SUCCEEDED' AS state, g.run_s AS run_s, coalesce(t.failed_run_s, 0) AS failed_run_s,
         coalesce(least(t.ready_s, d.ready_s), d.ready_s) AS ready_s
       ), 1 + coalesce(t.tries, 0) AS attempts, greatest(0, d.started_s - d.ready_s) AS wait_s,
       NULL AS fingerprint, m.* EXCLUDE (n, task)
FROM good g JOIN done d ON d.n = g.n AND NOT d.is_void CROSS JOIN job j
LEFT JOIN tries t ON t.stage = g.stage AND t.task = g.task
LEFT JOIN metrics m ON m.n = g.n AND m.task = g.task
UNION ALL
SELECT j.job, o.task, d.* REPLACE (
         o.stage AS stage, o.state AS state, o.run_s AS run_s,
         coalesce(t.failed_run_s, 0) AS failed_run_s, t.ready_s AS ready_s
       ), coalesce(t.tries, 0) AS attempts, greatest(0, d.started_s - d.ready_s) AS wait_s,
       CASE WHEN o.state = 'FAILED' THEN o.fingerprint END AS fingerprint,
       m.* EXCLUDE (n, task)
FROM others o CROSS JOIN job j LEFT JOIN done d ON d.n = o.n
LEFT JOIN tries t ON t.stage = o.stage AND t.task = o.task
LEFT JOIN metrics m ON m.n = o.n AND m.task = o.task;

-- name: table_attempts
SELECT j.job, g.stage, g.task, d.round, d.attempt, d.bundle, d.worker, 'SUCCEEDED' AS state,
       true AS is_final, g.run_s, NULL AS kind, NULL AS error, NULL AS reason, NULL AS exit_code,
       NULL AS fingerprint, m.* EXCLUDE (n, task), d.mended_sha256
FROM good g JOIN done d ON d.n = g.n CROSS JOIN job j
LEFT JOIN metrics m ON m.n = g.n AND m.task = g.task
UNION ALL
SELECT j.job, f.stage, f.task, d.round, d.attempt, d.bundle, d.worker, 'FAILED', f.is_final,
       f.run_s, f.kind, f.error, f.reason, f.exit_code, f.fingerprint,
       m.* EXCLUDE (n, task), d.mended_sha256
FROM failures f JOIN done d ON d.n = f.n CROSS JOIN job j
LEFT JOIN metrics m ON m.n = f.n AND m.task = f.task;

-- name: table_bundles
SELECT j.job, d.stage, d.bundle, d.round, d.attempt, d.state, d.tasks, d.first_task, d.last_task,
       d.source, d.losses, d.worker, d.execution, d.ready_s, d.started_s, d.ended_s,
       CASE WHEN d.has_run THEN greatest(0, d.started_s - d.ready_s) END AS wait_s, d.took_s,
       d.run_s, d.failed_run_s, d.succeeded, d.failed, d.retried, d.cancelled, d.slots
FROM done d CROSS JOIN job j
UNION ALL
SELECT j.job, p.stage, p.bundle, any_value(p.round), any_value(p.attempt), 'PLANNED',
       any_value(p.tasks), any_value(p.first_task), any_value(p.last_task), any_value(p.source),
       any_value(p.losses), NULL, NULL, min(p.ready_s), NULL, NULL, NULL, NULL, 0, 0, 0, 0, 0, 0,
       any_value(s.slots)
FROM planned p JOIN stage_facts s USING (stage) CROSS JOIN job j
WHERE NOT j.is_final
  AND NOT EXISTS (SELECT 1 FROM done d WHERE d.stage = p.stage AND d.bundle = p.bundle)
GROUP BY j.job, p.stage, p.bundle;

-- name: table_workers
WITH did AS (
  SELECT worker, any_value(pool) AS pool, count(*) AS bundles,
         sum(succeeded + failed + retried) AS tasks, sum(took_s * slots) AS busy_slot_s,
         sum(run_s) AS run_s, sum(failed_run_s) AS failed_run_s, min(started_s) AS first_s,
         max(ended_s) AS last_s
  FROM done WHERE has_run OR state = 'SPLIT' GROUP BY worker
)
SELECT j.job, coalesce(d.worker, w.worker) AS worker, w.instance, coalesce(w.pool, d.pool) AS pool,
       w.slots, least(d.first_s, w.first_s) AS first_s, greatest(d.last_s, w.last_s) AS last_s,
       coalesce(d.bundles, 0) AS bundles, coalesce(d.tasks, 0) AS tasks,
       coalesce(d.busy_slot_s, 0) AS busy_slot_s, coalesce(d.run_s, 0) AS run_s,
       coalesce(d.failed_run_s, 0) AS failed_run_s
FROM did d FULL JOIN seen_workers w ON w.worker = d.worker CROSS JOIN job j;

-- name: table_instances
SELECT j.job, i.*, i.in_service_s - i.launched_s AS boot_s
FROM seen_instances i CROSS JOIN job j;

-- name: table_scaling
SELECT j.job, s.* FROM seen_scaling s CROSS JOIN job j;

-- name: table_queues
SELECT j.job, pool, at_s, step_s, visible, in_flight, delayed, backlog_tasks
FROM seen_pools CROSS JOIN job j;

-- name: table_fleet
SELECT j.job, pool, at_s, step_s, desired, pending, in_service, terminating, busy, slots, busy_slots
FROM seen_pools CROSS JOIN job j;

-- name: table_requests
SELECT j.job, r.* FROM seen_requests r CROSS JOIN job j;

-- name: table_duplicates
SELECT j.job, d.* FROM seen_duplicates d CROSS JOIN job j;

-- name: table_cost
SELECT j.job, c.* FROM cost_lines c CROSS JOIN job j;

-- name: stage_sums
-- Sums per stage. They use the written tasks, so the stages add up to the job.
CREATE TABLE stage_sums AS
WITH counted AS (
  SELECT stage, count(*) AS planned, count(*) FILTER (state = 'SUCCEEDED') AS succeeded,
         count(*) FILTER (state = 'FAILED') AS failed,
         count(*) FILTER (state = 'CANCELLED') AS cancelled,
         coalesce(sum(run_s) FILTER (state = 'SUCCEEDED'), 0) AS run_s
  FROM written_tasks GROUP BY stage
), done_sums AS (
  SELECT stage, count(*) AS bundles, sum(retried) AS retried, sum(failed_run_s) AS failed_run_s,
         sum(CASE WHEN failed + retried > 0 THEN beside_s * slots ELSE 0 END) AS failed_slot_s,
         min(started_s) FILTER (has_run) AS started_s, max(ended_s) FILTER (has_run) AS ended_s
  FROM done GROUP BY stage
)
SELECT s.*, CASE WHEN s.is_planned OR j.is_final THEN coalesce(c.planned, 0) END AS planned,
       coalesce(c.succeeded, 0) AS succeeded, coalesce(c.failed, 0) AS failed,
       coalesce(c.cancelled, 0) AS cancelled, coalesce(c.run_s, 0) AS run_s,
       coalesce(d.bundles, 0) AS bundles, coalesce(d.retried, 0) AS retried,
       coalesce(d.failed_run_s, 0) AS failed_run_s, coalesce(d.failed_slot_s, 0) AS failed_slot_s,
       d.started_s, d.ended_s
FROM stage_facts s CROSS JOIN job j
LEFT JOIN counted c ON c.stage = s.stage LEFT JOIN done_sums d ON d.stage = s.stage;

-- name: table_stages
SELECT j.job, s.*,
       (SELECT sum(c.cost_usd) FROM cost_lines c WHERE c.stage = s.stage) AS cost_usd
FROM stage_sums s CROSS JOIN job j;

-- name: table_jobs
SELECT j.*, j.round + 1 AS rounds, t.*, j.ended_s - j.began_s AS took_s,
       (SELECT sum(cost_usd) FROM cost_lines) AS cost_usd
FROM job j CROSS JOIN (
  SELECT sum(planned) AS planned, sum(succeeded) AS succeeded, sum(failed) AS failed,
         sum(cancelled) AS cancelled, sum(retried) AS retried, sum(bundles) AS bundles,
         sum(run_s) AS run_s, sum(failed_run_s) AS failed_run_s, min(started_s) AS started_s
  FROM stage_sums
) t;
