"""Poison detection: it finds tasks that crash their workers.

Invariant (I7): a bundle that returned without an outcome is halved until its tasks are alone in
their bundles. A lone task fails after LOSS_LIMIT workers have started it and then died. Only
recorded starts count, so a message that a dying worker had only prefetched is not counted. Retries
of the task are not affected. A live worker renews its start markers, so concurrent copies of a task
do not count as deaths.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import count

from batchlab.core.commit import commit, committed
from batchlab.core.errors import AlreadyExists, BackendError, Malformed, NotFound, TooNew
from batchlab.core.model import Bundle, Json, Outcome
from batchlab.core.port_retries import Patience, heed_cancellation, set_within
from batchlab.core.ports import Clock, Objects
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.field_checks import UNREADABLE, figure, label
from batchlab.core.protocol.object_keys import CommitKey, seal
from batchlab.worker.inflight_message import InflightMessage

log = logging.getLogger(__name__)


def marker(worker: str, now_s: float, name: str, key: CommitKey) -> bytes:
    """Return the content of the start or running marker `name`.

    Names of markers are visible in the bucket's list, so the content is sealed too.
    """
    doc: dict[str, Json] = {"v": json_format.VERSION, "worker": worker, "at_s": now_s}
    if key:
        doc["seal"] = seal(key, "marker", name, worker, repr(now_s))
    return json_format.to_bytes(doc)


def marked_s(data: bytes, name: str, key: CommitKey) -> float | None:
    """Return when the marker `name` was written, in seconds since the epoch.

    Return None if it cannot be read or its seal is wrong, because any worker can overwrite it.
    """
    try:
        doc = json_format.loads(data)
        at_s, worker = float(figure(doc["at_s"])), label(doc["worker"])
    except (Malformed, TooNew, *UNREADABLE):
        return None
    if key and doc.get("seal") != seal(key, "marker", name, worker, repr(at_s)):
        return None
    return at_s


class RunsElsewhereError(BackendError):
    """LOSS_LIMIT workers have started the bundle, but some of them may be alive."""


class PoisonDetector:
    """Poison detection of one worker."""

    def __init__(
        self, objects: Objects, clock: Clock, patience: Patience, worker: str, stale_s: float, leaving: asyncio.Event
    ) -> None:
        """Treat a start that is not renewed for `stale_s` as one of a dead worker.

        Once `leaving` is set, the worker does not wait that long.
        """
        self._objects = objects
        self._clock = clock
        self._patience = patience
        self._worker = worker
        self._stale_s = stale_s
        self._leaving = leaving
        self._begun: dict[str, InflightMessage] = {}
        """In-flight messages whose start this worker has recorded, by execution."""

    async def keep(self) -> None:
        """Renew the start markers of running bundles forever."""
        for number in count(1):
            heed_cancellation()
            await asyncio.sleep(self._stale_s / 4)
            for execution, inflight in list(self._begun.items()):
                if execution not in self._begun:
                    continue
                try:
                    await self._write(inflight, str(number))
                except BackendError as error:
                    log.warning("a start marker could not be renewed: %s", error)

    async def outcome(self, inflight: InflightMessage) -> Outcome | None:
        """Return the committed outcome of the bundle."""
        return await committed(self._objects, inflight.bundle, self._patience, inflight.key)

    async def verdict(self, inflight: InflightMessage) -> Outcome | None:
        """Return the outcome of the bundle, or None if the bundle must run.

        Commit an outcome if the bundle must be halved or fails as poison. Raise RunsElsewhereError
        if that cannot be decided yet.
        """
        bundle = inflight.bundle
        done = await self.outcome(inflight)
        if done:
            return done
        judged: Outcome | None = None
        now_s = self._clock.now_s()
        if len(bundle.tasks) > 1:
            if inflight.suspicion > 1:
                judged = settlement.bisect(bundle, execution=inflight.execution, worker=self._worker, now_s=now_s)
        else:
            killed = await self._killed(inflight)
            inflight.alone = killed == settlement.LOSS_LIMIT - 1
            if killed >= settlement.LOSS_LIMIT:
                judged = settlement.poisoned(
                    bundle,
                    f"killed its worker {killed} times: each started it and died without a result",
                    execution=inflight.execution,
                    worker=self._worker,
                    now_s=now_s,
                )
        if judged is None:
            return None
        return await commit(self._objects, judged, self._patience, inflight.key)

    async def _killed(self, inflight: InflightMessage) -> int:
        """Return how many workers have started the bundle and, once they are enough, have died.

        A death is detected by an unchanged marker, not by its time, because clocks differ.
        """
        bundle = inflight.bundle
        before = await self._starts(bundle, inflight.key)
        if len(before) < settlement.LOSS_LIMIT:
            return len(before)
        await set_within(self._leaving, self._stale_s)
        after = await self._starts(bundle, inflight.key)
        dead = [one for one, seen in before.items() if one != self._worker and after[one] == seen]
        if len(dead) < settlement.LOSS_LIMIT or self._leaving.is_set():
            raise RunsElsewhereError(f"{bundle.id} may be running in one of {len(after)} workers")
        return len(dead)

    async def _starts(self, bundle: Bundle, key: CommitKey) -> Mapping[str, frozenset[str]]:
        """Return the versions of the start markers by worker.

        Forged and withdrawn starts do not count. This worker's own starts count while they run.
        """
        versions: dict[str, frozenset[str]] = defaultdict(frozenset)
        withdrawn: set[str] = set()
        async for page in self._objects.list(object_keys.starts(bundle)):
            for info in page:
                marked = object_keys.started_by(bundle, info.key, key)
                if marked is None:
                    log.warning("a start marker has a wrong seal and is ignored")
                    continue
                execution, then = marked
                if then == object_keys.WITHDRAWN:
                    withdrawn.add(execution)
                # Workers of release 0.1.0 renew a marker by overwriting it.
                versions[execution] |= {f"{then} {info.etag}"}
        found: dict[str, frozenset[str]] = defaultdict(frozenset)
        for execution, seen in versions.items():
            worker = execution.rpartition("-")[0]
            if execution not in withdrawn and (worker != self._worker or execution in self._begun):
                found[worker] |= seen
        return found

    async def begin(self, inflight: InflightMessage) -> None:
        """Record the start of a suspect bundle before it starts.

        If the worker dies between the record and the start, the start counts anyway.
        """
        if len(inflight.bundle.tasks) == 1:
            self._begun[inflight.execution] = inflight
            await self._patience(partial(self._write, inflight))

    async def _write(self, inflight: InflightMessage, then: str = "") -> None:
        name = object_keys.start(inflight.bundle, inflight.execution, inflight.key, then)
        data = marker(self._worker, self._clock.now_s(), name, inflight.key)
        # Only this worker uses the name, so an existing object is from an earlier try of this call.
        with suppress(AlreadyExists):
            await self._objects.put(name, data, if_absent=True)

    def end(self, inflight: InflightMessage) -> None:
        """Stop renewing the start marker, because the bundle has ended."""
        self._begun.pop(inflight.execution, None)

    async def withdraw(self, inflight: InflightMessage) -> None:
        """Withdraw the recorded start.

        The run ended without a fault of the task: the worker is leaving, or a service failed.
        """
        self.end(inflight)
        if inflight.suspicion and len(inflight.bundle.tasks) == 1:
            try:
                await self._write(inflight, object_keys.WITHDRAWN)
            except BackendError as error:
                # One start too many is counted. A task fails only after LOSS_LIMIT starts.
                log.warning("its start marker could not be withdrawn: %s", error)

    async def runs_elsewhere(self, inflight: InflightMessage, stale_s: float) -> bool:
        """Return whether another worker still refreshes the running marker of the bundle."""
        name = object_keys.running(inflight.bundle, inflight.key)
        try:
            data = await self._patience(partial(self._objects.get, name))
        except NotFound:
            return False
        at_s = marked_s(data, name, inflight.key)
        if at_s is None:
            log.warning("a running marker has a wrong seal and is ignored")
        return at_s is not None and self._clock.now_s() - at_s < stale_s
