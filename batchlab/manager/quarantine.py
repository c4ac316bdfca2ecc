"""Reports and replacements of messages and objects that the manager cannot read.

Invariant: the manager counts and logs each unreadable message or object once. An unreadable message or object does not
block the manager or another job. The manager does not overwrite an unreadable outcome object, because a bucket policy
may forbid the overwrite. A conditional PUT of a replacement object decides which outcome counts.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TypeVar

from batchlab.core.commit import commit, committed, follow_ups, read_outcome, send_all
from batchlab.core.errors import AlreadyExists, BackendError, Malformed, TooNew
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, JobId, Outcome
from batchlab.core.ports import Cut
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.manager.counters import BEAT, Counters
from batchlab.manager.state import Ports

log = logging.getLogger(__name__)


T = TypeVar("T")

MAX_REPORTED = 20_000
"""Maximum number of remembered messages and objects. A remembered message is not reported again after a second
delivery."""
MAX_JOBS = 1_000
MAX_OBJECTS_PER_JOB = 20


class Quarantine:
    """Reports of messages and objects that one manager process could not read."""

    def __init__(self, counts: Counters) -> None:
        self._counts = counts
        self._reported: OrderedDict[str, None] = OrderedDict()
        self._jobs: OrderedDict[JobId, dict[str, str]] = OrderedDict()

    def message(self, kind: str, id_: str, length: int, error: Exception, job: JobId | None = None) -> None:
        """Report a dropped message of the kind "event" or "dead letter" with `length` characters."""
        # The log omits the message's content, because the content may be a user's text.
        what = f"{kind} of {length} characters"
        if self._is_new(kind, f"{kind} {id_}"):
            article = "an" if kind[0] in "aeiou" else "a"
            why = json_format.brief(error)
            about = {"job": job} if job else {}
            log.error("dropped %s %s that cannot be read: %s", article, what, why, extra=about)
        if job:
            self._note(job, f"{kind} {id_}", f"a {what}: {json_format.brief(error)}")

    def unproven(self, id_: str, facts: int, jobs: Collection[JobId]) -> None:
        """Report an event with unproven facts about `jobs`."""
        why = f"its sender has not proved {facts} facts with the job's key"
        if self._is_new("unproven event", f"unproven {id_}"):
            about = {"job": min(jobs)} if jobs else {}
            log.error("dropped a part of an event: %s", why, extra=about)
        for job in jobs:
            self._note(job, f"unproven {id_}", f"an event: {why}")

    def beat(self, instance: str, why: str) -> None:
        """Report a rejected heartbeat of `instance`. Every rejected heartbeat is counted, but only the first heartbeat
        per instance and reason is logged."""
        if not self._is_new(BEAT, f"beat {instance} {why}"):
            self._counts.unreadable[BEAT] += 1
            return
        log.error("dropped a heartbeat: %s", why, extra={"instance": instance})

    def object(self, key: str, error: BackendError, job: JobId, kind: str = "outcome") -> None:
        """Report an unreadable object. `kind` is the object's label in the metrics."""
        if self._is_new(kind, key):
            log.error("went on without %s: %s", key, error.message, extra={"job": job})
        self._note(job, key, error.message.rstrip("."))

    def _is_new(self, kind: str, name: str) -> bool:
        if name in self._reported:
            self._reported.move_to_end(name)
            return False
        self._reported[name] = None
        if len(self._reported) > MAX_REPORTED:
            self._reported.popitem(last=False)
        self._counts.unreadable[kind] += 1
        return True

    def _note(self, job: JobId, name: str, why: str) -> None:
        errors = self._jobs.setdefault(job, {})
        self._jobs.move_to_end(job)
        if len(errors) < MAX_OBJECTS_PER_JOB:
            errors[name] = why
        if len(self._jobs) > MAX_JOBS:
            self._jobs.popitem(last=False)

    def unreadable(self, job: JobId) -> Mapping[str, str]:
        """Return the error of each unreadable message or object of the job, by the name of the message or object."""
        return self._jobs.get(job, {})

    def trouble(self, job: JobId) -> str:
        """Return a phrase about unreadable messages and objects of the job, or "" if all were readable."""
        errors = self.unreadable(job)
        if not errors:
            return ""
        first = next(iter(errors.values()))
        more = " or more" if len(errors) == MAX_OBJECTS_PER_JOB else ""
        return f"{len(errors)}{more} of its messages and objects cannot be read, the first: {first}"


class UnreadableObject(Malformed):
    """An unreadable object that commits a decision about a job, such as a plan or a cut."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


async def read_stored(ports: Ports, key: str, read: Callable[[bytes], T]) -> T:
    """Return the result of `read` for the object's content. Raise NotFound if the object does not exist, or
    UnreadableObject if `read` fails."""
    data = await ports.patience(partial(ports.objects.get, key))
    try:
        return read(data)
    except (Malformed, TooNew) as error:
        raise UnreadableObject(key, error.message) from error


async def read_cut(ports: Ports, key: str) -> Cut:
    """Return the cut stored under `key`. Raise NotFound if the object does not exist, or UnreadableObject if the object
    is unreadable or contains another cut."""
    cut = await read_stored(ports, key, lambda data: json_format.cut_from_json(json_format.loads(data)))
    if object_keys.cut(cut.job, cut.stage, cut.round, cut.seq) != key:
        raise UnreadableObject(key, "It is another cut.")
    return cut


class OutcomeStore:
    def __init__(self, ports: Ports, quarantine: Quarantine) -> None:
        self._ports = ports
        self._quarantine = quarantine

    async def read(self, job: JobDef, bundle: Bundle) -> Outcome | None:
        """Return the committed outcome of `bundle`, or None without a committed outcome. If the outcome's object is
        unreadable, commit a replacement in which the tasks fail or are retried."""
        try:
            key = await self._ports.keys.key_of(job)
            outcome = await committed(self._ports.objects, bundle, self._ports.patience, key)
            return _check_fit(job, outcome, key) if outcome else None
        except Malformed as error:
            draft = settlement.unreadable(job, bundle, error.message, now_s=self._ports.clock.now_s())
            return await self._replace(job, draft, error)

    async def commit(self, job: JobDef, draft: Outcome) -> Outcome:
        """Commit `draft` and return the committed outcome. `draft` also replaces an unreadable outcome object."""
        try:
            key = await self._ports.keys.key_of(job)
            outcome = await commit(self._ports.objects, draft, self._ports.patience, key)
            return _check_fit(job, outcome, key)
        except Malformed as error:
            return await self._replace(job, draft, error)

    async def _replace(self, job: JobDef, draft: Outcome, error: BackendError) -> Outcome:
        key = await self._ports.keys.key_of(job)
        self._quarantine.object(object_keys.outcome(draft.bundle, key), error, job.id)
        objects, patience = self._ports.objects, self._ports.patience
        name, data = object_keys.replacement(draft.bundle), json_format.outcome_text(draft).encode()
        try:
            await patience(lambda: objects.put(name, data, if_absent=True))
        except AlreadyExists:
            draft = await read_outcome(objects, name, patience)
        # The manager sends the follow-ups of the replacement outcome, because the worker has only the follow-ups of its
        # own outcome.
        messages = follow_ups(job, draft, key, now_s=self._ports.clock.now_s())
        await send_all(self._ports.queue, messages, patience)
        return draft


def _check_fit(job: JobDef, outcome: Outcome, key: CommitKey) -> Outcome:
    if settlement.fits(job, outcome.bundle, outcome.follows):
        return outcome
    name = object_keys.outcome(outcome.bundle, key)
    raise Malformed(f"The object {name} cannot be read: it does not fit the stages of its job.")
