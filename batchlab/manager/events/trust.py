"""Check of who may assert a fact in an event message.

Invariant: a fact about a sealed job counts only with the proof that the sender has the job's commit
key. A job of release 0.1.0 has no commit key, and its facts count as they always did.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Follow, JobId
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import jobs_in
from batchlab.core.protocol.messages import Events
from batchlab.core.protocol.seals import UNSEALED, proves, summary
from batchlab.manager.events.quarantine import Quarantine
from batchlab.manager.jobs.early_events import Arrivals
from batchlab.manager.state import Ports


class Trust:
    """Of one manager; `job_of` finds the definition of a job that the message does not prove."""

    def __init__(
        self,
        ports: Ports,
        arrivals: Arrivals,
        job_of: Callable[[JobId], Awaitable[JobDef | None]],
        quarantine: Quarantine,
    ) -> None:
        self._ports = ports
        self._arrivals = arrivals
        self._job_of = job_of
        self._quarantine = quarantine

    async def sift(
        self, events: Events, text: str, proofs: Mapping[str, str], id_: str
    ) -> tuple[Events, set[JobId]]:
        """Return the facts in the message `id_` that its sender may assert, and their jobs."""
        jobs = jobs_in(events)
        if not jobs:
            return events, jobs
        trusted = await self._proven(jobs, text, proofs)
        if trusted == jobs and not events.committed:
            return events, trusted  # a reader of events refuses follows of another job
        genuine = set(trusted)  # of a key, the seal counts
        untrue: set[JobId] = set()
        for job in sorted(jobs - trusted):
            await self._arrivals.ended({job})
            known = await self._job_of(job)
            if known and not known.commit_hash:
                trusted.add(job)
            elif known:
                untrue.add(job)
        sifted = replace(
            events,
            completions=tuple(
                one for one in events.completions if _is_one_job(trusted, one.bundle, one.follows)
            ),
            outcomes=tuple(
                one for one in events.outcomes if _is_one_job(trusted, one.bundle, one.follows)
            ),
            committed=tuple(
                [one for one in events.committed if await self._is_genuine(one, trusted, genuine)]
            ),
            duplicates=tuple(one for one in events.duplicates if one.job in trusted),
            traces=tuple(one for one in events.traces if one[0] in trusted),
        )
        if dropped := _count(events) - _count(sifted):
            self._quarantine.unproven(id_, dropped, untrue)
        return sifted, trusted

    async def _proven(self, jobs: set[JobId], text: str, proofs: Mapping[str, str]) -> set[JobId]:
        if not proofs:
            return set()
        of_text = summary(text)
        return {
            job
            for job in sorted(jobs)
            if (given := proofs.get(job))
            and proves(await self._ports.keys.new(job), of_text, given)
        }

    async def _is_genuine(self, name: str, trusted: set[JobId], proven: set[JobId]) -> bool:
        found = object_keys.outcome_key(name)
        if found is None or found.job not in trusted:
            return False
        key = await self._ports.keys.new(found.job) if found.job in proven else UNSEALED
        return object_keys.is_genuine(name, key)


def _is_one_job(trusted: set[JobId], bundle: Bundle, follows: tuple[Follow, ...]) -> bool:
    return bundle.job in trusted and all(one.bundle.job == bundle.job for one in follows)


def _count(events: Events) -> int:
    parts = (events.completions, events.outcomes, events.committed, events.duplicates)
    return sum(map(len, parts)) + len(events.traces)
