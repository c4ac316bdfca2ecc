-- The named queries of `batchlab report query NAME RUN…`, over the tables of docs/report-data.md.
-- A line `-- name:` precedes each query, and the comment after this line describes the query's result.
-- The result of a query contains all opened jobs, and its column `job` contains the id of the job.

-- name: summary
-- Summary of each job: its duration, number of tasks, tasks per second, and cost.
SELECT job, state, took_s, planned AS tasks, succeeded, failed, cancelled, retried,
       succeeded / nullif(took_s, 0) AS tasks_per_s, run_s, failed_run_s, cost_usd,
       1000 * cost_usd / nullif(succeeded, 0) AS cost_usd_per_1000
FROM jobs
ORDER BY submitted_s, job;

-- name: stages
-- Run time, waiting time, retries, and cost of each stage.
WITH spread AS (
  SELECT job, stage, quantile_cont(run_s, [0.5, 0.95, 0.99]) AS run, max(run_s) AS longest_s,
         quantile_cont(wait_s, [0.5, 0.95]) AS wait
  FROM tasks WHERE attempts > 0 GROUP BY job, stage
)
SELECT s.job, s.stage, s.pool, s.planned AS tasks, s.succeeded, s.failed, s.cancelled, s.retried,
       s.run_s, t.run[1] AS run_p50_s, t.run[2] AS run_p95_s, t.run[3] AS run_p99_s,
       t.longest_s AS run_max_s, t.wait[1] AS wait_p50_s, t.wait[2] AS wait_p95_s,
       s.ended_s - s.started_s AS span_s, s.cost_usd
FROM stages s LEFT JOIN spread t USING (job, stage)
ORDER BY s.job, s.position;

-- name: slowest_tasks
-- The 20 tasks with the longest last attempts, and the ratio of each run time to the median of the stage.
WITH longest AS (
  SELECT job, stage, task, state, run_s, wait_s, attempts, worker, bundle
  FROM tasks WHERE run_s IS NOT NULL ORDER BY run_s DESC LIMIT 20
), typical AS (
  SELECT job, stage, quantile_cont(run_s, 0.5) AS median_s
  FROM tasks WHERE attempts > 0 GROUP BY job, stage
)
SELECT l.job, l.stage, l.task, l.run_s, l.run_s / nullif(t.median_s, 0) AS times_median, l.wait_s,
       l.attempts, l.state, l.worker, l.bundle
FROM longest l LEFT JOIN typical t USING (job, stage)
ORDER BY l.run_s DESC, l.job, l.stage, l.task;

-- name: stragglers
-- Stragglers of each stage, which took more than three times the median run time of the stage: their
-- number, the longest straggler, and the sum of their time beyond the median.
WITH typical AS (
  SELECT job, stage, quantile_cont(run_s, 0.5) AS median_s, count(*) AS tasks
  FROM tasks WHERE attempts > 0 GROUP BY job, stage
)
SELECT y.job, y.stage, y.tasks, y.median_s, count(*) AS stragglers, count(*) / y.tasks AS share,
       max(t.run_s) AS longest_s, arg_max(t.task, t.run_s) AS longest_task,
       sum(t.run_s - y.median_s) AS beyond_median_s
FROM tasks t JOIN typical y ON t.job = y.job AND t.stage = y.stage AND t.run_s > 3 * y.median_s
GROUP BY y.job, y.stage, y.tasks, y.median_s
ORDER BY beyond_median_s DESC, y.job, y.stage;

-- name: queue_wait
-- Percentiles of the waiting time of tasks, from ready to the start of the last attempt's bundle.
WITH spread AS (
  SELECT job, stage, count(*) AS tasks, max(wait_s) AS longest_s,
         quantile_cont(wait_s, [0.5, 0.9, 0.95, 0.99]) AS wait
  FROM tasks WHERE wait_s IS NOT NULL GROUP BY job, stage
)
SELECT job, stage, tasks, wait[1] AS wait_p50_s, wait[2] AS wait_p90_s, wait[3] AS wait_p95_s,
       wait[4] AS wait_p99_s, longest_s AS wait_max_s
FROM spread JOIN stages USING (job, stage)
ORDER BY job, stages.position;

-- name: utilisation
-- Use of the slot time of each pool while the job ran: the total slot time of the instances, the slot
-- time of the job's bundles, and the slot time of the job's tasks. Other jobs of the grid may have used
-- the remaining slot time.
WITH there AS (
  SELECT i.job, i.pool, count(*) AS instances,
         sum(i.slots * greatest(0, least(coalesce(i.ended_s, 'infinity'),
                                         coalesce(j.ended_s, last.at_s, 'infinity'))
                                   - greatest(i.in_service_s, j.submitted_s))) AS slot_s
  FROM instances i JOIN jobs j USING (job)
  LEFT JOIN (SELECT job, max(at_s) AS at_s FROM fleet GROUP BY job) last USING (job)
  WHERE i.in_service_s IS NOT NULL
  GROUP BY i.job, i.pool
), used AS (
  SELECT b.job, s.pool, sum(b.took_s * b.slots) AS busy_slot_s,
         sum(b.run_s * b.slots) AS run_slot_s, sum(b.failed_run_s * b.slots) AS failed_slot_s
  FROM bundles b JOIN stages s USING (job, stage)
  GROUP BY b.job, s.pool
)
SELECT used.job, used.pool, there.instances,
       CASE WHEN isfinite(there.slot_s) THEN there.slot_s END AS there_slot_s, busy_slot_s,
       run_slot_s, failed_slot_s,
       CASE WHEN isfinite(there.slot_s) THEN busy_slot_s / nullif(there.slot_s, 0) END AS busy_share,
       CASE WHEN isfinite(there.slot_s) THEN run_slot_s / nullif(there.slot_s, 0) END AS run_share
FROM used LEFT JOIN there USING (job, pool)
ORDER BY used.job, used.pool;

-- name: workers
-- Bundles, tasks, and busy slot time of each worker of the job.
SELECT job, worker, instance, pool, slots, bundles, tasks, busy_slot_s, run_s, failed_run_s,
       last_s - first_s AS seen_s,
       busy_slot_s / nullif(slots * (last_s - first_s), 0) AS busy_share
FROM workers
ORDER BY job, busy_slot_s DESC NULLS LAST, worker;

-- name: cost_by_stage
-- Cost of the job by stage. The row with an empty stage has the costs of no single stage (idle time, lost work).
SELECT c.job, coalesce(c.stage, '') AS stage,
       sum(c.cost_usd) AS cost_usd,
       sum(c.cost_usd) FILTER (c.kind = 'compute') AS compute_usd,
       sum(c.cost_usd) FILTER (c.kind = 'wasted') AS wasted_usd,
       sum(c.cost_usd) FILTER (c.kind = 'idle') AS idle_usd,
       sum(c.cost_usd) FILTER (c.kind IN ('sqs', 's3')) AS requests_usd,
       1000 * sum(c.cost_usd) / nullif(max(s.succeeded), 0) AS cost_usd_per_1000
FROM cost c LEFT JOIN stages s USING (job, stage)
GROUP BY c.job, c.stage, s.position
ORDER BY c.job, s.position NULLS LAST;

-- name: retries
-- Failed attempts by stage and fingerprint: the numbers of attempts, of tasks, and of attempts that
-- were not retried, the run time of the attempts, and the reason of one attempt.
SELECT job, stage, fingerprint, count(*) AS attempts, count(DISTINCT task) AS tasks,
       count(*) FILTER (is_final) AS final, sum(run_s) AS run_s, min(task) AS first_task,
       arg_min(reason, (round, task, attempt)) AS example
FROM attempts WHERE state = 'FAILED'
GROUP BY job, stage, fingerprint
ORDER BY attempts DESC, job, stage, fingerprint;

-- name: failures
-- Tasks that failed and were not retried, at most 100, with the reasons of their last attempts.
WITH gone AS (
  SELECT t.job, t.stage, t.task, t.attempts, t.fingerprint, t.worker, t.bundle
  FROM tasks t JOIN stages s USING (job, stage)
  WHERE t.state = 'FAILED' ORDER BY t.job, s.position, t.task LIMIT 100
)
SELECT g.job, g.stage, g.task, g.attempts, a.kind, a.error, a.reason, g.fingerprint, g.worker
FROM gone g LEFT JOIN attempts a
  ON a.job = g.job AND a.stage = g.stage AND a.task = g.task AND a.bundle = g.bundle
 AND a.state = 'FAILED'
ORDER BY g.job, g.stage, g.task;

-- name: duplicates
-- Number of duplicate messages and executions by kind. The number of harmful duplicates must be 0.
SELECT j.job, k.kind, coalesce(sum(d.seen), 0) AS seen, coalesce(sum(d.harmless), 0) AS harmless,
       coalesce(sum(d.harmful), 0) AS harmful, coalesce(sum(d.wasted_slot_s), 0) AS wasted_slot_s
FROM jobs j
CROSS JOIN (VALUES ('message', 1), ('event', 2), ('execution', 3), ('copy', 4), ('original', 5), ('result', 6)) k(kind, n)
LEFT JOIN duplicates d ON d.job = j.job AND d.kind = k.kind
GROUP BY j.job, k.kind, k.n
ORDER BY j.job, k.n;

-- name: speculation
-- Speculative copies of each stage: their number, the number of copies that were committed first, and the
-- slot time of the runs that lost.
SELECT s.job, s.stage,
       coalesce(sum(d.seen), 0)::BIGINT AS copies,
       coalesce(sum(d.seen) FILTER (d.kind = 'original'), 0)::BIGINT AS won,
       coalesce(sum(d.wasted_slot_s) FILTER (d.kind = 'copy'), 0) AS copies_slot_s,
       coalesce(sum(d.wasted_slot_s) FILTER (d.kind = 'original'), 0) AS stopped_originals_slot_s
FROM stages s
LEFT JOIN duplicates d ON d.job = s.job AND d.stage = s.stage AND d.kind IN ('copy', 'original')
GROUP BY s.job, s.stage, s.position
ORDER BY s.job, s.position;

-- name: scaling
-- Changes of the desired capacity of each pool with their reasons. The lag is the time until the new number
-- of instances was in service. The lag is empty for a decrease, and if the pool never reached the number.
SELECT s.job, s.pool, s.at_s, s.before, s.after, s.in_service, s.backlog_tasks, s.backlog_s,
       CASE WHEN s.after > s.before THEN (
         SELECT min(f.at_s) FROM fleet f
         WHERE f.job = s.job AND f.pool = s.pool AND f.at_s >= s.at_s AND f.in_service >= s.after
       ) - s.at_s END AS lag_s,
       s.reason
FROM scaling s
ORDER BY s.job, s.at_s, s.pool;

-- name: scaling_lag
-- Increases of the desired capacity of each pool: their number, the median and longest lag until the
-- instances were in service, and the boot times of the instances.
WITH lags AS (
  SELECT s.job, s.pool, s.at_s,
         (SELECT min(f.at_s) FROM fleet f WHERE f.job = s.job AND f.pool = s.pool
          AND f.at_s >= s.at_s AND f.in_service >= s.after) - s.at_s AS lag_s
  FROM scaling s WHERE s.after > s.before
), boots AS (
  SELECT job, pool, count(*) AS launched, quantile_cont(boot_s, 0.5) AS boot_p50_s,
         max(boot_s) AS boot_max_s
  FROM instances GROUP BY job, pool
)
SELECT b.job, b.pool, count(l.at_s) AS scaled_out, count(l.lag_s) AS reached,
       quantile_cont(l.lag_s, 0.5) AS lag_p50_s, max(l.lag_s) AS lag_max_s, b.launched,
       b.boot_p50_s, b.boot_max_s
FROM boots b LEFT JOIN lags l USING (job, pool)
GROUP BY b.job, b.pool, b.launched, b.boot_p50_s, b.boot_max_s
ORDER BY b.job, b.pool;

-- name: wasted_work
-- Wasted slot time of the job by cause, and the share of the wasted time in the slot time of all bundles.
WITH causes AS (
  SELECT b.job, 1 AS n, 'failed attempts' AS cause, sum(b.failed_run_s * b.slots) AS slot_s
  FROM bundles b GROUP BY b.job
  UNION ALL
  SELECT job, 2, 'work lost because an instance died', lost_slot_s FROM jobs
  UNION ALL
  SELECT j.job, 3, 'duplicate executions and speculative copies that were not committed', coalesce(sum(d.wasted_slot_s), 0)
  FROM jobs j LEFT JOIN duplicates d USING (job) GROUP BY j.job
  UNION ALL
  SELECT b.job, 4, 'bundle time outside of tasks: start, inputs, commit',
         sum(greatest(0, b.took_s - b.run_s - b.failed_run_s) * b.slots)
  FROM bundles b GROUP BY b.job
), whole AS (
  SELECT job, sum(took_s * slots) AS slot_s FROM bundles GROUP BY job
)
SELECT c.job, c.cause, coalesce(c.slot_s, 0) AS slot_s,
       coalesce(c.slot_s, 0) / nullif(w.slot_s, 0) AS share
FROM causes c LEFT JOIN whole w USING (job)
ORDER BY c.job, c.n;

-- name: throughput
-- Number of tasks that ended in each of 100 equal parts of the job's duration.
WITH span AS (
  SELECT job, started_s AS from_s,
         greatest(coalesce(ended_s, (SELECT max(b.ended_s) FROM bundles b WHERE b.job = j.job))
                  - started_s, 1e-3) / 100 AS step_s
  FROM jobs j WHERE started_s IS NOT NULL
), ended AS (
  SELECT s.job, s.from_s, s.step_s,
         least(99, greatest(0, floor((b.ended_s - s.from_s) / s.step_s)))::INTEGER AS step,
         sum(b.succeeded + b.failed) AS tasks
  FROM bundles b JOIN span s USING (job) WHERE b.ended_s IS NOT NULL
  GROUP BY ALL
)
SELECT s.job, s.from_s + (g.step + 1) * s.step_s AS at_s, s.step_s, coalesce(e.tasks, 0) AS tasks,
       coalesce(e.tasks, 0) / s.step_s AS tasks_per_s
FROM span s CROSS JOIN (SELECT range AS step FROM range(100)) g
LEFT JOIN ended e ON e.job = s.job AND e.step = g.step
ORDER BY s.job, at_s;
