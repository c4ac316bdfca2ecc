"""Users' changes with records in the audit log, and the checks of these records.

Invariant: the checks compare the log with the writes to the bucket, and with the answers that the users' requests got.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from inspect import isawaitable
from typing import TYPE_CHECKING

from batchlab.core.errors import status_of
from batchlab.core.model import Control, JobId
from batchlab.core.ports import ChangeResult
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import decode
from batchlab.core.users import Role, owner_name
from batchlab.manager.audit_log import (
    ALLOWED,
    DONE,
    FAILED,
    REFUSED,
    SUBMIT,
    UNKNOWN,
    AuditFilter,
    AuditLog,
    AuditRecord,
    Change,
)
from batchlab.manager.manager import Manager
from batchlab.sim.actors import CURRENT, Actor, check

if TYPE_CHECKING:
    from batchlab.sim.world import World

OPERATOR = "operator"
"""User who changes the pools and the fair-share policy."""
PAGE = 7
"""Number of records on each page of the log when `check_log` reads the log."""

_CONTROLS = {"job cancel": Control.CANCEL, "job pause": Control.PAUSE, "job resume": Control.RUN}


@dataclass(frozen=True, slots=True)
class UserChange:
    """A change that a user requests. If `action` is "", the request does not have a record.

    `reason` has the values of the change. If the change fails, the record has the error before these values.
    """

    user: str
    action: str
    subject: str
    reason: str = ""


@dataclass(eq=False, slots=True)
class Attempt:
    """A request for a change at one manager. `written` has the keys of the objects that the request wrote."""

    change: UserChange
    actor: Actor | None
    records: Sequence[AuditRecord] = ()
    status: int | None = None
    """HTTP status of the answer, or None if the manager has not answered."""
    is_new: bool = False
    """Whether the attempt submitted a new job that has a record of its own."""
    written: list[str] = field(default_factory=list)


ATTEMPT: ContextVar[Attempt | None] = ContextVar("attempt", default=None)
"""The request whose code is running. Tasks of the request inherit the request, because asyncio copies the context."""


@dataclass(slots=True)
class AuditChecks:
    """Checks of the audit log against the users' requests and the writes to the bucket."""

    check: Callable[[bool, str, str], None]
    attempts: list[Attempt] = field(default_factory=list)
    _stored: dict[str, AuditRecord] = field(default_factory=dict)
    """The last stored record of each request, by the request's id."""
    _owners: dict[str, str] = field(default_factory=dict)
    """Owner of each job, by the job's id."""

    async def perform(self, change: UserChange, call: Callable[[Manager], object], manager: Manager) -> object:
        """Make the change as the manager's API does: store its record, call the manager, and note the outcome.

        Without an audit log, or for a change without an action, only call the manager.
        """
        audit = manager.audit
        if audit is None or not change.action:
            answer = call(manager)
            return await answer if isawaitable(answer) else answer
        attempt = Attempt(change, CURRENT.get())
        self.attempts.append(attempt)
        ATTEMPT.set(attempt)
        audited = Change(audit, change.user, Role.OPERATE, change.action, change.subject)
        try:
            if change.action != SUBMIT:
                await audited.store(change.subject, [change.reason])
                attempt.records = [entry.record for entry in audited.stored]
                self._check_begin(attempt, "begins")
            answer = call(manager)
            answer = await answer if isawaitable(answer) else answer
        except Exception as error:
            self._end(attempt, audited, status_of(error), str(error))
            raise
        attempt.is_new = isinstance(answer, ChangeResult) and answer.is_new and not answer.rows.job.job.is_single_call
        self._end(attempt, audited, 200)
        return answer

    def _end(self, attempt: Attempt, audited: Change, status: int, error: str = "") -> None:
        attempt.status = status
        audited.end(status, error)
        if not attempt.records and status >= 400:
            attempt.records = [audited.record]

    def on_write(self, key: str, before: bytes | None, data: bytes) -> None:
        """Check a write of `data` that replaces `before`.

        No object of the log may be overwritten. A change must have a stored record before it takes effect, and a
        submitted job must name the user as its owner.
        """
        if key.startswith(object_keys.AUDIT):
            self.check(before is None, "audit", f"{key} is overwritten")
            for doc in json_format.loads(data)["records"]:
                record = decode(AuditRecord, doc)
                self._stored[record.request] = record
            return
        attempt = ATTEMPT.get()
        if key.endswith("/spec.json"):
            # The definition of a job names the user who submitted the job.
            self._owners[key.split("/")[1]] = owner_name(json_format.loads(data).get("owner", ""))
        if attempt is None or not _makes(attempt.change, key, data):
            return
        attempt.written.append(key)
        if attempt.change.action == SUBMIT:
            owner = self._owners[attempt.change.subject]
            self.check(owner == attempt.change.user, "audit", f"{attempt.change} has the owner {owner}")
        else:
            self._check_begin(attempt, "takes effect")

    def _check_begin(self, attempt: Attempt, verb: str) -> None:
        stored = [self._stored.get(record.request) for record in attempt.records]
        are_right = [record is not None and record.user == attempt.change.user for record in stored]
        facts = f"{attempt.change} {verb}, and its record is not stored"
        self.check(bool(are_right) and all(are_right), "audit", facts)

    async def check_log(self, world: World) -> None:
        """Check the whole log at the end of a world."""
        if not world.audited:
            return
        await world.ask(_flush, "flush the audit log")
        leader = world.leader
        assert leader is not None
        records = await _read(AuditLog(replace(leader.manager.ports, objects=world.objects)))
        by_request: dict[str, AuditRecord] = {}
        for record in records:
            check(record.request not in by_request, "audit", f"the log has {record} twice")
            by_request[record.request] = record
        for record in self._stored.values():
            check(record.request in by_request, "audit", f"the log has lost {record}")
        for attempt in self.attempts:
            self._check_attempt(attempt, by_request, attempt.actor is leader.actor)
        self._check_submissions(records, leader.actor)

    def _check_attempt(self, attempt: Attempt, log: dict[str, AuditRecord], is_settled: bool) -> None:
        """Check the outcomes of an attempt. `is_settled` means that the manager of the attempt still runs."""
        for one in attempt.records:
            record = log.get(one.request)
            facts = f"{attempt.change} was answered with {attempt.status} and wrote {attempt.written}: {record or one}"
            if record is None:
                check(not is_settled, "audit", f"{facts} is not in the log")
                continue
            is_same = (record.user, record.action, record.object) == (one.user, one.action, one.object)
            check(is_same and one.reason in record.reason, "audit", facts)
            is_answered = attempt.status is not None
            check(record.outcome != DONE or attempt.status == 200, "audit", facts)
            check(record.outcome not in (FAILED, REFUSED) or not attempt.written, "audit", facts)
            check(record.outcome != UNKNOWN or (attempt.status or 0) >= 500, "audit", facts)
            check(record.outcome != ALLOWED or not (is_settled and is_answered), "audit", facts)

    def _check_submissions(self, records: Sequence[AuditRecord], leader: Actor) -> None:
        # The record of a single call does not name its job.
        jobs = [record for record in records if record.action == SUBMIT and record.outcome == DONE and record.object]
        names = [record.object for record in jobs]
        for record in jobs:
            facts = f"{record}: the owner is {self._owners.get(record.object)}"
            check(self._owners.get(record.object) == record.user, "audit", facts)
            check(names.count(record.object) == 1, "audit", f"{record} is not the only submission of its job")
        for attempt in self.attempts:
            if attempt.is_new and attempt.actor is leader:
                check(attempt.change.subject in names, "audit", f"{attempt.change} is not in the log")


def _makes(change: UserChange, key: str, data: bytes) -> bool:
    """Return whether the write of an object makes the change."""
    job = JobId(change.subject)
    if change.action == SUBMIT:
        return key == object_keys.spec(job)
    if change.action == "job retry":
        return key.startswith(object_keys.retries(job))
    if control := _CONTROLS.get(change.action):
        return key == object_keys.control(job) and json_format.control_from_bytes(data).control is control
    return change.action == "share policy" and key == object_keys.SHARES


async def _flush(manager: Manager) -> None:
    if manager.audit:
        await manager.audit.flush()


async def _read(audit: AuditLog) -> list[AuditRecord]:
    records: list[AuditRecord] = []
    before: str | None = ""
    while before is not None:
        page, before = await audit.page(AuditFilter(), PAGE, before)
        records += page
    return records
