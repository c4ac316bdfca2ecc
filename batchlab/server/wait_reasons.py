"""One-line explanation of why a job has not progressed further.

Invariant: an explanation always exists, and the explanation is derived from facts of the grid. Users of other batch
services complain most about jobs that wait forever without a reason. The explanation is the first reason in `_REASONS`
that applies, so more specific reasons come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median

from batchlab.core.job_definition import Condition, Dependency
from batchlab.core.model import Activity, Control, GroupView, JobState, StageName
from batchlab.core.protocol.mended_inputs import is_mended
from batchlab.core.protocol.settlement import judge
from batchlab.core.task_sizes import TaskTimes, size_warnings
from batchlab.core.text import count, first_of, span, whole
from batchlab.core.visibility_timeouts import MIN_SAMPLES, QUANTILE, expected_run_s, longest_timeout_s
from batchlab.manager.state import LiveJob
from batchlab.server.job_facts import Facts

Reason = Callable[[Facts], str | None]
LAG_S = 10.0
"""Lag of the manager in seconds below which the user does not need to act."""
MAX_WARNING_AGE_S = 600.0
"""Maximum age in seconds of a warning from the manager's log in an explanation."""
LONG_RUN_S = 10.0
"""Run time in seconds above which the explanation mentions the log of the oldest bundle."""
MAX_LISTED_JOBS = 3
"""Number of jobs that an explanation lists by id. The explanation only counts further jobs."""


def why(facts: Facts) -> str:
    """Return the explanation of why the job waits, without line breaks."""
    reason, explanation = next((reason, text) for reason in _REASONS if (text := reason(facts)))
    # Notes about other problems that the user can solve are at the end of the explanation.
    notes = [f"Also, {text}." for note in _NOTES if (text := note(facts, reason))]
    return " ".join(" ".join([explanation, *notes]).split())


# --- The job must not run now --------------------------------------------------------------------


def _end_reason(f: Facts) -> str | None:
    if not f.record.state.ended:
        return None
    if f.record.reason:
        return f"The job ended {f.record.state}: {f.record.reason.rstrip('.')}."
    counts = [s.counts for s in f.stages]
    failed = sum(c.failed for c in counts)
    allowed = f", and {count(failed, 'task')} failed, as the failure policy of the job allows" if failed else ""
    succeeded = count(sum(c.succeeded for c in counts), "task")
    return f"The job ended {f.record.state}: {succeeded} succeeded{allowed}."


def _not_adopted(f: Facts) -> str | None:
    if f.live is None:
        return "The manager will load the job soon. The manager has just become the leader, or the job restarts."
    return None


def _start_time_reason(f: Facts) -> str | None:
    if f.record.state is not JobState.SCHEDULED:
        return None
    at_s = f.record.job.start_at_s or 0.0
    when = datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if at_s <= f.now_s:
        return f"The job was scheduled for {when} and starts at the manager's next tick."
    return f"The job is scheduled for {when}, in {whole(at_s - f.now_s)}."


def _pause_reason(f: Facts) -> str | None:
    if f.record.control is not Control.PAUSE:
        return None
    resume = f"`batchlab job resume {f.record.job.id}` resumes the job."
    return _join("A user has paused the job.", f"{_progress(f)}.", _still_running(f), resume)


def _stopping(f: Facts) -> str | None:
    if f.record.control is not Control.CANCEL:
        return None
    verdict = judge(f.record.job, [s.counts for s in f.stages])
    cause = f"The manager stops the job because {verdict.reason}." if verdict.stop else "The job is being canceled."
    if f.live and f.live.forbidden:
        return f"{cause} The manager will record {count(len(f.outstanding), 'outstanding bundle')} as canceled."
    return f"{cause} Its workers notice within {f.settings.control_lease_s:g} s."


def _other_job_reason(f: Facts) -> str | None:
    """Return the reason if the job waits for other jobs, with the state of each of them."""
    waits_for = f.live.waits_for if f.live else ()
    if not waits_for:
        return None
    texts = [_dependency(f, dependency) for dependency in waits_for[:MAX_LISTED_JOBS]]
    if len(waits_for) == 1:
        return f"The job waits for {texts[0]}."
    more = len(waits_for) - len(texts)
    return f"The job waits for {len(waits_for)} jobs: {'; '.join(texts)}{f'; and {more} more' if more else ''}."


def _dependency(f: Facts, dependency: Dependency) -> str:
    name = f"{'the end of ' if dependency.condition is Condition.ENDED else ''}job {dependency.job}"
    live = f.lives.get(dependency.job)
    if live is None:
        return f"{name}, whose state the manager will read soon"
    ended, planned = sum(counts.terminal for counts in live.counts), [counts.planned for counts in live.counts]
    total = sum(number or 0 for number in planned)
    if not total:
        return f"{name}, which is {live.record.state}"
    so_far = " planned so far" if None in planned else ""
    return f"{name}, which is {live.record.state} ({ended * 100 // total}% of its tasks{so_far} have ended)"


def _pool_reason(f: Facts) -> str | None:
    """Return the reason if a stage of the job does not fit the grid's pools.

    The manager refuses a new job that does not fit the pools, but a grid can be restarted with other pools.
    """
    for stage in f.open_stages:
        group = f.groups.get(stage.pool)
        if group is None:
            return (
                f"Stage {stage.name} runs in pool {stage.pool}, but this grid only has the pools "
                f"{', '.join(sorted(f.groups))}. Restart the grid with pool {stage.pool}, or cancel the job."
            )
        if stage.slots > group.pool.slots:
            return (
                f"Stage {stage.name} needs {stage.slots} slots per task, but an instance of pool {stage.pool} has "
                f"{group.pool.slots}. Restart the grid with larger instances, or cancel the job."
            )
        if stage.gpus > group.pool.gpus:
            return (
                f"Stage {stage.name} needs {count(stage.gpus, 'GPU')} per task, but an instance of pool {stage.pool} "
                f"has {group.pool.gpus}. Restart the grid with a pool that has the GPUs, or cancel the job."
            )
    return None


# --- The job gets no capacity without a user's action ---------------------------------------------


def _cost_cap_reason(f: Facts) -> str | None:
    """Return the reason if a cap on the cost of the job, of the grid, or of a pool stops the job."""
    if f.live and f.live.capped:
        return _join(
            f"No more tasks of the job start, because {f.live.capped}.",
            f"{_progress(f)}.",
            _still_running(f),
            f"`batchlab job cap {f.record.job.id} AMOUNT` raises the cap of the job, and "
            "`batchlab grid cap AMOUNT` raises the cap of the grid.",
        )
    for pool in f.pools():
        if pool in f.capped and not f.in_service(pool) and not f.pending(pool):
            return f"The job waits for capacity: pool {pool} has no instances. The last decision was: {f.capped[pool]}."
    return None


def _outage_reason(f: Facts) -> str | None:
    if f.outage is None:
        return None
    since_s, error = f.outage
    since = datetime.fromtimestamp(since_s, UTC).strftime("%H:%M:%S UTC")
    return _join(
        f"The manager has not received events of workers since {since} ({whole(f.now_s - since_s)}), because a "
        f"service does not answer: {error.rstrip('.')}.",
        "The job continues when the service answers.",
        f"{_progress(f)}.",
        _still_running(f),
    )


def _dependency_reason(f: Facts) -> str | None:
    for pool in f.pools():
        if f.in_service(pool):
            continue
        wait = "The job waits for capacity"
        group = f.groups[pool]
        scale = f"`batchlab grid scale {pool}"
        if group.pool.max_size == 0:
            return f"{wait}: pool {pool} has a maximum of 0 instances. {scale} --max N` raises the maximum."
        if f.held.get(pool) == 0:
            return f"{wait}: a user has set pool {pool} to 0 instances. {scale} --auto` lets the autoscaler decide."
        if stopped := f.stopped.get(pool):
            return f"{wait}: {stopped}. The instance log shows the cause. {scale} --auto` retries the launch at once."
        if crash := _crashes(f, group):
            return f"{wait}: {crash}"
    return None


def _crashes(f: Facts, group: GroupView) -> str | None:
    """Return the reason why the pool's instances fail to start.

    Return None if no launch has failed since the last successful launch.
    """
    pool = group.pool.name
    failed: list[Activity] = []
    for activity in f.activities.get(pool, ()):
        if activity.status == "Failed":
            failed.append(activity)
        elif activity.status == "Successful" and activity.description.startswith("Launching"):
            break
    if not failed:
        return None
    pending = len(f.pending(pool))
    more = f"The group has launched {count(pending, 'more instance')}." if pending else ""
    dead = [i for i in group.instances if not i.healthy and i.note]
    if not dead:
        return _join(f"workers of pool {pool} do not start: {failed[0].cause}.", more)
    last = max(dead, key=lambda i: (i.launched_s, i.id))
    workers = "workers" if len(failed) > 1 else "a worker"
    verb = "repeatedly end before they are ready" if len(failed) > 1 else "ended before it was ready"
    return _join(
        f"{workers} of pool {pool} {verb}: {last.note}.", f"The instance log of {last.id} shows the cause.", more
    )


# --- The job runs --------------------------------------------------------------------------------


def _running(f: Facts) -> str | None:
    if not f.running:
        return None
    tasks = sum(len(f.outstanding[key].bundle.tasks) for key in f.running)
    (stage, _), (since_s, instance) = min(f.running.items(), key=lambda item: item[1])
    workers = {instance for _, instance in f.running.values()}
    run_s = f.monotonic_s - since_s
    log = f"`batchlab job logs {f.record.job.id} --follow` shows the output." if run_s >= LONG_RUN_S else ""
    return _join(
        f"The job runs {count(tasks, 'task')} in {count(len(f.running), 'bundle')} on {count(len(workers), 'worker')}.",
        f"The oldest bundle (stage {stage}, {instance}) has run for {whole(run_s)}.",
        _copies(f),
        _visibility(f, stage),
        f"{_progress(f)}.",
        _retries(f),
        _next_stage(f),
        *(f"Its other tasks wait for their share: {text}." for text in f.share_waits.values()),
        _fleet_reason(f) or "",
        log,
    )


def _copies(f: Facts) -> str:
    """Return a sentence about the bundles that run a second time as speculative copies."""
    copied = {key: outstanding.copied_from for key, outstanding in f.outstanding.items() if outstanding.copied_from}
    places: set[str] = set()
    for instance, status in f.workers.items():
        keys = {(held.stage, held.bundle) for held in status.since_s if held.job == f.record.job.id} & copied.keys()
        if any(copied[key] != status.beat.worker for key in keys):
            places.add(instance)
    if not places:
        return ""
    verb = _verb(len(copied), "runs", "run")
    return (
        f"{count(len(copied), 'bundle')} {verb} far longer than others and {_verb(len(copied), 'has', 'have')} "
        f"a speculative copy on {first_of(sorted(places), MAX_LISTED_JOBS)}."
    )


def _visibility(f: Facts, stage: StageName) -> str:
    """Return a sentence about the longest visibility timeout of the stage's messages, and about its basis."""
    assert f.live is not None
    visibility_s, samples_s = f.settings.visibility_s, f.live.samples_s(stage)
    task_s = expected_run_s(samples_s)
    if task_s is None:
        return (
            f"Its messages have a visibility timeout of {visibility_s:g} s until {count(MIN_SAMPLES, 'bundle')} of the "
            "stage have ended."
        )
    bundles = [outstanding.bundle for outstanding in f.live.outstanding.get(stage, {}).values()]
    run_s = task_s * max((len(bundle.tasks) for bundle in bundles), default=1)
    timeout_s = longest_timeout_s(run_s, visibility_s)
    measured = len(f.live.run_times_s.get(stage, ()))
    if not measured:
        basis = f"the ledger has a mean run time of {span(task_s)} a task"
    elif measured < len(samples_s):
        basis = (
            f"the mean run time in the ledger and the times of the last {count(measured, 'bundle')} suggest at most "
            f"{span(task_s)} a task"
        )
    else:
        basis = f"{QUANTILE:.0%} of the last {count(measured, 'bundle')} took at most {span(task_s)} a task"
    return f"Its messages have a visibility timeout of up to {timeout_s:.0f} s, because {basis}."


def _fleet_reason(f: Facts) -> str | None:
    trouble = (f.live.trouble if f.live else "") or f.trouble
    return f"The manager cannot continue the job and retries: {trouble.rstrip('.')}." if trouble else None


# --- The job is ready, but does not run ----------------------------------------------------------


def _no_instance(f: Facts) -> str | None:
    for pool in f.pools():
        group = f.groups[pool]
        if f.in_service(pool):
            continue
        if pending := f.pending(pool):
            age_s = f.now_s - min(i.launched_s for i in pending)
            launch = f"The group has launched {count(len(pending), 'instance')}, the first one {whole(age_s)} ago."
        elif group.desired:
            launch = f"The desired capacity is {group.desired}, and the group will launch instances soon."
        else:
            launch = f"The autoscaler decides every {f.settings.tick_s:g} s."
        newest = next(iter(f.activities.get(pool, ())), None)
        return _join(
            f"The job waits for capacity: pool {pool} has 0 of max {group.pool.max_size} instances in service.",
            launch,
            f"The last scaling activity was: {newest.description}, because {newest.cause}." if newest else "",
            _next_stage(f),
        )
    return None


def _priority_reason(f: Facts) -> str | None:
    priority = f.record.job.priority
    for pool in f.pools():
        rivals = [rival for rival in f.rivals(pool) if rival.job.priority > priority]
        if f.has_shares:
            rivals = [rival for rival in rivals if rival.job.share == f.record.job.share]
        if rivals:
            verb = _verb(len(rivals), "comes", "come")
            return (
                f"{count(len(rivals), 'job')} of higher priority {verb} first in pool {pool}: {_ids(rivals)}. "
                f"The priority of this job is {priority}."
            )
    return None


def _share_reason(f: Facts) -> str | None:
    """Return the reason if the job's share in the fair-share policy allows no further bundle."""
    for pool in f.pools():
        if text := f.share_waits.get(pool):
            return _join(f"The job waits for its share: {text}.", f"{_progress(f)}.", _next_stage(f))
    return None


def _queue_reason(f: Facts) -> str | None:
    if not f.queued_bundles:
        return None
    oldest = min(f.queued_bundles, key=lambda outstanding: outstanding.heard_s)
    pool = f.record.job.stage(oldest.bundle.stage).pool
    bundles, wait = count(len(f.queued_bundles), "bundle"), _verb(len(f.queued_bundles), "waits", "wait")
    instances = {i.id for i in f.in_service(pool)}
    worker_statuses = [f.workers[i] for i in instances if i in f.workers]
    if not worker_statuses:
        have = _verb(len(instances), "has", "have")
        return _join(
            f"{bundles} of the job {wait} in pool {pool}.",
            f"{count(len(instances), 'instance')} of the pool {have} started, but {have} not sent a heartbeat yet.",
            _next_stage(f),
        )
    stage = f.record.job.stage(oldest.bundle.stage)
    if stage.gpus and all(worker.beat.gpus - worker.beat.busy_gpus < stage.gpus for worker in worker_statuses):
        return _join(
            f"Stage {stage.name} needs {count(stage.gpus, 'GPU')} per task, and no instance of pool {pool} has as many "
            "free GPUs.",
            f"{bundles} of the job {wait} for a GPU.",
            _next_stage(f),
        )
    others = {item.job for worker in worker_statuses for item in worker.since_s} - {f.record.job.id}
    rivals = [f.lives[job] for job in sorted(others) if job in f.lives]
    if rivals and all(worker.beat.busy >= worker.beat.slots for worker in worker_statuses):
        return _join(
            f"All slots of pool {pool} are busy with {count(len(rivals), 'other job')}: {_ids(rivals)}.",
            f"{bundles} of this job {wait} in the queue of the pool.",
            _next_stage(f),
        )
    are = _verb(len(f.queued_bundles), "is", "are")
    return _join(
        f"{bundles} of the job {are} on the way to {count(len(worker_statuses), 'worker')} of pool {pool}, the oldest "
        f"for {whole(f.monotonic_s - oldest.heard_s)}.",
        f"The manager sends a bundle again if no worker reports it for {f.settings.silence_s:g} s.",
        _next_stage(f),
    )


def _delay_reason(f: Facts) -> str | None:
    return _join(_retries(f), f"{_progress(f)}.", _next_stage(f)) if f.delayed_bundles else None


def _uncut(f: Facts) -> str | None:
    """Return the reason if planned tasks were not sent as bundles yet, because their pool already has enough
    bundles.
    """
    for stage in f.open_stages:
        tasks = len(f.by_stage[stage.name].left)
        if not tasks:
            continue
        wait = f"{count(tasks, 'task')} of stage {stage.name} {_verb(tasks, 'waits', 'wait')} for pool {stage.pool}"
        if rivals := list(f.rivals(stage.pool)):
            use = _verb(len(rivals), "uses", "use")
            text = f"{wait}, which {count(len(rivals), 'other job')} also {use}: {_ids(rivals)}."
        else:
            text = f"{wait}. The manager sends the next bundles within {f.settings.tick_s:g} s."
        return _join(text, _next_stage(f))
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
            return f"The manager plans stage {stage.name} from {results} of {', '.join(stage.after)}."
        source = f.record.job.input
        if source is None:
            return f"The manager plans stage {stage.name} from the items in the submission."
        keys = count(len(source.keys), "key")
        return f"The manager plans the input: stage {stage.name} gets {keys} of raw data, split by {source.split}."
    return None


def _closing(f: Facts) -> str | None:
    if f.open_stages:
        return None
    tasks = count(sum(s.counts.terminal for s in f.stages), "task")
    return f"All {tasks} of the job have ended. The manager records the end of the job."


def _between(f: Facts) -> str:
    """Return the reason of a job that does not have outstanding bundles at the moment."""
    return _join(
        f"{_progress(f)}, and no bundle is outstanding at this moment.",
        f"The manager checks the job again within {f.settings.tick_s:g} s.",
        _next_stage(f),
    )


_REASONS: tuple[Reason, ...] = (
    _end_reason,
    _not_adopted,
    _start_time_reason,
    _pause_reason,
    _stopping,
    _other_job_reason,
    _pool_reason,
    _outage_reason,
    _cost_cap_reason,
    _dependency_reason,
    _running,
    _fleet_reason,
    _no_instance,
    _priority_reason,
    _queue_reason,
    _delay_reason,
    _share_reason,
    _uncut,
    _planning,
    _closing,
    _between,
)


# --- Additional notes -----------------------------------------------------------------------------


def _behind(f: Facts, reason: Reason) -> str:
    """Return a note if the explanation may be outdated, because the manager has not processed recent events."""
    if reason in (_end_reason, _start_time_reason, _other_job_reason, _pause_reason) or f.lag_s < max(
        LAG_S, 10 * f.settings.tick_s
    ):
        return ""
    return (
        f"the manager is {whole(f.lag_s)} behind the events of its workers, because the manager or the analytics store "
        "is too slow for so many bundles. Larger bundles (`bundle` in the job file) reduce the number of events"
    )


def _with_warning(f: Facts, reason: Reason) -> str:
    """Return the last warning in the manager's log about a job that does not run, unless the explanation already
    contains the warning.
    """
    if f.warning is None or reason in (_end_reason, _start_time_reason, _pause_reason, _running, _fleet_reason):
        return ""
    at_s, text = f.warning
    age_s = f.now_s - at_s
    if age_s > MAX_WARNING_AGE_S or f.unreadable:
        return ""
    return f"the manager logged this warning about the job {whole(age_s)} ago: {text.rstrip('.')}"


def _mended(f: Facts, _: Reason) -> str:
    mended = sum(is_mended(outstanding.bundle) for outstanding in (f.live.all_outstanding() if f.live else ()))
    return f"{count(mended, 'task')} {_verb(mended, 'has', 'have')} a mended input from a retry" if mended else ""


def _task_sizes(f: Facts, reason: Reason) -> str:
    """Return a note about the stages whose tasks are too short or too long, once this manager has measured enough
    bundles. The mean run time in the ledger is not a median, so it does not count."""
    if f.live is None or reason is _end_reason:
        return ""
    times: list[TaskTimes] = []
    for stage in f.open_stages:
        # A bundle reports the total time of its tasks, so the samples are the mean task times of bundles. The median of
        # at least MIN_SAMPLES bundles does not depend on one slow task.
        samples_s = f.live.run_times_s.get(stage.name, ())
        if len(samples_s) >= MIN_SAMPLES:
            source = f"Half of the last {count(len(samples_s), 'bundle')} took a mean task time of at most"
            spot = f"pool {stage.pool} has Spot Instances" if f.uses_spot(stage.pool) else ""
            tasks = f.by_stage[stage.name].counts.succeeded
            times.append(TaskTimes(stage.name, median(samples_s), tasks, source, spot=spot))
    text = " ".join(map(str, size_warnings(times)))
    return text[:1].lower() + text[1:].removesuffix(".")


_NOTES: tuple[Callable[[Facts, Reason], str], ...] = (
    _behind,
    _with_warning,
    _mended,
    _task_sizes,
    lambda f, _: f.unreadable,
    lambda f, _: f"{f.undelivered}. `batchlab notify log` shows the attempts" if f.undelivered else "",
)

# --- Text helpers --------------------------------------------------------------------------------


def _join(*sentences: str) -> str:
    """Join the sentences that are not empty into one line. Each sentence begins with a capital letter or a command."""
    return " ".join(sentence for sentence in sentences if sentence)


def _progress(f: Facts) -> str:
    ended = sum(s.counts.terminal for s in f.stages)
    planned = [s.counts.planned for s in f.stages]
    total = sum(p for p in planned if p is not None)
    more = "" if None not in planned else " planned so far"
    return f"{ended:,} of {total:,} tasks{more} have ended"


def _still_running(f: Facts) -> str:
    return f"{count(len(f.running), 'bundle')} that had begun may still end." if f.running else ""


def _retries(f: Facts) -> str:
    if not f.delayed_bundles:
        return ""
    tasks = sum(len(outstanding.bundle.tasks) for outstanding in f.delayed_bundles)
    due_s = f.delayed_bundles[0].heard_s - f.monotonic_s
    wait = _verb(tasks, "waits for its retry", "wait for their retries")
    return f"{count(tasks, 'task')} {wait}, the next in {whole(due_s)}."


def _next_stage(f: Facts) -> str:
    """Return a sentence about a stage that waits for the end of another stage, or "" if no stage waits for another
    stage.
    """
    for stage in f.open_stages:
        if stage.chained:
            continue
        for name in stage.after:
            counts = f.by_stage[name].counts
            if not counts.ended:
                is_planned = counts.planned is not None
                progress = f"{counts.terminal:,} of {counts.planned or 0:,} tasks ended"
                return f"Stage {stage.name} waits for stage {name} ({progress if is_planned else 'not planned yet'})."
    return ""


def _verb(number: int, singular: str, plural: str) -> str:
    return singular if number == 1 else plural


def _ids(lives: Sequence[LiveJob]) -> str:
    return first_of([live.id for live in lives], MAX_LISTED_JOBS)
