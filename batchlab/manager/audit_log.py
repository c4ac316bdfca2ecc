"""Audit log of the grid, with the changes that users requested and the refused requests.

Invariants: each object of the log is written once, and is removed only when it is older than KEEP_S. The manager stores
the record of a change with the outcome ALLOWED before it makes the change. After the change, the manager stores the
record again with the outcome DONE, or with another outcome and the cause, and a reader uses only this later record. A
write that failed may have stored its object, so the manager repeats it under the same name. A job's definition names
the owner of the job, so the record of a submission may follow within FLUSH_S. The numbers of records of refused
requests and of failed changes are limited for each user. A request without a valid token does not cause a record, so a
stranger cannot fill the bucket. A reader skips objects and records that are not valid, and cuts long texts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Throttled
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, decode, figure, list_items
from batchlab.manager.state import Ports

log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Delay in seconds of the write of records that no request waits for."""
KEEP_S = 400 * 86_400.0
"""Age in seconds at which records are removed."""
PRUNE_S = 86_400.0
MAX_REFUSALS = 100
"""Maximum number of separate records of refused requests of one user in REFUSALS_S. One record counts the others.

The limit also applies to failed requests without an earlier record, such as invalid submissions. If MAX_REFUSALS
changes with an earlier record have failed in REFUSALS_S, the manager refuses further changes of the user.
"""
REFUSALS_S = 60.0
MAX_TEXT = 200
MAX_REASON = 2 * MAX_TEXT + 2
"""Maximum length of the reason of a failed change, which has the cause and the values of the change."""
MAX_SCANNED = 500
"""Number of read objects after which a page of the log ends with fewer records."""
MAX_BYTES = 4 * 2**20
"""Maximum size of an object of the log that a page reads."""
MAX_RECORDS = 500
"""Maximum number of records in an object, and of objects that correct the same object."""
PARALLEL_CALLS = 16
"""Maximum number of objects that all requests together read, or write, at the same time."""
ALLOWED, DONE, REFUSED, FAILED, UNKNOWN = OUTCOMES = ("allowed", "done", "refused", "failed", "unknown")

SUBMIT = "job submit"
"""Action of a submission."""

_NAME = re.compile(r"(\d{14}-[0-9a-f]{1,32})(-[0-9a-f]{1,32})?\.json")
"""Name of an object of the log. The first group is common to the names of an object and of its corrections."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """A request of a user.

    `action` is the command that makes the same request, such as `job cancel`. `object` names the changed job, pool,
    schedule, target, share, or user. The outcome is DONE if the manager made the change, REFUSED if the role of the
    user does not permit the request, and FAILED if the manager refused a permitted request. It is UNKNOWN if the answer
    was an error of the grid, after which the change may have taken effect. It is ALLOWED while the manager makes the
    change, and remains ALLOWED if the manager ended meanwhile. Earlier releases wrote ALLOWED for each permitted
    request. `request` is the id of the request. `count` is the number of requests that the record stands for. `reason`
    is the cause of a refusal or a failure, has the values of a change, or names the schedule that has submitted a job.
    """

    at_s: float
    user: str
    role: str
    action: str
    object: str = ""
    outcome: str = ALLOWED
    reason: str = ""
    request: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Selection of records. `action` selects a command or, for example with `job`, a group of commands.

    `since_s` and `until_s` are in epoch seconds.
    """

    user: str = ""
    action: str = ""
    outcome: str = ""
    since_s: float = 0.0
    until_s: float = math.inf

    def matches(self, record: AuditRecord) -> bool:
        """Return whether the selection contains the record."""
        return (
            self.user in ("", record.user)
            and (self.action in ("", record.action) or record.action.startswith(f"{self.action} "))
            and self.outcome in ("", record.outcome)
            and self.since_s <= record.at_s < self.until_s
        )


@dataclass(eq=False, slots=True)
class Entry:
    """A record to store.

    `corrects` is the name of the object with the earlier record of the same request, or "" for the first record. `name`
    is the name of the object with the record, or "" before the first write. After a failed write, the object may exist
    although `is_stored` is false.
    """

    record: AuditRecord
    corrects: str = ""
    name: str = ""
    is_stored: bool = False


@dataclass(slots=True)
class _Refusals:
    """Records of a user with one outcome since `begun_s` (monotonic). `more` counts requests without a record.

    `changes` is the number of failed changes that had an earlier record.
    """

    begun_s: float
    separate: int = 0
    changes: int = 0
    more: AuditRecord | None = None
    end: asyncio.Task[None] | None = None
    """Task that notes `more` REFUSALS_S after the first refusal."""


class AuditLog:
    """Writer and reader of the audit log of one manager."""

    def __init__(self, ports: Ports) -> None:
        self._objects, self._patience, self._clock, self._ids = ports.objects, ports.patience, ports.clock, ports.ids
        self._waiting: list[Entry] = []
        self._batch: list[Entry] = []
        """Entries of the running write."""
        self._writing: asyncio.Task[None] | None = None
        self._later: asyncio.Task[None] | None = None
        self._reads, self._writes = asyncio.Semaphore(PARALLEL_CALLS), asyncio.Semaphore(PARALLEL_CALLS)
        self._refusals: dict[tuple[str, str], _Refusals] = {}
        """Records of refused and failed requests by user and outcome."""
        self._pruned_s: float | None = None

    def record(
        self, user: str, role: str, action: str, subject: str = "", *, outcome: str = ALLOWED, reason: str = ""
    ) -> AuditRecord:
        """Return the record of a request that arrives now."""
        action, subject, reason = _short(action), _short(subject), _short(reason)
        return AuditRecord(self._clock.now_s(), user, role, action, subject, outcome, reason, self._fresh())

    def _fresh(self) -> str:
        """Return a new id without a prefix."""
        return self._ids.fresh("audit").rpartition("-")[2]

    async def store(self, entries: Sequence[Entry]) -> None:
        """Store new records. Raise BackendError if the records cannot be stored."""
        self._waiting += entries
        try:
            await self.flush()
        except BackendError:
            self._waiting = [one for one in self._waiting if one not in entries]
            # If all entries are stored, the error is about other records of the same write.
            if not all(entry.is_stored for entry in entries):
                raise

    def note(self, record: AuditRecord) -> None:
        """Store a record within FLUSH_S."""
        self._note(Entry(record))

    def correct(self, stored: Entry, outcome: str, reason: str = "") -> None:
        """Store the outcome of a stored record within FLUSH_S. `reason` precedes the reason of the stored record."""
        reasons = [text for text in (_short(reason), stored.record.reason) if text]
        self._note(Entry(replace(stored.record, outcome=outcome, reason="; ".join(reasons)), stored.name))

    def check_failures(self, user: str) -> None:
        """Raise Throttled if the user has caused too many failed changes."""
        failures = self._refusals.get((user, FAILED))
        if failures is None or failures.changes < MAX_REFUSALS:
            return
        wait_s = failures.begun_s + REFUSALS_S - self._clock.monotonic_s()
        if wait_s > 0:
            raise Throttled(
                f"Too many changes of the user {user} have failed: the limit is {MAX_REFUSALS} in {REFUSALS_S:.0f} s.",
                remedy=f"Correct the requests, and try again in {wait_s:.0f} s.",
            )

    def note_failed_change(self, user: str) -> None:
        """Count a change of the user that failed after its record was stored."""
        self._refusals_of((user, FAILED)).changes += 1

    def _note(self, entry: Entry) -> None:
        self._waiting.append(entry)
        if self._later is None or self._later.done():
            self._later = asyncio.get_running_loop().create_task(self._flush_later(), name="audit")

    def note_call(self, record: AuditRecord) -> None:
        """Store the record of a single call within FLUSH_S. One record stands for all calls of a user in this time."""
        same = replace(record, object="", reason="single call")
        for entry in self._waiting:
            one = entry.record
            # The object of a failed write may exist with the earlier count. `replace` is slow, so the comparison of the
            # reasons skips the records of other requests.
            is_similar = not entry.name and one.reason == same.reason
            if is_similar and replace(one, at_s=same.at_s, request=same.request, count=1) == same:
                entry.record = replace(one, count=one.count + 1)
                return
        self.note(same)

    def note_refusal(self, record: AuditRecord) -> None:
        """Store the record of a refused or failed request within FLUSH_S, unless the user has caused too many records.

        The request must not have an earlier record.
        """
        kind = record.user, record.outcome
        refusals = self._refusals_of(kind)
        if refusals.separate < MAX_REFUSALS:
            refusals.separate += 1
            self.note(record)
        elif refusals.more is None:
            refusals.more = replace(record, action="several", object="", reason=f"more {record.outcome} requests")
            end = self._end_refusals_later(kind, refusals.begun_s + REFUSALS_S - self._clock.monotonic_s())
            refusals.end = asyncio.get_running_loop().create_task(end, name="audit refusals")
        else:
            refusals.more = replace(refusals.more, count=refusals.more.count + 1)

    def _refusals_of(self, kind: tuple[str, str]) -> _Refusals:
        """Return the current records of a user with one outcome."""
        now_s = self._clock.monotonic_s()
        refusals = self._refusals.get(kind)
        if refusals is None or now_s - refusals.begun_s > REFUSALS_S:
            self._end_refusals(kind)
            refusals = self._refusals[kind] = _Refusals(now_s)
        return refusals

    def _end_refusals(self, kind: tuple[str, str]) -> None:
        refusals = self._refusals.pop(kind, None)
        if refusals and refusals.more:
            if refusals.end:
                refusals.end.cancel()
            self.note(refusals.more)

    async def _end_refusals_later(self, kind: tuple[str, str], wait_s: float) -> None:
        """Note the count after `wait_s` seconds, because the user may make no further request."""
        await asyncio.sleep(wait_s)
        self._refusals[kind].end = None  # A task must not cancel itself.
        self._end_refusals(kind)

    async def _flush_later(self) -> None:
        await asyncio.sleep(FLUSH_S)
        try:
            await self.flush()
        except BackendError as error:
            log.warning("%d audit records are not stored yet: %s", len(self._waiting), error)
        if self._waiting:
            self._later = asyncio.get_running_loop().create_task(self._flush_later(), name="audit")

    async def flush(self) -> None:
        """Store all records that wait now. Raise BackendError if the records cannot be stored.

        Records that arrive during the call do not prolong the call.
        """
        last = next(reversed((*self._batch, *self._waiting)), None)
        while last in (*self._batch, *self._waiting):
            if self._writing is None or self._writing.done():
                self._writing = asyncio.get_running_loop().create_task(self._write(), name="audit write")
            # A cancelled request must not cancel the write, because other requests wait for the write as well.
            await asyncio.shield(self._writing)

    async def _write(self) -> None:
        entries = self._batch = self._waiting
        self._waiting = []
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in entries:
            groups.setdefault((entry.corrects, entry.name), []).append(entry)
        parts = [g[at : at + MAX_RECORDS] for g in groups.values() for at in range(0, len(g), MAX_RECORDS)]
        for part in parts:
            name = part[0].name or self._name_of(part[-1])
            for entry in part:
                entry.name = name
        try:
            # The other writes must end before the failed records wait again.
            results = await asyncio.gather(*map(self._put, parts), return_exceptions=True)
            for error in results:
                if error is not None:
                    raise error
        finally:
            self._waiting = [*(entry for entry in entries if not entry.is_stored), *self._waiting]
            self._batch = []
        await self._prune()

    def _name_of(self, entry: Entry) -> str:
        """Return the name of a new object for the entry and others."""
        key = object_keys.audit(entry.record.at_s, self._fresh(), entry.corrects)
        return key.removeprefix(object_keys.AUDIT)

    async def _put(self, entries: Sequence[Entry]) -> None:
        """Store entries with the same name. All entries correct records of the same object, or none."""
        documents = [json_format.fields(entry.record) for entry in entries]
        data = json_format.to_bytes({"v": json_format.VERSION, "records": documents})
        key = f"{object_keys.AUDIT}{entries[0].name}"
        # The object exists if a write succeeded before, but its response was lost, because names are random.
        with suppress(AlreadyExists):
            async with self._writes:
                await self._patience(partial(self._objects.put, key, data, if_absent=True))
        for entry in entries:
            entry.is_stored = True

    async def _prune(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._pruned_s is not None and now_s - self._pruned_s < PRUNE_S:
            return
        self._pruned_s = now_s
        last = object_keys.audit(self._clock.now_s() - KEEP_S, "")
        try:
            async for page in self._objects.list(object_keys.AUDIT, after=last):
                await self._objects.delete([info.key for info in page])
        except BackendError as error:
            log.warning("old audit records are not removed yet: %s", error)

    async def close(self) -> None:
        """Store the records that wait."""
        for kind in list(self._refusals):
            self._end_refusals(kind)
        if self._later:
            self._later.cancel()
        try:
            await self.flush()
        except BackendError as error:
            log.error("%d audit records are lost: %s", len(self._waiting), error)
        if self._later:
            self._later.cancel()

    async def page(self, wanted: AuditFilter, limit: int, before: str = "") -> tuple[list[AuditRecord], str | None]:
        """Return records with the newest first, and the value of `before` for the next page, or None at the end.

        A page has `limit` records, unless the page has read MAX_SCANNED objects or the log ends. `before` is the name
        of the last object that was read. If the page ends within an object, a colon and the number of its records that
        were read follow.
        """
        if not before:
            await self.flush()
        name, _, count = before.partition(":")
        # The objects that correct an object sort directly before the object, so the page reads them again.
        after = name.removesuffix(".json") if count else name
        skipped = int(count or 0)
        records: list[AuditRecord] = []
        scanned = 0
        async for name, found, objects in self._moments(f"{object_keys.AUDIT}{after}" if after else ""):
            if object_keys.audit_time(f"{object_keys.AUDIT}{name}") < wanted.since_s - FLUSH_S:
                break
            for number, record in enumerate(found):
                if number >= skipped and wanted.matches(record):
                    if len(records) == limit:
                        return records, f"{name}:{number}"
                    records.append(record)
            skipped, scanned = 0, scanned + objects
            if len(records) == limit or scanned >= MAX_SCANNED:
                return records, name
        return records, None

    async def _moments(self, after: str) -> AsyncIterator[tuple[str, list[AuditRecord], int]]:
        """Yield the name of each object after the key `after`, its corrected records, and the number of objects read.

        The newest records are the first. An object that corrects another object is not yielded separately: its records
        have the outcomes of the other object's records. If the other object is lost, these records take its place.
        """
        current = ""
        corrections: dict[str, AuditRecord] = {}
        objects = 0
        async for name, found in self._read_all(after):
            corrected = object_keys.corrected_audit(name) or name
            if corrected != current and objects:  # The corrected object does not exist.
                yield current, list(corrections.values()), objects
                corrections, objects = {}, 0
            current, objects = corrected, objects + 1
            if corrected == name:
                records = [_corrected(record, corrections.pop(record.request, None)) for record in reversed(found)]
                yield name, [*corrections.values(), *records], objects
                corrections, objects = {}, 0
            else:
                corrections |= {record.request: record for record in found}
        if objects:
            yield current, list(corrections.values()), objects

    async def _read_all(self, after: str) -> AsyncIterator[tuple[str, Sequence[AuditRecord]]]:
        """Yield the name and the records of each object whose key sorts after `after`."""
        moment, number = "", 0
        async for infos in self._objects.list(object_keys.AUDIT, after=after):
            keys = []
            for info in infos:
                found = _NAME.fullmatch(info.key.removeprefix(object_keys.AUDIT))
                if found is None or info.size > MAX_BYTES:
                    log.error("%s with %d bytes is not an object of the audit log", info.key, info.size)
                    continue
                number, moment = (number + 1 if found[1] == moment else 1), found[1]
                if number <= MAX_RECORDS or found[2] is None:
                    keys.append(info.key)
            for first in range(0, len(keys), PARALLEL_CALLS):
                batch = keys[first : first + PARALLEL_CALLS]
                for key, records in zip(batch, await asyncio.gather(*map(self._read, batch)), strict=True):
                    yield key.removeprefix(object_keys.AUDIT), records

    async def _read(self, key: str) -> Sequence[AuditRecord]:
        records = []
        invalid = 0
        try:
            async with self._reads:
                content = await self._patience(partial(self._objects.get, key))
            for doc in list_items(json_format.loads(content)["records"]):
                try:
                    records.append(_record_of(doc))
                except UNREADABLE:
                    invalid += 1
        except NotFound:
            return ()  # The object was removed, because it is old.
        except (BackendError, *UNREADABLE) as error:
            log.error("the audit records %s cannot be read: %s", key, error)
        if invalid:
            log.error("%d audit records in %s are not valid", invalid, key)
        return records


class Change:
    """A permitted change of a user, and the records of its request.

    The caller stores the records with `store` before it makes the change, and calls `end` after the change. A
    submission has no earlier record, because the job's definition names its owner.
    """

    def __init__(self, audit: AuditLog, user: str, role: str, action: str, subject: str = "") -> None:
        self.record = audit.record(user, role, action, subject)
        """Record of the request, or the last record if the request has several."""
        self.stored: list[Entry] = []
        """Entries given to the log. After a failed write, the bucket may or may not have their records."""
        self._audit = audit
        self._has_begun = action == SUBMIT
        """Whether the caller may have begun the change."""

    async def store(self, subject: str, reasons: Sequence[str] = ("",)) -> None:
        """Store one record for each reason. Raise Throttled if too many changes of the user have failed, and
        BackendError if the records cannot be stored. The change must not begin after an error."""
        old, self._has_begun = self.record, False
        self.record = replace(old, object=_short(subject))
        self._audit.check_failures(old.user)
        entries = [Entry(self._audit.record(old.user, old.role, old.action, subject, reason=text)) for text in reasons]
        self.record = entries[-1].record
        self.stored += entries
        await self._audit.store(entries)
        self._has_begun = True

    def end(self, status: int, error: str = "") -> None:
        """Note the outcome of the change. `status` is the HTTP status of the answer."""
        outcome, reason = self._outcome(status), f"{status}: {error}" if status >= 400 else ""
        written = [entry for entry in self.stored if entry.name]
        for entry in written:
            self._audit.correct(entry, outcome, reason)
        if outcome == DONE:
            # If no record was stored, the code of the change has noted its own record, or nothing has changed.
            return
        if written:
            self._audit.note_failed_change(self.record.user)
        else:
            record = self.record
            reasons = [text for text in (_short(reason), record.reason) if text]
            self._audit.note_refusal(replace(record, outcome=outcome, reason="; ".join(reasons)))

    def _outcome(self, status: int) -> str:
        if status < 400:
            return DONE
        if status == 403:
            return REFUSED
        # After an error of the grid, the bucket may have the change although the ledger lacks it.
        return UNKNOWN if status >= 500 and self._has_begun else FAILED


def _short(value: str, limit: int = MAX_TEXT) -> str:
    # A surrogate without a partner cannot be encoded.
    return value[:limit].encode(errors="replace").decode()


def _corrected(record: AuditRecord, correction: AuditRecord | None) -> AuditRecord:
    return replace(record, outcome=correction.outcome, reason=correction.reason) if correction else record


def _record_of(doc: Any) -> AuditRecord:
    record = decode(AuditRecord, doc)
    figure(record.at_s)
    values: dict[str, Any] = json_format.fields(record)
    texts = {name: _short(value) for name, value in values.items() if isinstance(value, str)}
    texts["reason"] = _short(record.reason, MAX_REASON)
    return replace(record, **{**values, **texts, "count": max(1, record.count)})
