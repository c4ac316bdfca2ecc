"""Lying worker, which forges every kind of message and object that its role allows it to write.

Invariant: a lie consists of raw JSON and of names read from the bucket. A lying worker does not use the readers and
writers of the product, so no check of the product can prevent a lie. All choices of a lying worker come from its random
source.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import BackendError
from batchlab.core.ports import MAX_BATCH, Clock, Message, Objects, Outgoing, Queue
from batchlab.core.protocol import object_keys
from batchlab.sim.actors import Actor
from batchlab.sim.event_log import doc_of
from batchlab.sim.worker_rights import Trust
from batchlab.worker.inflight_message import Identity

Doc = dict[str, Any]

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**9,
    10**30,
    1e300,
    -1e300,
    1e18,
    "",
    "7",
    "\ud800",
    "a/b",
    "../..",
    ".",
    [],
    {},
    [[]],
    [[0, 10**12]],
    [[5, 1]],
    "x" * 5_000,
    "pickle:../../x",
    "\u0000",
)
"""Odd JSON values that a reader must limit or reject."""
UNREADABLE_BODIES: tuple[str | bytes, ...] = ('{"v":1}', "", "{", "[" * 5_000, '{"v":9}', "null", b"\xff\xfe")
NUMBERS: tuple[Any, ...] = (10**9, 10**30, 1, 0, -1, 1e300, "7")


_OUTCOME = re.compile(r"jobs/([^/]+)/([^/]+)/outcomes/../(\d+)-(\d+)\.(\d+)\.(\d+)\..*")


def dicts(doc: Any) -> Iterator[Doc]:
    """Yield every object in a JSON document, with outer objects before inner objects."""
    if isinstance(doc, dict):
        yield doc
        for value in list(doc.values()):
            yield from dicts(value)
    elif isinstance(doc, list):
        for value in doc:
            yield from dicts(value)


def bundle_id(bundle: Doc) -> str:
    try:
        first, last = bundle["t"][0][0], bundle["t"][-1][1] - 1
        return f"{first:08d}-{last:08d}.{bundle.get('r', 0)}.{bundle['a']}"
    except (IndexError, TypeError, ValueError, KeyError):
        return "00000000-00000000.0.1"


def tasks_in(bundle: Doc) -> int:
    try:
        return min(1_000, int(sum(stop - start for start, stop in bundle["t"])))
    except (TypeError, ValueError, OverflowError):
        return 1


def some_tasks(bundle: Doc) -> list[int]:
    try:
        return list(range(bundle["t"][0][0], min(bundle["t"][0][1], bundle["t"][0][0] + 3)))
    except (IndexError, TypeError, ValueError):
        return [0]


def guesses(keys: list[str]) -> list[Doc]:
    """Return guesses of further bundles, based on the keys of existing outcomes.

    A guessed bundle has the next tasks, the next attempt, or the same tasks in the next stage.
    """
    bundles: list[Doc] = []
    for key in keys:
        parts = _OUTCOME.fullmatch(key)
        if parts is None:
            continue
        job, stage = parts[1], parts[2]
        first, last, round_, attempt = map(int, parts.groups()[2:])
        same: Doc = {"j": job, "s": stage, "t": [[first, last + 1]], "r": round_, "a": attempt}
        bundles += [
            {**same, "t": [[last + 1, 2 * (last + 1) - first]]},
            {**same, "a": attempt + 1},
            {**same, "s": chr(ord(stage[0]) + 1)},
        ]
    return bundles


MAX_LIES = 40
GAP_S = (0.05, 4.0)
"""Range of seconds between two lies."""
LEARN_EVERY = 6
"""Number of lies after which a lying worker lists the bucket again."""


@dataclass(slots=True)
class WorkerPorts:
    """The ports and the identity of a lying worker.

    `bucket` is the object store without the limits of the worker's role.
    """

    actor: Actor
    who: Identity
    objects: Objects
    queue: Queue
    clock: Clock
    trust: Trust
    bucket: Objects
    baits: int = 0

    def bodies(self) -> Sequence[tuple[str, str]]:
        """Return the (queue, body) pairs of the last messages that the worker received or sent."""
        return self.trust.bodies(self.actor)

    async def send(self, queue: str, body: str) -> None:
        await self.queue.send(queue, [Outgoing(body)])

    async def bait(self, rng: random.Random) -> str:
        """Return the key of a new object that does not belong to any job of the worker."""
        self.baits += 1
        name = f"bait-{self.who.instance}-{self.baits}.json"
        folder = rng.choice(("grid/", "raw/nobody/", "code/", "boot/", "reports/nobody/"))
        key = folder + name
        await self.bucket.put(key, b'{"v":1}')
        self.trust.baits.add(key)
        return key


class Liar:
    """Lying part of one worker, which does not need the commit key of any job."""

    def __init__(self, ports: WorkerPorts, rng: random.Random) -> None:
        self._ports, self._rng = ports, rng
        self._who, self._clock = ports.who, ports.clock
        self._objects, self._queue = ports.objects, ports.queue
        self.keys: list[str] = []
        """Keys of objects in the last listing of the bucket."""
        self._bundles: list[Doc] = []
        self._jobs: list[str] = []
        self._pools = {ports.who.pool}
        self._workers: list[str] = []
        self._lies: Sequence[Callable[[], Awaitable[None]]] = (
            self._forge_beat_of_another,
            self._forge_beat_of_another,
            self._forge_beat_of_unknown,
            self._claim_bundles,
            self._send_completion,
            self._send_outcome,
            self._send_keys,
            self._send_counters,
            self._write_outcome,
            self._write_outcome,
            self._write_job,
            self._write_markers,
            self._write_markers,
            self._delete_markers,
            self._send_task,
            self._send_task,
            self._send_again,
            self._send_with_other_names,
            self._send_with_odd_values,
            self._send_noise,
            self._steal_messages,
            self._exceed_role,
        )

    async def lie(self, pace: float) -> None:
        """Tell MAX_LIES lies. The expected errors of services are ignored."""
        for number in range(MAX_LIES):
            await asyncio.sleep(self._rng.uniform(*GAP_S) * pace)
            try:
                if number % LEARN_EVERY == 0:
                    await self._read_bucket()
                await self._rng.choice(self._lies)()
            except (BackendError, ValueError):
                continue

    # --- Knowledge -------------------------------------------------------------------------------

    async def _read_bucket(self) -> None:
        """Read every job's definition and some outcomes, as the role allows, and guess further bundles."""
        keys: list[str] = []
        async for page in self._objects.list(object_keys.JOBS):
            keys += [info.key for info in page]
        self.keys = keys
        self._jobs = sorted({key.split("/")[1] for key in keys})
        chosen = [key for key in keys if key.endswith("/spec.json")]
        outcomes = [key for key in keys if "/outcomes/" in key]
        chosen += self._rng.sample(outcomes, min(5, len(outcomes)))
        for key in chosen[-20:]:
            try:
                doc = json.loads(await self._objects.get(key))
            except (ValueError, RecursionError):
                continue
            self._bundles += [bundle for bundle in dicts(doc) if {"j", "s", "t", "a"} <= bundle.keys()]
            self._pools |= {stage["pool"] for stage in dicts(doc) if isinstance(stage.get("pool"), str)}
            if isinstance(doc, dict) and isinstance(doc.get("worker"), str):
                self._workers.append(doc["worker"])
        self._bundles += guesses(self._rng.sample(outcomes, min(5, len(outcomes))))
        self._bundles = self._bundles[-200:]
        self._workers = self._workers[-50:]

    def open_bundles(self) -> list[Doc]:
        """Return the known bundles without an outcome in the last listing of the bucket."""
        done = {key.rpartition("/")[2] for key in self.keys if "/outcomes/" in key}
        names = {".".join(name.split(".")[:3]) for name in done}
        return [bundle for bundle in self._bundles if bundle_id(bundle) not in names]

    @property
    def _job(self) -> str:
        return self._rng.choice(self._jobs) if self._jobs else "job-0"

    def a_bundle(self) -> Doc:
        """Return a random known bundle of any job."""
        if self._bundles and self._rng.random() < 0.9:
            return self._rng.choice(self._bundles)
        return {"j": self._job, "s": self._rng.choice("abcd"), "t": [[0, 1]], "a": 1}

    @property
    def _victim(self) -> str:
        """Name of a worker to lie about, in most cases another worker."""
        return self._rng.choice(self._workers) if self._workers else self._who.worker

    def _remember(self, *, events: bool) -> list[Doc]:
        bodies = self._ports.bodies()
        docs = [doc_of(body) for queue, body in bodies if (queue == object_keys.EVENTS) is events]
        return [doc for doc in docs if doc]

    # --- Sending ---------------------------------------------------------------------------------

    async def _event(self, **parts: Any) -> None:
        await self._ports.send(object_keys.EVENTS, json.dumps({"v": 1, **parts}))

    def tasks_queue(self) -> str:
        """Return the task queue of any known pool."""
        return object_keys.tasks_queue(self._rng.choice(sorted(self._pools)))

    # --- Heartbeats ------------------------------------------------------------------------------

    def beat(self, worker: str, **changes: Any) -> Doc:
        """Return a forged heartbeat of another worker, made from the liar's own last heartbeat."""
        own = [beat for doc in self._remember(events=True) for beat in dicts(doc) if "slots" in beat]
        beat: Doc = {
            **(own[-1] if own else {}),
            "worker": worker,
            "instance": worker.removeprefix("w-"),
            "pool": self._who.pool,
            "at_s": self._clock.now_s(),
            "slots": self._who.slots,
            "busy": 0,
            "held": [],
            "number": self._rng.choice(NUMBERS),
            "leaving": False,
            "gone": False,
        }
        return beat | changes

    async def _forge_beat_of_another(self) -> None:
        changes = self._rng.choice(
            ({"gone": True}, {"leaving": True}, {}, {"busy": 10**6}, {"at_s": 1e18}, {"slots": -3})
        )
        beat = self.beat(self._victim, **changes)
        if self._rng.random() < 0.3:
            beat["worker"] = f"w-{self._rng.getrandbits(32):08x}"
        if beat["instance"] in self._ports.trust.known_instances:
            await self._event(h=[beat])

    async def _forge_beat_of_unknown(self) -> None:
        name = f"w-{self._rng.getrandbits(32):08x}"
        await self._event(h=[self.beat(name, pool=self._rng.choice(("default", "none", "a/b")))])

    async def _claim_bundles(self) -> None:
        """Claim to hold bundles, with receipts of other queues, so that managers do not look for the bundles."""
        held = [
            {
                "queue": self._rng.choice((object_keys.EVENTS, self.tasks_queue(), "tasks-none")),
                "receipt": f"{self._rng.randrange(400)}.1",
                "job": bundle["j"],
                "stage": bundle["s"],
                "bundle": bundle_id(bundle),
                "running": self._rng.random() < 0.7,
            }
            for bundle in (self.a_bundle() for _ in range(self._rng.choice((1, 5, 30))))
        ]
        await self._event(h=[self.beat(self._who.worker, held=held, busy=len(held))])

    # --- Facts about bundles ---------------------------------------------------------------------

    def _follows(self) -> list[Doc]:
        return [{"b": self.a_bundle(), "d": self._rng.choice((0.0, 1e9, -5.0))}]

    def completion(self, bundle: Doc) -> Doc:
        """Return a forged completion of the bundle."""
        tasks = [bundle["t"], [], []]
        self._rng.shuffle(tasks)
        return {
            "b": bundle,
            "w": self._victim,
            "t0": 0.0,
            "t1": self._clock.now_s(),
            "run": 1.0,
            "ok": tasks[0],
            "no": tasks[1],
            "x": tasks[2],
            "re": self._rng.choice((0, 0, 10**9)),
            "next": self._rng.choice(([], self._follows())),
        }

    async def _send_completion(self) -> None:
        await self._event(c=[self.completion(self.a_bundle())])

    def outcome(self, bundle: Doc) -> Doc:
        """Return a forged outcome of the bundle."""
        now_s, count = self._clock.now_s(), tasks_in(bundle)
        forged: Doc = {
            "v": 1,
            "bundle": bundle,
            "execution": "w-x-1",
            "worker": self._victim,
            "started_s": now_s - 1.0,
            "ended_s": now_s,
            "succeeded": bundle["t"],
            "values": [{"key": "k0", "n": 666}] * count,
            "run_s": [1.0] * count,
            "failed": [],
            "cancelled": [],
            "follows": [],
            "log": "",
            "log_spans": [],
        }
        return forged

    def odd_outcome(self, bundle: Doc) -> Doc:
        """Return a forged outcome of the bundle. In most cases, a part of the outcome is odd."""
        forged, count = self.outcome(bundle), tasks_in(bundle)
        odd = self._rng.random()
        if odd < 0.2:
            forged["values"] = [{"$value": "grid/notifications.json"}] * count
        elif odd < 0.4:
            forged |= {"succeeded": [], "values": [], "run_s": [], "cancelled": bundle["t"]}
        elif odd < 0.6:
            forged["follows"] = self._follows()
        elif odd < 0.7:
            forged[self._rng.choice(sorted(forged))] = self._rng.choice(ODD_VALUES)
        return forged

    async def _send_outcome(self) -> None:
        await self._event(o=[self.odd_outcome(self.a_bundle())])

    async def _send_keys(self) -> None:
        """Send object keys that the manager must not read: baits, and objects of other jobs."""
        keys = [await self._ports.bait(self._rng)]
        if self.keys:
            keys += self._rng.sample(self.keys, min(3, len(self.keys)))
        bundle = self.a_bundle()
        keys.append(f"jobs/{bundle['j']}/{bundle['s']}/outcomes/../../../{keys[0]}")
        self._rng.shuffle(keys)
        for key in keys:
            await self._event(k=[key])

    async def _send_counters(self) -> None:
        job, stage = self.a_bundle()["j"], self.a_bundle()["s"]
        name = f"x-{self._rng.getrandbits(32)}"
        await self._rng.choice(
            (
                lambda: self._event(d=[[job, stage, "execution", name, 1e300]]),
                lambda: self._event(m=[[self._victim, {name: 10**30, "duplicate": -5}]]),
                lambda: self._event(q=[[self._victim, "i-x", True, *[1e300] * 7]]),
                lambda: self._event(tp=[[job, stage, bundle_id(self.a_bundle()), "00-x"]]),
            )
        )()

    # --- Objects ---------------------------------------------------------------------------------

    def _outcome_key(self, bundle: Doc) -> str:
        """Return an outcome key without a seal, or an existing key with the id of another bundle."""
        name = bundle_id(bundle)
        spread = hashlib.sha256(name.encode()).hexdigest()[:2]
        key = f"jobs/{bundle['j']}/{bundle['s']}/outcomes/{spread}/{name}"
        outcomes = [key for key in self.keys if "/outcomes/" in key]
        if outcomes and self._rng.random() < 0.5:
            other = self._rng.choice(outcomes).rpartition("/")[2]
            return key + other[len(name) :]
        return f"{key}.json"

    async def _write_outcome(self) -> None:
        bundle = self.a_bundle()
        if self._rng.random() < 0.7 and (waiting := self.open_bundles()):
            bundle = self._rng.choice(waiting)
        text: str | bytes = json.dumps(self.odd_outcome(bundle))
        odd = self._rng.random()
        if odd < 0.3:
            text = self._rng.choice(UNREADABLE_BODIES)
        data = text if isinstance(text, bytes) else text.encode()
        await self._objects.put(self._outcome_key(bundle), data, if_absent=True)

    async def _write_job(self) -> None:
        """Write a job definition under a key that the role may write, and send an outcome of the forged job."""
        folder = self._rng.choice(("outcomes", "running", "starts"))
        job = f"forged/{self._rng.choice('ab')}/{folder}/x{self._rng.getrandbits(16)}"
        specs = [key for key in self.keys if key.endswith("/spec.json")]
        spec = {"v": 1}
        if specs:
            spec = json.loads(await self._objects.get(self._rng.choice(specs)))
            spec["id"] = job
            if self._rng.random() < 0.7:
                # Jobs of batchlab 0.1.0 lack a commit key.
                spec |= {"commit_hash": "", "needs": 1}
        await self._objects.put(f"jobs/{job}/spec.json", json.dumps(spec).encode(), if_absent=True)
        bundle = {**self.a_bundle(), "j": job}
        await self._event(o=[self.outcome(bundle)])

    async def _write_markers(self) -> None:
        """Write markers that pretend that a bundle runs, or that three workers started the bundle and died."""
        bundle = self.a_bundle()
        prefix = f"jobs/{bundle['j']}/{bundle['s']}"
        at_s: Any = self._rng.choice((self._clock.now_s(), 1e18, "never", None))
        data = json.dumps({"v": 1, "worker": self._victim, "at_s": at_s}).encode()
        if self._rng.random() < 0.3:
            data = b'{"v":1}'
        if self._rng.random() < 0.5:
            await self._objects.put(f"{prefix}/running/{bundle_id(bundle)}.json", data)
            return
        for task in some_tasks(bundle):
            alone = bundle_id({**bundle, "t": [[task, task + 1]]})
            for number in range(3):
                key = f"{prefix}/starts/{alone}/w-forged{number}-1"
                await self._objects.put(key, data, if_absent=True)

    async def _delete_markers(self) -> None:
        starts = [key for key in self.keys if "/starts/" in key]
        if starts:
            await self._objects.delete(self._rng.sample(starts, min(5, len(starts))))

    # --- Task messages ---------------------------------------------------------------------------

    async def _send_task(self) -> None:
        """Send a task message for work that no manager has planned, or with inputs that are in no plan."""
        bundle = dict(self.a_bundle())
        if self._rng.random() < 0.5:
            bundle[self._rng.choice(("a", "r", "l"))] = self._rng.choice((1, 2, 5, 10**9))
        own = self._remember(events=False)
        doc = {**(self._rng.choice(own) if own else {}), "v": 1, "b": bundle}
        doc["in"] = [self._rng.choice((666, {"$value": "grid/x"}))] * tasks_in(bundle)
        if self._rng.random() < 0.2:
            doc["nb"] = self._rng.choice((1e18, "soon", -1.0))
        if self._rng.random() < 0.2:
            doc["wd"] = True
        await self._ports.send(self.tasks_queue(), json.dumps(doc))

    async def _send_again(self) -> None:
        bodies = self._ports.bodies()
        for queue, body in self._rng.sample(list(bodies), min(3, len(bodies))):
            await self._ports.send(queue, body)

    async def _send_with_other_names(self) -> None:
        """Send a message of the lying worker with the names of another job and bundle."""
        events = self._rng.random() < 0.5
        own = self._remember(events=events)
        if own:
            doc, other = self._rng.choice(own), self.a_bundle()
            for part in dicts(doc):
                if {"j", "s", "t"} <= part.keys():
                    part.update(other)
                if {"job", "stage", "bundle"} <= part.keys():
                    part.update(job=other["j"], stage=other["s"], bundle=bundle_id(other))
            queue = object_keys.EVENTS if events else self.tasks_queue()
            await self._ports.send(queue, json.dumps(doc))

    async def _send_with_odd_values(self) -> None:
        """Send a message of the lying worker with odd values in some places."""
        events = self._rng.random() < 0.7
        own = self._remember(events=events)
        if own:
            doc = self._rng.choice(own)
            for choice in self._rng.choices(list(dicts(doc)), k=2):
                choice[self._rng.choice(sorted(choice) or ["x"])] = self._rng.choice(ODD_VALUES)
            await self._ports.send(object_keys.EVENTS if events else self.tasks_queue(), json.dumps(doc))

    async def _send_noise(self) -> None:
        queue = self._rng.choice((object_keys.EVENTS, self.tasks_queue()))
        letters = [chr(self._rng.randrange(32, 255)) for _ in range(self._rng.choice((1, 40, 900)))]
        deep = "[" * self._rng.choice((100, 5_000, 60_000))
        body = self._rng.choice(("".join(letters), deep, f'{{"v":1,"h":{deep}', '{"v":1e999}', '{"v":1,"o":{}}', "{}"))
        await self._ports.send(queue, body)

    async def _steal_messages(self) -> None:
        """Receive messages of any pool, and delete, keep, or release the messages.

        Each job whose messages are stolen becomes touched.
        """
        if self._rng.random() < 0.5:
            return  # Half of the attempts to steal messages do nothing, so that lying workers do not touch every job.
        queue = self.tasks_queue()
        messages: Sequence[Message] = await self._queue.receive(queue, max_messages=2, wait_s=0.0)
        receipts = [message.receipt for message in messages]
        if receipts and self._rng.random() < 0.3:
            await self._queue.delete(queue, receipts)
        elif receipts and self._rng.random() < 0.5:
            wait_s = self._rng.choice((0.0, 600.0))
            await self._queue.change_visibility(queue, [(receipt, wait_s) for receipt in receipts])

    async def _exceed_role(self) -> None:
        """Make a call that the role does not allow, which the service must refuse."""
        job = self._job
        outcomes = [key for key in self.keys if "/outcomes/" in key]
        word = b'{"v":1,"control":"cancel","state":"CANCELLED"}'
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: self._objects.put(f"jobs/{job}/control.json", word),
            lambda: self._objects.put(f"jobs/{job}/spec.json", b"{}"),
            lambda: self._objects.put(f"jobs/{job}/final/0000.json", b"{}", if_absent=True),
            lambda: self._objects.get("grid/notifications.json"),
            lambda: self._objects.delete(outcomes[:MAX_BATCH] or [f"jobs/{job}/spec.json"]),
            lambda: self._queue.receive(object_keys.EVENTS, wait_s=0.0),
            lambda: self._queue.purge(self.tasks_queue()),
            lambda: self._queue.send(object_keys.dead_letters(self._who.pool), [Outgoing("x")]),
        ]
        if outcomes:
            calls.append(lambda: self._objects.put(outcomes[0], b"{}"))
        await self._rng.choice(calls)()
