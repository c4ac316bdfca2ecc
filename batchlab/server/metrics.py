"""Prometheus metrics of a manager, computed from the manager's memory on request. The endpoint of the metrics requires
the token.

Invariant: a request for metrics does not call a service or read the ledger. The labels of metrics contain pools,
states, kinds, and entries of the fair-share policy, so the number of time series is limited. The labels never contain a
job or the text of a user who may not administer the grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, islice, product
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request, Response

from batchlab import __version__
from batchlab.core.fair_share import DEFAULT_SHARE
from batchlab.core.model import ENDED, JobState, LifecycleState
from batchlab.core.notifications import KINDS
from batchlab.core.protocol.json_format import FAILURE_KINDS
from batchlab.manager.counters import STAGE_KINDS, UNREADABLE_KINDS, stage_kind
from batchlab.manager.manager import Manager
from batchlab.manager.state import Outstanding
from batchlab.server.http.common import StateDep, require_role
from batchlab.server.job_views import running_tasks, state_of

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

Samples = Mapping[Any, float]
TASK_STATES = ("waiting", "sent", "running")
MAX_SHARES = 100
"""Maximum number of values of the label `share`."""
OTHER_SHARES = "*"
"""Value of the label `share` for the sum of all shares without a value of their own."""


def exposition(manager: Manager, backend: str, accept: str) -> tuple[bytes, str]:
    """Return all metrics in the format of the `accept` header, and the name of the format."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

    class ManagerCollector(Collector):
        def collect(self) -> Iterable[Metric]:
            return families(manager, backend)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(ManagerCollector())
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def families(manager: Manager, backend: str) -> Iterator[Metric]:
    """Return every metric with its samples."""
    yield _gauge("manager_leader", "1 if this manager is the leader, else 0.", manager.is_leader.is_set())
    build = {(__version__, backend): 1}
    yield _gauge("build_info", "Always 1. The labels name the version and the backend.", build, "version", "backend")
    yield from _jobs(manager)
    yield from _tasks(manager)
    yield from _pools(manager)
    yield from _queues(manager)
    yield from _shares(manager)
    yield from _events_and_ticks(manager)
    yield from _usage(manager)
    deliveries = _each(manager.counts.deliveries, sorted(KINDS), ("delivered", "failed", "given_up"))
    yield _counter(
        "notification_attempts",
        "Attempts to deliver a notification, by kind of target and outcome.",
        deliveries,
        "target",
        "outcome",
    )


# --- Jobs and tasks ------------------------------------------------------------------------------


def _jobs(manager: Manager) -> Iterator[Metric]:
    running = {held.job for worker in manager.registry.workers.values() for held in worker.since_s}
    states = Counter(state_of(live.record, live.id in running) for live in manager.lives.values())
    active = {(s.value.lower(),): states[s] for s in JobState if s not in ENDED}
    yield _gauge("jobs", "Jobs that have not ended, by state.", active, "state")
    capped = sum(live.is_held for live in manager.lives.values())
    yield _gauge("jobs_capped", "Jobs that start no more tasks because of a cost cap.", capped)
    yield _counter("jobs_submitted", "Jobs that the manager has accepted.", manager.counts.submitted)
    ended = {(s.value.lower(),): manager.counts.jobs[s.value.lower()] for s in sorted(ENDED)}
    yield _counter("jobs_ended", "Jobs that have ended, by final state.", ended, "state")


def _tasks(manager: Manager) -> Iterator[Metric]:
    counts = manager.counts
    tasks: Counter[tuple[str, ...]] = Counter()
    for live in manager.lives.values():
        running = running_tasks(live, manager.registry.workers.values())
        for stage in live.job.stages:
            kind, record = stage_kind(stage), live.stages[stage.name].counts
            runs, sent = running.get(stage.name, 0), live.cut_tasks(stage.name)
            open_tasks = max(0, (record.planned or 0) - record.terminal)
            tasks[kind, "running"] += runs
            tasks[kind, "sent"] += max(0, sent - runs)
            tasks[kind, "waiting"] += max(0, open_tasks - sent)
    yield _gauge(
        "tasks",
        "Tasks of jobs that have not ended, by kind of stage and state: not sent yet, sent to a queue, or running.",
        _each(tasks, STAGE_KINDS, TASK_STATES),
        "stage_kind",
        "state",
    )
    ended = _each(counts.tasks, STAGE_KINDS, ("succeeded", "failed", "cancelled"))
    yield _counter("tasks_ended", "Tasks that have ended, by kind of stage and state.", ended, "stage_kind", "state")
    yield _counter(
        "attempts_failed",
        "Failed attempts that workers have reported, by reason and by consequence: the task failed or was retried.",
        _each(counts.attempts, sorted(FAILURE_KINDS), ("failed", "retried")),
        "reason",
        "followed",
    )
    yield _counter("bundles_committed", "Bundles whose outcome the ledger has recorded.", counts.bundles)
    yield _counter(
        "duplicate_completions",
        "Repeated reports of a bundle whose outcome the ledger had already recorded.",
        counts.repeated,
    )
    yield _counter(
        "duplicate_executions",
        "Bundles that a worker ran in vain, because another worker had committed the outcome first.",
        counts.duplicates,
    )
    yield _counter("speculative_copies", "Speculative copies of stragglers that the manager sent.", counts.copies)
    yield _counter(
        "speculative_copies_won",
        "Speculative copies whose outcome was committed before the outcome of the original run.",
        counts.copies_won,
    )


# --- Pools and queues ----------------------------------------------------------------------------


def _pools(manager: Manager) -> Iterator[Metric]:
    groups = {name: view for name, view in manager.groups.items() if name in manager.pools}
    states = [state.value for state in (LifecycleState.PENDING, LifecycleState.IN_SERVICE)]
    instances: Counter[tuple[str, ...]] = Counter({(name, state): 0 for name in groups for state in states})
    instances.update((name, instance.state.value) for name, view in groups.items() for instance in view.instances)
    yield _gauge("instances", "Instances by pool and EC2 Auto Scaling lifecycle state.", instances, "pool", "state")
    sizes = {
        "desired": ("Desired capacity", [view.desired for view in groups.values()]),
        "min": ("Minimum number of instances", [view.pool.min_size for view in groups.values()]),
        "max": ("Maximum number of instances", [view.pool.max_size for view in groups.values()]),
    }
    for size, (help_, values) in sizes.items():
        samples = {(name,): value for name, value in zip(groups, values, strict=True)}
        yield _gauge(f"pool_{size}_instances", f"{help_} of the pool.", samples, "pool")
    left = {(name,): left_s for name in groups if (left_s := manager.fleet_end.left_s(name)) is not None}
    yield _gauge("pool_end_seconds", "Time until a scheduled action ends the pool without a manager.", left, "pool")
    workers: Counter[tuple[str, ...]] = Counter({(name,): 0 for name in manager.pools})
    slots: Counter[tuple[str, ...]] = Counter(dict.fromkeys(product(manager.pools, ("busy", "free")), 0))
    gpus = {(name,): 0 for name, pool in manager.pools.items() if pool.gpus}
    for worker_status in manager.registry.workers.values():
        beat = worker_status.beat
        if beat.pool in manager.pools:
            workers[(beat.pool,)] += 1
            busy = min(beat.busy, beat.slots)
            slots[beat.pool, "busy"] += busy
            slots[beat.pool, "free"] += beat.slots - busy
            if (beat.pool,) in gpus:
                gpus[(beat.pool,)] += beat.busy_gpus
    yield _gauge("busy_gpus", "GPUs that running tasks use, by pool with GPUs.", gpus, "pool")
    yield _gauge("workers", "Workers that send heartbeats, by pool.", workers, "pool")
    yield _gauge("slots", "Slots of the workers that send heartbeats, by pool and state.", slots, "pool", "state")
    decisions = _each(manager.counts.decisions, manager.pools, ("in", "out"))
    yield _counter(
        "scaling_decisions",
        "Changes of desired capacity by the autoscaler, by pool and direction.",
        decisions,
        "pool",
        "direction",
    )
    stopped = manager.autoscaler.launch_breaker.stopped()
    yield _gauge(
        "pool_launching_stopped",
        "1 if the manager launches no instances in the pool because recent launches failed, else 0.",
        {(name,): name in stopped for name in manager.pools},
        "pool",
    )


def _queues(manager: Manager) -> Iterator[Metric]:
    fields = ("visible", "in_flight", "delayed")
    depths = {(name, field): getattr(depth, field) for name, depth in manager.depths.items() for field in fields}
    yield _gauge(
        "queue_messages",
        "Messages in the task queue of the pool, by state. The manager reads the depth regularly.",
        depths,
        "pool",
        "state",
    )
    now_s = manager.ports.clock.monotonic_s()
    sent: dict[str, list[Outstanding]] = {name: [] for name in manager.pools}
    for live in manager.lives.values():
        for stage in live.job.stages:
            if stage.pool in sent:
                sent[stage.pool] += live.outstanding.get(stage.name, {}).values()
    numbers = {(name,): len(bundles) for name, bundles in sent.items()}
    yield _gauge("bundles_outstanding", "Bundles that were sent and have no outcome yet, by pool.", numbers, "pool")
    ages_s = {(name,): max([0.0, *(now_s - o.since_s for o in bundles)]) for name, bundles in sent.items()}
    yield _gauge(
        "oldest_bundle_age_seconds",
        "Time since the oldest bundle without an outcome was sent, or since this manager first saw the bundle.",
        ages_s,
        "pool",
    )


def _shares(manager: Manager) -> Iterator[Metric]:
    policy = manager.fair_share.policy
    if policy is None:
        return
    # A user chooses the share of a job, so only the entries that administrators have set are values of the label.
    weights = {DEFAULT_SHARE: policy.attributes(DEFAULT_SHARE).weight}
    weights |= {entry.identifier: entry.weight for entry in policy.shares}
    weights = dict(islice(weights.items(), MAX_SHARES - 1))
    totals = {key: Counter[str]() for key in product(dict.fromkeys([*weights, OTHER_SHARES]), manager.pools)}
    use_s = dict.fromkeys(totals, 0.0)
    for view in manager.fair_share.status():
        entry = policy.entry(view["share"])
        names = (view["share"], entry.identifier if entry else OTHER_SHARES)
        at = next((name for name in names if name in weights), OTHER_SHARES), view["pool"]
        totals[at].update(waiting=view["waiting_tasks"], slots=view["slots"])
        use_s[at] += view["use_s"]

    def samples(key: str) -> Samples:
        return {at: total[key] for at, total in totals.items()}

    help_ = ", by entry of the fair-share policy and by pool."
    yield _gauge("share_waiting_tasks", f"Tasks that are not sent yet{help_}", samples("waiting"), "share", "pool")
    yield _gauge("share_outstanding_slots", f"Slots of outstanding bundles{help_}", samples("slots"), "share", "pool")
    yield _gauge("share_use_slot_seconds", f"Decayed use{help_}", use_s, "share", "pool")
    factors = {(name,): weight for name, weight in weights.items()}
    yield _gauge("share_weight_factor", "Weight factor, by entry of the fair-share policy.", factors, "share")


# --- Manager and usage ---------------------------------------------------------------------------


def _events_and_ticks(manager: Manager) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    counts = manager.counts
    yield _gauge("event_lag_seconds", "Age of the oldest worker event in the most recent receive.", counts.lag_s)
    yield _counter("event_messages", "Messages received from the events queue.", counts.events)
    unreadable = {(kind,): counts.unreadable[kind] for kind in UNREADABLE_KINDS}
    yield _counter("unreadable", "Messages and objects that could not be read, by kind.", unreadable, "kind")
    yield _counter("ticks_skipped", "Manager ticks that a backend error interrupted.", counts.skipped)
    bounds = [*map(str, counts.ticks.bounds_s), "+Inf"]
    totals = map(float, accumulate(counts.ticks.counts))
    yield HistogramMetricFamily(
        "batchlab_tick_duration_seconds",
        "Duration of the manager's ticks.",
        buckets=list(zip(bounds, totals, strict=True)),
        sum_value=counts.ticks.sum_s,
    )


def _usage(manager: Manager) -> Iterator[Metric]:
    spending = manager.spending
    if spending is None:
        return
    total = spending.meter.total
    requests = total.requests
    yield _counter(
        "aws_requests",
        "Billed S3 and SQS requests of the manager and of the workers, which report their own requests.",
        {
            ("sqs", "empty_receive"): requests.sqs_empty,
            ("sqs", "other"): max(0.0, requests.sqs - requests.sqs_empty),
            ("s3", "put"): requests.s3_puts,
            ("s3", "get"): requests.s3_gets,
            ("s3", "delete"): requests.s3_deletes,
        },
        "service",
        "operation",
    )
    billed: dict[tuple[str, ...], float] = {}
    for kind, seconds in total.billed_s.items():
        if kind.pool in manager.pools:
            key = (kind.pool, kind.market.value)
            billed[key] = billed.get(key, 0.0) + seconds
    help_ = "Billed time of instances, computed by the billing rules of AWS."
    yield _counter("instance_billed_seconds", help_, billed, "pool", "market")
    if (spent := spending.spent_usd()) is not None:
        yield _counter(
            "cost_usd",
            "Cost of the grid in USD at list prices since its account was opened. A grid outside of AWS shows the "
            "price of the same usage on AWS.",
            spent,
        )
    if spending.caps.max_cost_usd is not None:
        yield _gauge("cost_cap_usd", "Cap on the cost of the grid in USD.", spending.caps.max_cost_usd)


# --- Metric families -----------------------------------------------------------------------------


def _each(counter: Counter[Any], *values: Iterable[str]) -> Samples:
    """Return one sample for every combination of the label values."""
    return {key: counter[key] for key in product(*values)}


def _gauge(name: str, help_: str, samples: float | Samples, *labels: str) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return _fill(GaugeMetricFamily(f"batchlab_{name}", help_, labels=labels), samples)


def _counter(name: str, help_: str, samples: float | Samples, *labels: str) -> Metric:
    """Return a Prometheus counter. The client library appends `_total` to the name of a counter."""
    from prometheus_client.core import CounterMetricFamily

    return _fill(CounterMetricFamily(f"batchlab_{name}", help_, labels=labels), samples)


def _fill(family: GaugeMetricFamily | CounterMetricFamily, samples: float | Samples) -> Metric:
    for values, number in samples.items() if isinstance(samples, Mapping) else [((), samples)]:
        family.add_metric(values, float(number))
    return family


router = APIRouter(dependencies=[Depends(require_role)])


@router.get("/metrics", include_in_schema=False)
async def metrics(served: StateDep, request: Request) -> Response:
    """Return the metrics of the manager. A manager that is not the leader also returns metrics."""
    accept = request.headers.get("accept", "")
    content, kind = exposition(served.manager, served.backend_name, accept)
    # The content type is set as a header, because FastAPI would add a second charset to `media_type`.
    return Response(content, headers={"Content-Type": kind})
