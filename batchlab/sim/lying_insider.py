"""Lies of a worker that has the commit keys of some jobs: outcomes with seals and events with proofs.

Invariant: a lie has a valid seal or proof of a job whose messages the worker received, and breaks one other rule. The
insider uses only the functions that make seals and proofs, never a writer of the product.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.core.ports import Message
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.object_keys import CommitKey, proof, seal, summary
from batchlab.core.protocol.values import OUTCOME_WEIGHT
from batchlab.sim.event_log import doc_of
from batchlab.sim.lying_worker import ODD_VALUES, UNREADABLE_BODIES, Doc, Liar, WorkerPorts, bundle_id, tasks_in

MAX_LIES = 24
GAP_S = (0.1, 6.0)
"""Range of seconds between two lies."""
TAKING_SHARE = 0.3
"""Share of insiders that also receive messages themselves, and do not run the tasks of the messages."""
MAX_TASKS = 40
"""Maximum number of task messages that an insider remembers."""
FORGED_STARTS = 3
"""Number of forged deaths of workers, which makes a task count as poison."""


class Insider:
    """Lying part of one worker that uses commit keys. `liar` is the lying part without commit keys."""

    def __init__(self, ports: WorkerPorts, liar: Liar, rng: random.Random) -> None:
        self._ports, self._liar, self._rng = ports, liar, rng
        self._tasks: list[Doc] = []
        """Remembered task messages with a commit key, sorted from oldest to newest."""
        self._takes = rng.random() < TAKING_SHARE
        self._may_be_huge = True
        self._lies: Sequence[Callable[[], Awaitable[None]]] = (
            self._commit_foreign_references,
            self._commit_foreign_references,
            self._commit_huge_outcome,
            self._commit_unreadable,
            self._commit_foreign_follow,
            self._commit_odd_outcome,
            self._report_on_another_job,
            self._report_on_another_job,
            self._claim_foreign_bundle,
            self._claim_foreign_bundle,
            self._send_odd_completion,
            self._forge_starts,
            self._forge_starts,
            self._forge_starts,
            self._send_foreign_task,
            self._send_foreign_task,
        )

    async def lie(self, pace: float) -> None:
        """Tell MAX_LIES lies. The expected errors of services are ignored."""
        for _ in range(MAX_LIES):
            await asyncio.sleep(self._rng.uniform(*GAP_S) * pace)
            try:
                await self._remember_tasks()
                await self._rng.choice(self._lies)()
            except (BackendError, ValueError):
                continue

    async def _remember_tasks(self) -> None:
        """Remember the task messages that the worker has received."""
        bodies = [body for queue, body in self._ports.bodies() if queue != object_keys.EVENTS]
        if self._takes and self._rng.random() < 0.3:
            queue = object_keys.tasks_queue(self._ports.who.pool)
            messages: Sequence[Message] = await self._ports.queue.receive(queue, max_messages=2, wait_s=0.0)
            bodies += [message.body for message in messages]
        for doc in map(doc_of, bodies):
            # Messages from other lying workers may be malformed.
            bundle = doc["b"] if isinstance(doc.get("b"), dict) else {}
            if all(isinstance(text, str) for text in (doc.get("ck"), bundle.get("j"), bundle.get("s"))):
                self._tasks.append(doc)
        self._tasks = self._tasks[-MAX_TASKS:]

    def _task(self) -> tuple[Doc, CommitKey]:
        """Return a received bundle with its commit key."""
        if not self._tasks:
            raise ValueError("no message was received")
        doc = self._rng.choice(self._tasks)
        return doc["b"], CommitKey(doc["ck"])

    # --- Sealed outcomes -------------------------------------------------------------------------

    async def _commit(self, bundle: Doc, key: CommitKey, data: bytes) -> str:
        """Store `data` under the key of the bundle's outcome, and return the key."""
        name = bundle_id(bundle)
        spread = hashlib.sha256(name.encode()).hexdigest()[:2]
        sealed = seal(key, "outcome", bundle["s"], name)
        where = f"jobs/{bundle['j']}/{bundle['s']}/outcomes/{spread}/{name}.{sealed}.json"
        await self._ports.objects.put(where, data, if_absent=True)
        return where

    async def _commit_outcome(self, bundle: Doc, **changes: Any) -> None:
        key = next(CommitKey(task["ck"]) for task in self._tasks if task["b"] == bundle)
        doc = {**self._liar.outcome(bundle), **changes}
        try:
            where = await self._commit(bundle, key, json.dumps(doc).encode())
        except AlreadyExists:
            return  # The bundle already has a committed outcome.
        parts = self._rng.choice(({"o": [doc]}, {"k": [where]}))
        await self._send_proven({bundle["j"]: key}, **parts)

    async def _commit_foreign_references(self) -> None:
        """Commit results of several bundles that refer to an object that belongs to no job."""
        reference = {"$value": await self._ports.bait(self._rng)}
        for doc in self._tasks[-5:]:
            bundle = doc["b"]
            await self._commit_outcome(bundle, values=[reference] * tasks_in(bundle))

    async def _commit_foreign_follow(self) -> None:
        """Commit an outcome whose follow-up is a bundle of another job."""
        follow = {"b": self._liar.a_bundle(), "d": self._rng.choice((0.0, 1e9))}
        await self._commit_outcome(self._task()[0], follows=[follow])

    async def _commit_odd_outcome(self) -> None:
        name = self._rng.choice(("worker", "execution", "succeeded", "values", "run_s", "log"))
        await self._commit_outcome(self._task()[0], **{name: self._rng.choice(ODD_VALUES)})

    async def _commit_unreadable(self) -> None:
        bundle, key = self._task()
        data = self._rng.choice(UNREADABLE_BODIES)
        data = data if isinstance(data, bytes) else data.encode()
        where = await self._commit(bundle, key, data)
        await self._send_proven({bundle["j"]: key}, k=[where])

    async def _commit_huge_outcome(self) -> None:
        """Commit an outcome that is larger than allowed, at most once for each insider."""
        bundle, key = self._task()
        if self._may_be_huge:
            self._may_be_huge = False
            where = await self._commit(bundle, key, b" " * (OUTCOME_WEIGHT + 1))
            await self._send_proven({bundle["j"]: key}, k=[where])

    # --- Proven events ---------------------------------------------------------------------------

    async def _send_proven(self, keys: dict[str, CommitKey], **parts: Any) -> None:
        """Send an event with the proofs of the jobs in `keys`."""
        text = json.dumps({"v": 1, **parts}, separators=(",", ":"))
        proofs = {job: proof(key, summary(text)) for job, key in keys.items()}
        proof_text = json.dumps(proofs, separators=(",", ":"))
        await self._ports.send(object_keys.EVENTS, f'{{"p":{proof_text},{text[1:]}')

    async def _report_on_another_job(self) -> None:
        """Report on another job with a proof of the worker's own job, under one job's name or both names."""
        bundle, key = self._task()
        other = self._liar.a_bundle()
        jobs = self._rng.choice(([bundle["j"]], [other["j"]], [bundle["j"], other["j"]]))
        completion = self._liar.completion(other)
        outcome = self._liar.odd_outcome(other)
        parts = self._rng.choice(({"c": [completion]}, {"o": [outcome]}))
        await self._send_proven(dict.fromkeys(jobs, key), **parts)

    async def _send_odd_completion(self) -> None:
        """Send a valid completion together with a malformed one."""
        bundle, key = self._task()
        good, odd = self._liar.completion(bundle), self._liar.completion(bundle)
        odd[self._rng.choice(sorted(odd))] = self._rng.choice(ODD_VALUES)
        await self._send_proven({bundle["j"]: key}, c=[good, odd])

    async def _claim_foreign_bundle(self) -> None:
        """Claim a bundle of another job together with a bundle of the worker's own job."""
        bundle, key = self._task()
        queue = object_keys.tasks_queue(self._ports.who.pool)
        held = [
            {
                "queue": queue,
                "receipt": f"{self._rng.randrange(400)}.1",
                "job": claimed["j"],
                "stage": claimed["s"],
                "bundle": bundle_id(claimed),
                "running": True,
            }
            for claimed in (bundle, self._liar.a_bundle())
        ]
        beat = self._liar.beat(self._ports.who.worker, held=held, busy=1)
        # The manager uses the heartbeat with the highest number of each worker.
        beat["number"] = 10**6 + self._rng.randrange(10**6)
        await self._send_proven({bundle["j"]: key}, h=[beat])

    # --- Markers and messages --------------------------------------------------------------------

    async def _forge_starts(self) -> None:
        """Forge start markers of workers that died, for tasks that are alone in their bundles."""
        alone = [open_bundle for open_bundle in self._liar.open_bundles() if tasks_in(open_bundle) == 1]
        for other in self._rng.sample(alone, min(FORGED_STARTS, len(alone))):
            stage, name = str(other["s"]), bundle_id(other)
            sealed = ""
            if self._tasks and self._rng.random() < 0.5:
                bundle, key = self._task()
                if bundle["j"] != other["j"]:  # The key of another job makes a wrong seal.
                    sealed = f".{seal(key, 'start', stage, name)}"
            for number in range(FORGED_STARTS):
                data = json.dumps({"v": 1, "worker": f"w-forged{number}", "at_s": 1.0})
                folder = f"jobs/{other['j']}/{stage}/starts/{name}"
                where = f"{folder}/w-forged{number}-1{sealed}"
                try:
                    await self._ports.objects.put(where, data.encode(), if_absent=True)
                except AlreadyExists:
                    continue

    async def _send_foreign_task(self) -> None:
        """Send a task message for another job's bundle with the commit key of the worker's own job."""
        bundle, key = self._task()
        other = self._liar.a_bundle()
        if other["j"] != bundle["j"]:
            doc = {"v": 1, "b": other, "ck": key, "in": [666] * tasks_in(other)}
            await self._ports.send(self._liar.tasks_queue(), json.dumps(doc))
