"""Attempts of a task: the result, the output, and the input of each attempt.

Invariants: the functions only read objects, through the port Objects. The module works on every backend, and does not
need a manager or a ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from batchlab.core import container_images
from batchlab.core.commit import committed
from batchlab.core.errors import Malformed, NotFound, TooLarge, UsageError
from batchlab.core.job_definition import JobDef, StageDef, task_name
from batchlab.core.model import Bundle, BundleId, Failure, JobId, Json, Outcome, StageName, TaskMetrics, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.protocol.bundle_inputs import Inputs, NoSuchTask
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.settlement import fingerprint

READ_AT_ONCE = 16
_SHOWN = 200
_RECORD_BYTES = 1024 * 1024
"""Maximum size in bytes of the record of the images of pools."""
_READ_BYTES = 4 * 1024 * 1024
"""Maximum number of bytes of a log that one request reads."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Result of one task in an outcome: success, failure, or cancellation."""

    task: int
    outcome: Outcome
    failure: Failure | None = None

    @property
    def bundle(self) -> Bundle:
        """Bundle with only the task of the attempt, and with `losses` set to 0."""
        return replace(self.outcome.bundle, tasks=TaskSet.from_indices([self.task]), losses=0)

    @property
    def name(self) -> str:
        """Name of the task, such as `parse/3`."""
        return task_name(self.outcome.bundle.stage, self.task)

    @property
    def state(self) -> str:
        """State of the attempt: SUCCEEDED, FAILED, CANCELLED, or RETRIED. RETRIED is the state of a failed attempt that
        was retried.
        """
        if self.failure is not None:
            return "FAILED" if self.failure.final else "RETRIED"
        return "SUCCEEDED" if self.task in self.outcome.succeeded else "CANCELLED"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the failure, or "" if the attempt did not fail."""
        return fingerprint(self.failure) if self.failure else ""

    @property
    def run_s(self) -> float | None:
        """Run time of the attempt in seconds, or None if the attempt did not run."""
        if self.failure is not None:
            return self.failure.run_s
        return dict(zip(self.outcome.succeeded, self.outcome.run_s, strict=True)).get(self.task)

    @property
    def value(self) -> Json:
        """Encoded result of the task, or None if the attempt did not succeed."""
        outcome = self.outcome
        return dict(zip(outcome.succeeded, outcome.values, strict=True)).get(self.task)

    @property
    def metrics(self) -> TaskMetrics:
        """Measured figures of the attempt. A figure that is not known is None."""
        return dict(self.outcome.metrics).get(self.task, TaskMetrics())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Ranges of the attempt's output in the log object, each as (first byte, last byte + 1)."""
        return [(start, stop) for task, start, stop in self.outcome.log_spans if task == self.task]


# --- Lookup --------------------------------------------------------------------------------------


async def definition(objects: Objects, job: JobId, patience: Patience) -> JobDef:
    """Return the definition of a job. Raise NotFound if the job does not exist."""
    data = await patience(partial(objects.get, object_keys.spec(job)))
    return json_format.job_from_json(json_format.loads(data))


async def pool_images(objects: Objects, pool: str, patience: Patience) -> list[str]:
    """Return the container images that the manager has recorded for a pool (see `container_images.image_of_worker`).

    Raise Malformed if the record cannot be read.
    """
    try:
        data = await patience(partial(objects.get, object_keys.POOL_IMAGES, limit=_RECORD_BYTES))
    except NotFound:
        return []
    except TooLarge as error:
        raise Malformed(error.message, remedy=container_images.REPAIR) from error
    return container_images.decode_images(data).get(pool, [])


async def attempts(objects: Objects, job: JobDef, stage: StageName, task: int, patience: Patience) -> list[Attempt]:
    """Return every finished attempt of a task in order.

    The function lists the stage's outcomes, with one request per 1000 outcomes, and reads the outcomes of bundles that
    may contain the task.
    """
    bundles_found: list[Bundle] = []
    key = await CommitKeys(objects, patience).key_of(job)
    async for page in objects.list(object_keys.outcomes(job.id, stage)):
        for info in page:
            name = object_keys.outcome_key(info.key)
            if name and name.first <= task <= name.last:
                ends = TaskSet.from_indices({name.first, name.last})
                bundles_found.append(Bundle(job.id, stage, ends, name.attempt, name.round))
    attempts: list[Attempt] = []
    for start in range(0, len(bundles_found), READ_AT_ONCE):
        bundles = bundles_found[start : start + READ_AT_ONCE]
        read = await asyncio.gather(*(committed(objects, item, patience, key) for item in bundles))
        attempts += [item for outcome in read if outcome and (item := attempt_in(outcome, task))]
    attempts.sort(key=lambda item: (item.outcome.bundle.round, item.outcome.bundle.attempt))
    return attempts


def attempt_in(outcome: Outcome, task: int) -> Attempt | None:
    """Return the attempt of the task in an outcome, or None if the outcome does not contain the task."""
    for failure in outcome.failed:
        if failure.task == task:
            return Attempt(task, outcome, failure)
    ended = task in outcome.succeeded or task in outcome.cancelled
    return Attempt(task, outcome) if ended else None


def choose(all_attempts: Sequence[Attempt], number: int | None = None, round_: int | None = None) -> Attempt | None:
    """Return an attempt that matches `number` and `round_`, or None if none of the attempts matches.

    An attempt matches if its number is `number` and its round is `round_`. The value None matches every number or
    round. If several attempts match, return the last failed attempt, or else the last attempt.
    """
    attempts = [attempt for attempt in all_attempts if round_ in (None, attempt.outcome.bundle.round)]
    if number is not None:
        attempts = [attempt for attempt in attempts if attempt.outcome.bundle.attempt == number]
    failed = [attempt for attempt in attempts if attempt.failure]
    return next(reversed(failed or attempts), None)


# --- Output and input -----------------------------------------------------------------------------


async def printed_output(
    objects: Objects, outcome: Outcome, tasks: Iterable[int], patience: Patience
) -> dict[int, bytes]:
    """Return the output of each task in an outcome, or b"" for a task without output.

    Outputs that are close to each other in the log are read in one request. Raise NotFound if the log is not stored yet
    or has expired.
    """
    wanted = set(tasks)
    spans = sorted((start, stop, task) for task, start, stop in outcome.log_spans if task in wanted)
    outputs = dict.fromkeys(wanted, b"")
    first = 0
    while first < len(spans):
        begin, end, last = spans[first][0], spans[first][1], first + 1
        while last < len(spans) and spans[last][1] - begin <= _READ_BYTES:
            end, last = spans[last][1], last + 1
        data = await patience(partial(objects.get_range, outcome.log, begin, end))
        for start, stop, task in spans[first:last]:
            outputs[task] += data[start - begin : stop - begin]
        first = last
    return outputs


async def log_end(
    outcome: Outcome, task: int, limit: int, read: Callable[[int, int], Awaitable[bytes]]
) -> tuple[bytes, int]:
    """Return the last `limit` bytes of a task's output, and the number of earlier bytes.

    `read` returns the bytes [start, stop) of the log. If a task's process died and the task was started again, the
    task's output is in several ranges of the log.
    """
    spans = sorted((start, stop) for owner, start, stop in outcome.log_spans if owner == task)
    parts: list[bytes] = []
    room = limit
    for start, stop in reversed(spans):
        begin = max(start, stop - room)
        if begin < stop:
            parts.append(await read(begin, stop))
        room -= stop - begin
    before = sum(stop - start for start, stop in spans) - (limit - room)
    return b"".join(reversed(parts)), before


async def task_bundle(objects: Objects, job: JobDef, stage: StageName, task: int, patience: Patience) -> Bundle:
    """Return a bundle that contains only the given unfinished task, for the lookup of the task's input.

    Raise UsageError if the upstream task does not have a result yet. Raise NoSuchTask if the plan does not contain the
    upstream task.
    """
    step = job.stage(stage)
    alone = Bundle(job.id, stage, TaskSet.from_indices([task]))
    if step.gather is not None:
        # Use the job's latest round, because the stage may have been planned for the first time after a `job retry`.
        return replace(alone, round=await _round(objects, job.id, patience))
    if not step.chained:
        return alone
    upstream = await attempts(objects, job, step.after[0], task, patience)
    done = [attempt for attempt in upstream if attempt.state == "SUCCEEDED"]
    if not done:
        if not upstream:
            await _check_head(objects, job, step, task, patience)
        before = task_name(step.after[0], task)
        raise UsageError(
            f"{task_name(stage, task)} does not have an input yet: {before} has not succeeded.",
            remedy=f"Check that task: `batchlab job show {job.id} {before}`.",
        )
    source = done[-1].outcome.bundle.id
    return replace(alone, source=BundleId(source))


async def _check_head(objects: Objects, job: JobDef, step: StageDef, task: int, patience: Patience) -> None:
    """Raise NoSuchTask if the plan of the first stage of a chain does not have the task."""
    head = step
    while head.chained:
        head = job.stage(head.after[0])
    bundle = await task_bundle(objects, job, head.name, task, patience)
    try:
        await Inputs(objects, patience).check(job, bundle)
    except NoSuchTask as error:
        name = task_name(step.name, task)
        raise NoSuchTask(f"The plan of job {job.id} does not contain task {name}.", remedy=error.remedy) from error
    except NotFound:
        return  # The plan does not exist yet or was removed, so the task may be valid.


async def _round(objects: Objects, job: JobId, patience: Patience) -> int:
    """Return the number of the last round that the job's user requested."""
    round_ = 0
    while await patience(partial(objects.head, object_keys.retry(job, round_ + 1))):
        round_ += 1
    return round_


async def task_input(objects: Objects, job: JobDef, bundle: Bundle, patience: Patience) -> Json:
    """Return the encoded input of a bundle's only task, as a worker receives it.

    The input is plain JSON or contains references to objects (see `protocol.values`). Raise NotFound if a required
    object no longer exists, or if the stage's plan does not contain the task.
    """
    inputs = Inputs(objects, patience)
    if bundle.source is None:
        await inputs.check(job, bundle)
    (item,) = await inputs.resolve(job, bundle, await CommitKeys(objects, patience).key_of(job))
    return item


def describe(item: Json) -> str:
    """Return a short description of a task's encoded input."""
    kind = values.kind(item)
    if kind == "$file":
        return f"the file {item['name']} ({item['size']:,} bytes)"
    if kind == "$part":
        start, stop = int(item["start"]), int(item["stop"])
        header = ", after its header" if item["header"] else ""
        return f"{stop - start:,} bytes of {item['name']}, from byte {start:,}{header}"
    if kind == "$pickle":
        return "a pickled object"
    if kind == "$value":
        return "a large value, stored by itself"
    if isinstance(item, list):
        files = sum(1 for _ in values.references(item))
        objects = f"{files:,} object" + "s" * (files != 1)
        return f"a list of {len(item):,}" + (f", which refers to {objects}" if files else "")
    text = json_format.dumps(item)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
