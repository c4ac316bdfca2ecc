"""Poison detection: find the tasks that crash their workers.

Invariant (promise I7): a bundle that returned without an outcome is split in half until each bundle has a single task.
A bundle with a single task fails after LOSS_LIMIT workers have started the task and then died. Only recorded starts
count, so a message that a dying worker had only prefetched does not count. Poison detection does not use up the retries
of a task. A live worker renews its start markers, so concurrent copies of a task do not count as deaths.
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
from batchlab.core.port_retries import raise_if_cancelled, set_within
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.field_checks import UNREADABLE, figure, label
from batchlab.core.protocol.object_keys import CommitKey, seal
from batchlab.worker.inflight_message import InflightMessage, WorkerContext

log = logging.getLogger(__name__)


def marker(worker: str, now_s: float, name: str, key: CommitKey) -> bytes:
    """Return the content of the start marker or running marker `name`.

    The content of a marker has a seal, because any worker can list the names of markers.
    """
    doc: dict[str, Json] = {"v": json_format.VERSION, "worker": worker, "at_s": now_s}
    if key:
        doc["seal"] = seal(key, "marker", name, worker, repr(now_s))
    return json_format.to_bytes(doc)


def marked_s(data: bytes, name: str, key: CommitKey) -> float | None:
    """Return the time in seconds since the epoch at which the marker `name` was written.

    Any worker can overwrite a marker, so the content must have a seal. Return None if the content is malformed or has a
    wrong seal.
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
    """Error if LOSS_LIMIT workers have started the bundle, but some of the workers may be alive."""


class PoisonDetector:
    """Poison detection of one worker.

    A worker counts as dead if it has not renewed a start marker for the visibility timeout. A draining worker does not
    wait for the visibility timeout.
    """

    def __init__(self, context: WorkerContext, draining: asyncio.Event) -> None:
        self._context = context
        self._worker = context.who.worker
        self._stale_s = context.settings.visibility_s
        self._draining = draining
        self._started: dict[str, InflightMessage] = {}
        """In-flight messages with a recorded start, by execution."""

    async def run(self) -> None:
        """Renew the start markers of running bundles forever."""
        for number in count(1):
            raise_if_cancelled()
            await asyncio.sleep(self._stale_s / 4)
            for execution, inflight in list(self._started.items()):
                if execution not in self._started:
                    continue
                try:
                    await self._write_marker(inflight, str(number))
                except BackendError as error:
                    log.warning("a start marker could not be renewed: %s", error)

    async def outcome(self, inflight: InflightMessage) -> Outcome | None:
        """Return the committed outcome of the bundle, if it exists."""
        return await committed(self._context.objects, inflight.bundle, self._context.patience, inflight.key)

    async def verdict(self, inflight: InflightMessage) -> Outcome | None:
        """Return the outcome of the bundle, or None if the bundle must run.

        A bundle that must be halved or fails as poison gets a committed outcome. Raise RunsElsewhereError if the
        workers that started the bundle may be alive.
        """
        bundle = inflight.bundle
        if outcome := await self.outcome(inflight):
            return outcome
        author = {"execution": inflight.execution, "worker": self._worker}
        draft: Outcome | None = None
        now_s = self._context.clock.now_s()
        if len(bundle.tasks) > 1:
            if inflight.suspicion > 1:
                draft = settlement.bisect(bundle, **author, now_s=now_s)
        else:
            deaths = await self._count_deaths(inflight)
            inflight.alone = deaths == settlement.LOSS_LIMIT - 1
            if deaths >= settlement.LOSS_LIMIT:
                reason = f"killed its worker {deaths} times: each started it and died without a result"
                draft = settlement.poisoned(bundle, reason, **author, now_s=now_s)
        if draft is None:
            return None
        return await commit(self._context.objects, draft, self._context.patience, inflight.key)

    async def _count_deaths(self, inflight: InflightMessage) -> int:
        """Return the number of workers that have started the bundle and then died.

        If fewer than LOSS_LIMIT workers have started the bundle, the result is the number of starts, without a check
        for deaths. A marker that stays unchanged proves the death of its worker. The time in a marker proves nothing,
        because clocks differ.
        """
        bundle = inflight.bundle
        before = await self._starts(bundle, inflight.key)
        if len(before) < settlement.LOSS_LIMIT:
            return len(before)
        await set_within(self._draining, self._stale_s)
        after = await self._starts(bundle, inflight.key)
        dead = [worker for worker, seen in before.items() if worker != self._worker and after[worker] == seen]
        if len(dead) < settlement.LOSS_LIMIT or self._draining.is_set():
            raise RunsElsewhereError(f"{bundle.id} may be running in one of {len(after)} workers")
        return len(dead)

    async def _starts(self, bundle: Bundle, key: CommitKey) -> Mapping[str, frozenset[str]]:
        """Return the versions of the start markers by worker.

        Forged and withdrawn start markers do not count. The starts of the worker itself count while their bundles run.
        """
        versions: dict[str, frozenset[str]] = defaultdict(frozenset)
        withdrawn: set[str] = set()
        async for page in self._context.objects.list(object_keys.starts(bundle)):
            for info in page:
                marked = object_keys.started_by(bundle, info.key, key)
                if marked is None:
                    log.warning("a start marker has a wrong seal and is ignored")
                    continue
                execution, suffix = marked
                if suffix == object_keys.WITHDRAWN:
                    withdrawn.add(execution)
                # Workers of batchlab 0.1.0 renew a marker by overwriting the marker.
                versions[execution] |= {f"{suffix} {info.etag}"}
        by_worker: dict[str, frozenset[str]] = defaultdict(frozenset)
        for execution, seen in versions.items():
            worker = execution.rpartition("-")[0]
            if execution not in withdrawn and (worker != self._worker or execution in self._started):
                by_worker[worker] |= seen
        return by_worker

    async def begin(self, inflight: InflightMessage) -> None:
        """Record the start of a suspect bundle before the bundle starts.

        A recorded start counts even if the worker dies before the actual start.
        """
        if len(inflight.bundle.tasks) == 1:
            self._started[inflight.execution] = inflight
            await self._context.patience(partial(self._write_marker, inflight))

    async def _write_marker(self, inflight: InflightMessage, suffix: str = "") -> None:
        name = object_keys.start(inflight.bundle, inflight.execution, inflight.key, suffix)
        data = marker(self._worker, self._context.clock.now_s(), name, inflight.key)
        # Only the worker itself uses the marker's name, so an existing object is from an earlier try of the same call.
        with suppress(AlreadyExists):
            await self._context.objects.put(name, data, if_absent=True)

    def end(self, inflight: InflightMessage) -> None:
        """Stop renewing the start marker, because the bundle has ended."""
        self._started.pop(inflight.execution, None)

    async def withdraw(self, inflight: InflightMessage) -> None:
        """Withdraw the recorded start, because the run ended without a fault of the task.

        A start is withdrawn when the worker drains or a service fails.
        """
        self.end(inflight)
        if inflight.suspicion and len(inflight.bundle.tasks) == 1:
            try:
                await self._write_marker(inflight, object_keys.WITHDRAWN)
            except BackendError as error:
                # The start marker stays in the bucket and counts as one start too many. This is harmless, because a
                # task fails only after LOSS_LIMIT starts.
                log.warning("the start marker could not be withdrawn: %s", error)

    async def runs_elsewhere(self, inflight: InflightMessage) -> bool:
        """Return whether another worker still refreshes the running marker of the bundle."""
        name = object_keys.running(inflight.bundle, inflight.key)
        try:
            data = await self._context.patience(partial(self._context.objects.get, name))
        except NotFound:
            return False
        at_s = marked_s(data, name, inflight.key)
        if at_s is None:
            log.warning("a running marker has a wrong seal and is ignored")
        return at_s is not None and self._context.clock.now_s() - at_s < self._context.settings.marker_stale_s
