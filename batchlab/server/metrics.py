"""Prometheus metrics of a manager, computed from its memory on request, and their endpoint, which
requires the token.

Invariant: a request for metrics calls no service and reads no row of the ledger. Pools, states, and
kinds limit the number of series. No label contains a job or a user's text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request, Response

from batchlab import __version__
from batchlab.core.model import ENDED, JobState, LifecycleState
from batchlab.core.notifications import KINDS
from batchlab.core.protocol.json_format import FAILURE_KINDS
from batchlab.manager.counters import STAGE_KINDS, UNREADABLE_KINDS, stage_kind
from batchlab.manager.manager import Manager
from batchlab.manager.state import LiveJob, Outstanding
from batchlab.server.http.common import Given, authorised
from batchlab.server.job_views import running_tasks

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Samples = Mapping[tuple[str, ...], float]
DECISIONS = ("in", "out")
DELIVERIES = ("delivered", "failed", "given_up")
FOLLOWED = ("failed", "retried")
TARGETS = tuple(sorted(KINDS))
TASK_STATES = ("waiting", "sent", "running")


def exposition(manager: Manager, backend: str, accept: str) -> tuple[bytes, str]:
    """Return all metrics in the format of the `accept` header, and the name of the format."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

    class Now(Collector):
        def collect(self) -> Iterable[Metric]:
            return families(manager, backend)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Now())
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def families(manager: Manager, backend: str) -> Iterator[Metric]:
    """Return every metric with its samples."""
    yield _gauge("manager_leader", "Whether this manager leads.", manager.is_leader.is_set())
    yield _by("build_info", "Always 1; what runs here.", ("version", "backend"), {(__version__, backend): 1})
    yield from _jobs(manager)
    yield from _work(manager)
    yield from _pools(manager)
    yield from _queues(manager)
    yield from _heart(manager)
    yield from _use(manager)
    yield from _notifications(manager)


# --- Jobs and tasks ------------------------------------------------------------------------------


def _jobs(manager: Manager) -> Iterator[Metric]:
    states = Counter(live.record.state for live in manager.lives.values())
    counts = manager.counts
    yield _by(
        "jobs",
        "Jobs that have not ended, by state.",
        ("state",),
        {(s.value.lower(),): states[s] for s in JobState if s not in ENDED},
    )
    held = sum(live.is_held for live in manager.lives.values())
    yield _gauge("jobs_capped", "Jobs that a cap on cost holds back.", held)
    yield _count("jobs_submitted", "Jobs that were accepted.", {(): counts.submitted})
    yield _count(
        "jobs_ended",
        "Jobs that have ended, by state.",
        {(s.value.lower(),): counts.jobs[s.value.lower()] for s in sorted(ENDED)},
        ("state",),
    )


def _work(manager: Manager) -> Iterator[Metric]:
    tasks: Counter[tuple[str, str]] = Counter()
    for live in manager.lives.values():
        _count_tasks(manager, live, tasks)
    counts = manager.counts
    yield _by(
        "tasks",
        "Tasks of jobs that have not ended, by kind of stage: waiting for their turn, sent to a queue, or running.",
        ("stage_kind", "state"),
        {(kind, state): tasks[kind, state] for kind in STAGE_KINDS for state in TASK_STATES},
    )
    yield _count(
        "tasks_ended",
        "Tasks that have come to their end, by kind of stage and state.",
        {
            (kind, state): counts.tasks[kind, state]
            for kind in STAGE_KINDS
            for state in ("succeeded", "failed", "cancelled")
        },
        ("stage_kind", "state"),
    )
    yield _count(
        "attempts_failed",
        "Attempts of tasks that failed, by reason and by what followed, as workers tell.",
        {(reason, then): counts.attempts[reason, then] for reason in sorted(FAILURE_KINDS) for then in FOLLOWED},
        ("reason", "followed"),
    )
    yield _count("bundles_committed", "Outcomes that the ledger has taken.", {(): counts.bundles})
    yield _count(
        "duplicate_completions",
        "Completions of bundles whose outcome the ledger had taken before.",
        {(): counts.repeated},
    )
    yield _count(
        "duplicate_executions",
        "Bundles that a worker ran for nothing, because another's outcome came first.",
        {(): counts.duplicates},
    )


def _count_tasks(manager: Manager, live: LiveJob, tasks: Counter[tuple[str, str]]) -> None:
    running = running_tasks(live, manager.registry.workers.values())
    for stage in live.job.stages:
        kind, record = stage_kind(stage), live.stages[stage.name].counts
        runs, sent = running.get(stage.name, 0), live.cut_tasks(stage.name)
        left = max(0, (record.planned or 0) - record.terminal)
        tasks[kind, "running"] += runs
        tasks[kind, "sent"] += max(0, sent - runs)
        tasks[kind, "waiting"] += max(0, left - sent)


# --- Pools and queues ----------------------------------------------------------------------------


def _pools(manager: Manager) -> Iterator[Metric]:
    groups = {name: view for name, view in manager.groups.items() if name in manager.pools}
    instances: dict[tuple[str, ...], float] = {
        (name, state.value): 0 for name in groups for state in (LifecycleState.PENDING, LifecycleState.IN_SERVICE)
    }
    for name, view in groups.items():
        for instance in view.instances:
            key = (name, instance.state.value)
            instances[key] = instances.get(key, 0) + 1
    yield _by("instances", "Instances by pool and lifecycle state, in EC2's words.", ("pool", "state"), instances)
    sizes = {n: (v.desired, v.pool.min_size, v.pool.max_size) for n, v in groups.items()}
    words = ("Desired capacity", "Least instances", "Most instances")
    for i, what in enumerate(("desired", "min", "max")):
        name, help_ = f"pool_{what}_instances", f"{words[i]} of the pool."
        yield _by(name, help_, ("pool",), {(n,): size[i] for n, size in sizes.items()})
    workers: Counter[tuple[str, ...]] = Counter({(name,): 0 for name in manager.pools})
    slots: Counter[tuple[str, ...]] = Counter()
    for name in manager.pools:
        slots[name, "busy"] = slots[name, "free"] = 0
    for worker_status in manager.registry.workers.values():
        beat = worker_status.beat
        if beat.pool in manager.pools:
            workers[(beat.pool,)] += 1
            busy = min(beat.busy, beat.slots)
            slots[beat.pool, "busy"] += busy
            slots[beat.pool, "free"] += beat.slots - busy
    yield _by("workers", "Workers that have reported, by pool.", ("pool",), workers)
    yield _by("slots", "Slots of those workers.", ("pool", "state"), slots)
    yield _count(
        "scaling_decisions",
        "Decisions of the policy to change desired capacity.",
        {(n, way): manager.counts.decisions[n, way] for n in manager.pools for way in DECISIONS},
        ("pool", "direction"),
    )
    stopped = manager.autoscaler.launch_breaker.stopped()
    yield _by(
        "pool_launching_stopped",
        "Whether nothing more is launched in the pool, because its instances do not come up.",
        ("pool",),
        {(name,): name in stopped for name in manager.pools},
    )


def _queues(manager: Manager) -> Iterator[Metric]:
    depths = manager.depths
    yield _by(
        "queue_messages",
        "Messages in the queue of a pool, by state, as of the manager's last look.",
        ("pool", "state"),
        {
            (name, state): getattr(depth, state)
            for name, depth in depths.items()
            for state in ("visible", "in_flight", "delayed")
        },
    )
    now_s = manager.ports.clock.monotonic_s()
    waiting: dict[str, list[Outstanding]] = {name: [] for name in manager.pools}
    for live in manager.lives.values():
        for stage in live.job.stages:
            if stage.pool in waiting:
                waiting[stage.pool] += live.outstanding.get(stage.name, {}).values()
    yield _by(
        "bundles_outstanding",
        "Bundles that were sent and have come to no outcome yet.",
        ("pool",),
        {(name,): len(outstandings) for name, outstandings in waiting.items()},
    )
    yield _by(
        "oldest_bundle_age_seconds",
        "How long ago the oldest of them was sent, as far as this manager knows.",
        ("pool",),
        {(n,): max([0.0, *(now_s - o.since_s for o in outstandings)]) for n, outstandings in waiting.items()},
    )


# --- Manager -------------------------------------------------------------------------------------


def _heart(manager: Manager) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    counts = manager.counts
    yield _gauge("event_lag_seconds", "Age of the oldest event in the last receive.", counts.lag_s)
    yield _count("event_messages", "Messages received from the events queue.", {(): counts.events})
    yield _count(
        "unreadable",
        "Messages and objects that could not be read, by kind.",
        {(kind,): counts.unreadable[kind] for kind in UNREADABLE_KINDS},
        ("kind",),
    )
    yield _count("ticks_skipped", "Ticks that the backend cut short.", {(): counts.skipped})
    total, buckets = 0, []
    bounds = [*map(str, counts.ticks.bounds_s), "+Inf"]
    for bound, number in zip(bounds, counts.ticks.counts, strict=True):
        total += number
        buckets.append((bound, float(total)))
    yield HistogramMetricFamily(
        "batchlab_tick_duration_seconds",
        "How long the manager's ticks took.",
        buckets=buckets,
        sum_value=counts.ticks.sum_s,
    )


def _use(manager: Manager) -> Iterator[Metric]:
    books = manager.spending
    if books is None:
        return
    requests = books.meter.total.requests
    yield _count(
        "aws_requests",
        "Requests of S3 and SQS as AWS bills them, those of the workers as they tell them.",
        {
            ("sqs", "empty_receive"): requests.sqs_empty,
            ("sqs", "other"): max(0.0, requests.sqs - requests.sqs_empty),
            ("s3", "put"): requests.s3_puts,
            ("s3", "get"): requests.s3_gets,
            ("s3", "delete"): requests.s3_deletes,
        },
        ("service", "operation"),
    )
    billed: dict[tuple[str, ...], float] = {}
    for kind, seconds in books.meter.total.billed_s.items():
        if kind.pool in manager.pools:
            key = (kind.pool, kind.market.value)
            billed[key] = billed.get(key, 0.0) + seconds
    yield _count("instance_billed_seconds", "Instance seconds as AWS bills them.", billed, ("pool", "market"))
    if (spent := books.spent_usd()) is not None:
        yield _count(
            "cost_usd",
            "What the grid has cost since its account was opened, in USD at list prices; where "
            "nothing is billed, what AWS would have asked.",
            {(): spent},
        )
    if books.caps.max_cost_usd is not None:
        yield _gauge("cost_cap_usd", "The cap on that.", books.caps.max_cost_usd)


def _notifications(manager: Manager) -> Iterator[Metric]:
    counts = manager.counts.deliveries
    yield _count(
        "notification_attempts",
        "Tries to deliver a notification, by kind of target and what came of it.",
        {(kind, what): counts[kind, what] for kind in TARGETS for what in DELIVERIES},
        ("target", "outcome"),
    )


# --- Metric families -----------------------------------------------------------------------------


def _gauge(name: str, help_: str, value: float) -> Metric:
    return _by(name, help_, (), {(): value})


def _by(name: str, help_: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"batchlab_{name}", help_, labels=labels)
    for values, number in samples.items():
        family.add_metric(values, float(number))
    return family


def _count(name: str, help_: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    """Return a counter. The client library appends `_total` to its name."""
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"batchlab_{name}", help_, labels=labels)
    for values, number in samples.items():
        family.add_metric(values, float(number))
    return family


router = APIRouter(dependencies=[Depends(authorised)])


@router.get("/metrics", include_in_schema=False)
async def metrics(served: Given, request: Request) -> Response:
    """Return the metrics. A manager that is not the leader also returns them."""

    accept = request.headers.get("accept", "")
    content, kind = exposition(served.manager, served.backend_name, accept)
    # FastAPI would add a charset to `media_type`, which already has one.
    return Response(content, headers={"Content-Type": kind})
