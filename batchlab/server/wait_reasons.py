"""Explanation in one line of why a job has not progressed further. The most specific reason comes
first.

Invariant: an explanation always exists, and it is derived from facts of the grid. Users of other
batch services complain most about jobs that wait forever without a reason. All reasons are in one
file, because their order determines the explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from batchlab.core.model import Activity, Control, GroupView, JobState
from batchlab.core.protocol.settlement import judge
from batchlab.core.text import capital, count, first_of, whole
from batchlab.manager.state import LiveJob
from batchlab.server.job_facts import Facts

Reason = Callable[[Facts], str | None]
LAG_S = 10.0
"""Lag in seconds below which no user needs to act."""
WARNED_S = 600.0
"""Maximum age in seconds of a log warning in an explanation."""
LONG_S = 10.0
"""Run time in seconds above which the explanation mentions the log of the oldest bundle."""
NAMED = 3
"""Number of jobs that are listed by id. Further jobs are only counted."""


def why(facts: Facts) -> str:
    """Return the explanation, without line breaks."""
    reason, answer = next((one, text) for one in _REASONS if (text := one(facts)))
    # Append other problems that the user can solve.
    more = [f"Also, {text}." for beside in _BESIDE if (text := beside(facts, reason))]
    return " ".join(" ".join([answer, *more]).split())


# --- Not allowed to run --------------------------------------------------------------------------


def _ended(f: Facts) -> str | None:
    if not f.record.state.ended:
        return None
    if f.record.reason:
        return f"It ended {f.record.state}: {f.record.reason.rstrip('.')}."
    counts = [s.counts for s in f.stages]
    failed = sum(c.failed for c in counts)
    allowed = f"; {count(failed, 'task')} failed, as its failure policy allows" if failed else ""
    done = count(sum(c.succeeded for c in counts), "task")
    return f"It ended {f.record.state}: {done} succeeded{allowed}."


def _not_adopted(f: Facts) -> str | None:
    if f.live is None:
        return "The manager is about to take it over: it has only just led, or the job restarted."
    return None


def _scheduled(f: Facts) -> str | None:
    if f.record.state is not JobState.SCHEDULED:
        return None
    at_s = f.record.job.start_at_s or 0.0
    when = datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if at_s <= f.now_s:
        return f"It was scheduled for {when} and starts at the manager's next tick."
    return f"It is scheduled for {when}, in {whole(at_s - f.now_s)}."


def _paused(f: Facts) -> str | None:
    if f.record.control is not Control.PAUSE:
        return None
    still = f"; {count(len(f.running), 'bundle')} that had begun may still end" if f.running else ""
    return f"Its user has paused it: {_progress(f)}{still}; `batchlab job resume {f.record.job.id}` lets it go on."


def _stopping(f: Facts) -> str | None:
    if f.record.control is not Control.CANCEL:
        return None
    verdict = judge(f.record.job, [s.counts for s in f.stages])
    cause = f"It is being stopped because {verdict.reason}" if verdict.stop else None
    if f.live and f.live.forbidden:
        rest = f"{count(len(f.outstanding), 'outstanding bundle')} will be closed as cancelled"
    else:
        rest = f"its workers notice within {f.settings.control_lease_s:g} s"
    return f"{cause or 'It is being cancelled'}: {rest}."


def _misplaced(f: Facts) -> str | None:
    """Return the reason if a stage does not fit the pools. The submission refuses such a job, but a
    grid can be restarted with other pools."""
    for stage in f.open_stages:
        group = f.groups.get(stage.pool)
        if group is None:
            return (
                f"Stage {stage.name} runs in pool {stage.pool}, which this grid does not have: "
                f"its pools are {', '.join(sorted(f.groups))}; restart it with that pool, or "
                f"cancel the job."
            )
        if stage.slots > group.pool.slots:
            return (
                f"Stage {stage.name} asks for {stage.slots} slots per task, but an instance of "
                f"pool {stage.pool} has {group.pool.slots}; restart the grid with larger "
                f"instances, or cancel the job."
            )
    return None


# --- No capacity without a user's action ----------------------------------------------------------


def _capped(f: Facts) -> str | None:
    """Return the reason if a cap on cost holds the job back: a cap of the job, of the grid, or of a
    pool's launches."""
    if f.live and f.live.capped:
        still = f"{count(len(f.running), 'bundle')} that had begun may still end"
        more = f"; {still}" if f.running else ""
        return (
            f"No more is launched for it than a cap pays for, because {f.live.capped}: "
            f"{_progress(f)}{more}; "
            f"`batchlab job cap {f.record.job.id} AMOUNT` raises the job's, `batchlab grid cap "
            f"AMOUNT` the grid's."
        )
    for pool in f.pools():
        if pool in f.capped and not f.in_service(pool) and not f.pending(pool):
            return f"It is waiting for capacity: pool {pool} has none, {f.capped[pool]}."
    return None


def _blocked(f: Facts) -> str | None:
    for pool in f.pools():
        if f.in_service(pool):
            continue
        wait = f"It is waiting for capacity: pool {pool}"
        group = f.groups[pool]
        if group.pool.max_size == 0:
            return f"{wait} has a max of 0 instances; `batchlab grid scale {pool} --max N`."
        if f.held.get(pool) == 0:
            return (
                f"{wait} is held at 0 instances by hand; `batchlab grid scale {pool} --auto` "
                f"hands it back to the autoscaler."
            )
        if stopped := f.stopped.get(pool):
            return (
                f"It is waiting for capacity: {stopped}; the instance log says why, and once that "
                f"is mended `batchlab grid scale {pool} --auto` tries at once."
            )
        if crash := _crashes(f, group):
            return f"It is waiting for capacity: {crash}."
    return None


def _crashes(f: Facts, group: GroupView) -> str | None:
    """Return why the pool's instances fail to start. Return None if no launch has failed since the
    last success."""
    pool = group.pool.name
    failed: list[Activity] = []
    for activity in f.activities.get(pool, ()):
        if activity.status == "Failed":
            failed.append(activity)
        elif activity.status == "Successful" and activity.description.startswith("Launching"):
            break
    if not failed:
        return None
    more = f"; {len(f.pending(pool))} more launched" if f.pending(pool) else ""
    dead = [i for i in group.instances if not i.healthy and i.note]
    if not dead:
        return f"workers of pool {pool} do not come up: {failed[0].cause}{more}"
    last = max(dead, key=lambda i: (i.launched_s, i.id))
    who = "keep dying before they are ready" if len(failed) > 1 else "died before it was ready"
    workers = "workers" if len(failed) > 1 else "a worker"
    return f"{workers} of pool {pool} {who}: {last.note}; see the instance log of {last.id}{more}"


# --- Running -------------------------------------------------------------------------------------


def _running(f: Facts) -> str | None:
    if not f.running:
        return None
    tasks = sum(len(f.outstanding[key].bundle.tasks) for key in f.running)
    (stage, _), (since_s, instance) = min(f.running.items(), key=lambda one: one[1])
    workers = {instance for _, instance in f.running.values()}
    text = (
        f"It is running {count(tasks, 'task')} in {count(len(f.running), 'bundle')} on "
        f"{count(len(workers), 'worker')}, the oldest bundle (stage {stage}, {instance}) for "
        f"{whole(f.monotonic_s - since_s)}; {_progress(f)}"
    )
    if f.delayed:
        text += f"; {_retries(f)}"
    text += _then(f)
    if f.monotonic_s - since_s >= LONG_S:
        text += f"; `batchlab job logs {f.record.job.id} --follow` shows what it prints"
    return f"{text}."


def _troubled(f: Facts) -> str | None:
    trouble = (f.live.trouble if f.live else "") or f.trouble
    return f"The manager cannot go on: {trouble.rstrip('.')}; it keeps trying." if trouble else None


# --- Ready, but not running ----------------------------------------------------------------------


def _no_instance(f: Facts) -> str | None:
    for pool in f.pools():
        group = f.groups[pool]
        if f.in_service(pool):
            continue
        text = f"It is waiting for capacity: pool {pool} has 0 of max {group.pool.max_size} instances in service"
        if pending := f.pending(pool):
            age_s = f.now_s - min(i.launched_s for i in pending)
            text += f", {len(pending)} launched, the first {whole(age_s)} ago"
        elif group.desired:
            text += f", desired capacity is {group.desired} and the launch is next"
        else:
            text += f", the autoscaler decides every {f.settings.tick_s:g} s"
        if newest := next(iter(f.activities.get(pool, ())), None):
            text += f"; last activity: {newest.description}, because {newest.cause}"
        return f"{text}{_then(f)}."
    return None


def _outranked(f: Facts) -> str | None:
    priority = f.record.job.priority
    for pool in f.pools():
        ahead = [rival for rival in f.rivals(pool) if rival.job.priority > priority]
        if ahead:
            are = _verb(len(ahead), "is", "are")
            return (
                f"{count(len(ahead), 'job')} of higher priority {are} ahead of it in pool {pool}: "
                f"{_names(ahead)}; its own priority is {priority}."
            )
    return None


def _queued(f: Facts) -> str | None:
    if not f.queued:
        return None
    oldest = min(f.queued, key=lambda one: one.heard_s)
    pool = f.record.job.stage(oldest.bundle.stage).pool
    bundles, wait = count(len(f.queued), "bundle"), _verb(len(f.queued), "waits", "wait")
    instances = {i.id for i in f.in_service(pool)}
    worker_statuses = [f.workers[i] for i in instances if i in f.workers]
    if not worker_statuses:
        have = _verb(len(instances), "has", "have")
        return (
            f"{bundles} of it {wait} in pool {pool}, whose {count(len(instances), 'instance')} "
            f"in service {have} not reported yet{_then(f)}."
        )
    others = {one.job for worker in worker_statuses for one in worker.since_s} - {f.record.job.id}
    rivals = [f.lives[job] for job in sorted(others) if job in f.lives]
    if rivals and all(worker.beat.busy >= worker.beat.slots for worker in worker_statuses):
        return (
            f"All slots of pool {pool} are busy with {count(len(rivals), 'other job')}: "
            f"{_names(rivals)}; {bundles} of this one {wait} in its queue{_then(f)}."
        )
    age_s = f.monotonic_s - oldest.heard_s
    return (
        f"{bundles} of it {_verb(len(f.queued), 'is', 'are')} on the way to "
        f"{count(len(worker_statuses), 'worker')} of pool {pool}, the oldest for {whole(age_s)}; what stays "
        f"silent for {f.settings.silence_s:g} s is looked for and sent again{_then(f)}."
    )


def _delayed(f: Facts) -> str | None:
    return f"{capital(_retries(f))}; {_progress(f)}{_then(f)}." if f.delayed else None


def _uncut(f: Facts) -> str | None:
    """Return the reason if tasks are planned and none of their bundles was sent, because the pool's
    window was full."""
    for stage in f.open_stages:
        left = len(f.by_stage[stage.name].left)
        if not left:
            continue
        waits = _verb(left, "waits", "wait")
        text = f"{count(left, 'task')} of stage {stage.name} {waits} for room in pool {stage.pool}"
        if peers := list(f.rivals(stage.pool)):
            share = _verb(len(peers), "shares", "share")
            text += f", which {count(len(peers), 'other job')} {share}: {_names(peers)}"
        else:
            text += f": the manager sends the next bundles within {f.settings.tick_s:g} s"
        return f"{text}{_then(f)}."
    return None


# --- Before the first task and after the last ----------------------------------------------------


def _planning(f: Facts) -> str | None:
    for stage in f.open_stages:
        counts = f.by_stage[stage.name].counts
        upstream = [f.by_stage[name].counts for name in stage.after]
        if counts.planned is not None or stage.chained or not all(c.ended for c in upstream):
            continue
        if upstream:
            results = count(sum(c.succeeded for c in upstream), "result")
            return f"It is planning stage {stage.name} from {results} of {', '.join(stage.after)}."
        source = f.record.job.input
        if source is None:
            return f"It is planning stage {stage.name} from the items that it brought along."
        return (
            f"It is planning its input: stage {stage.name} gets {count(len(source.keys), 'key')} "
            f"of raw data, split by {source.split}."
        )
    return None


def _closing(f: Facts) -> str | None:
    if f.open_stages:
        return None
    tasks = count(sum(s.counts.terminal for s in f.stages), "task")
    return f"All of its {tasks} have ended; the manager is writing down its end."


def _between(f: Facts) -> str:
    """Return the reason if every open task is between two bundles."""
    return (
        f"{capital(_progress(f))} and no bundle is outstanding at this moment; the manager looks "
        f"again within {f.settings.tick_s:g} s{_then(f)}."
    )


_REASONS: tuple[Reason, ...] = (
    _ended,
    _not_adopted,
    _scheduled,
    _paused,
    _stopping,
    _misplaced,
    _capped,
    _blocked,
    _running,
    _troubled,
    _no_instance,
    _outranked,
    _queued,
    _delayed,
    _uncut,
    _planning,
    _closing,
    _between,
)


# --- Additional notes -----------------------------------------------------------------------------


def _behind(f: Facts, reason: Reason) -> str:
    """Return a note if the explanation may be outdated, because the manager lags behind its
    workers."""
    if reason in (_ended, _scheduled, _paused) or f.lag_s < max(LAG_S, 10 * f.settings.tick_s):
        return ""
    return (
        f"the manager is {whole(f.lag_s)} behind with what its workers have told it: it, or the "
        f"analytics store, is too slow for so many bundles; larger ones (`bundle`) help"
    )


def _warned(f: Facts, reason: Reason) -> str:
    """Return the log's last warning about a job that does not run, unless the explanation already
    contains it."""
    if f.said is None or reason in (_ended, _scheduled, _paused, _running, _troubled):
        return ""
    at_s, text = f.said
    age_s = f.now_s - at_s
    if age_s > WARNED_S or f.unreadable:
        return ""
    return f"the manager's log has said of it, {whole(age_s)} ago: {text.rstrip('.')}"


def _unread(f: Facts, reason: Reason) -> str:  # noqa: ARG001 - applies to each job
    return f.unreadable


def _undelivered(f: Facts, reason: Reason) -> str:  # noqa: ARG001 - applies to each job
    return f"{f.undelivered} (`batchlab notify log` has more)" if f.undelivered else ""


_BESIDE: tuple[Callable[[Facts, Reason], str], ...] = (_behind, _warned, _unread, _undelivered)

# --- Text helpers --------------------------------------------------------------------------------


def _progress(f: Facts) -> str:
    ended = sum(s.counts.terminal for s in f.stages)
    planned = [s.counts.planned for s in f.stages]
    known = sum(p for p in planned if p is not None)
    more = "" if None not in planned else " planned so far"
    return f"{ended:,} of {known:,} tasks{more} have ended"


def _retries(f: Facts) -> str:
    tasks = sum(len(outstanding.bundle.tasks) for outstanding in f.delayed)
    due_s = f.delayed[0].heard_s - f.monotonic_s
    waits = _verb(tasks, "waits for its retry", "wait for their retries")
    return f"{count(tasks, 'task')} {waits}, next due in {whole(due_s)}"


def _then(f: Facts) -> str:
    """Return a note about a stage that waits for another whole stage, if the job has one."""
    for stage in f.open_stages:
        if stage.chained:
            continue
        for name in stage.after:
            counts = f.by_stage[name].counts
            if not counts.ended:
                known = counts.planned is not None
                far = f"{counts.terminal:,} of {counts.planned or 0:,} tasks ended"
                how = far if known else "not planned yet"
                return f"; stage {stage.name} waits for stage {name} ({how})"
    return ""


def _verb(number: int, one: str, many: str) -> str:
    return one if number == 1 else many


def _names(lives: Sequence[LiveJob]) -> str:
    return first_of([live.id for live in lives], NAMED)
