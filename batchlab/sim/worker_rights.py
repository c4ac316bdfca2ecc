"""The rights of a worker's role on AWS, enforced at the ports of simulated workers, and the record
for promise I8: a lying worker harms only jobs whose messages it had.

Invariant: a call outside these rights has no effect. `tests/sim/test_worker_rights.py` compares the
key patterns and queue actions with the stack template.

A job is touched once a lying worker has received one of its messages, before or after it began to
lie. The promises of a touched job are not checked. Those of every other job are.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchlab.core.errors import BackendError
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.protocol.values import OUTCOME_WEIGHT
from batchlab.manager.worker_registry import WorkerRegistry
from batchlab.sim.actors import Actor

READS = (
    "boot/*",
    "code/*",
    "files/*",
    "jobs/*/spec.json",
    "jobs/*/control.json",
    "jobs/*/*/plan/*/manifest.json",
    "jobs/*/*/plan/*/part-*",
    "jobs/*/*/plan/*/item-*",
    "jobs/*/*/outcomes/*",
    "jobs/*/*/replaced/*",
    "jobs/*/*/running/*",
    "raw/*",
)
WRITES = ("files/*", "logs/*", "jobs/*/*/outcomes/*", "jobs/*/*/running/*", "jobs/*/*/starts/*")
CONDITIONAL = ("files/*", "logs/*.log", "jobs/*/*/outcomes/*", "jobs/*/*/starts/*")
"""Keys that the bucket's policy protects from overwriting."""


def _matcher(patterns: Sequence[str]) -> Callable[[str], object]:
    # In IAM a `*` stands for any characters, slashes included.
    texts = [".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns]
    return re.compile("|".join(texts), re.DOTALL).fullmatch


_may_read, _may_write, _is_conditional = map(_matcher, (READS, WRITES, CONDITIONAL))


def _reads(key: str, _pool: str, _conditional: bool) -> bool:
    return bool(_may_read(key))


def _puts(key: str, _pool: str, conditional: bool) -> bool:
    return bool(_may_write(key)) and (conditional or not _is_conditional(key))


def _takes(queue: str, pool: str, _conditional: bool) -> bool:
    return queue == object_keys.tasks_queue(pool)


def _sends(queue: str, _pool: str, _conditional: bool) -> bool:
    return queue == object_keys.EVENTS or (queue.startswith("tasks-") and not queue.endswith("-dead"))


def _anything(_name: str, _pool: str, _conditional: bool) -> bool:
    return True


_ALLOWED: dict[str, Callable[[str, str, bool], bool]] = {
    "objects.get": _reads,
    "objects.get_range": _reads,
    "objects.get_if_changed": _reads,
    "objects.head": _reads,
    "objects.download": _reads,
    "objects.list": _anything,
    "objects.put": _puts,
    "objects.upload": _puts,
    "queue.receive": _takes,
    "queue.delete": _takes,
    "queue.change_visibility": _takes,
    "queue.send": _sends,
}


class AccessDenied(BackendError):
    """AWS refuses a call that the role does not allow."""


class Rights:
    """The rights of one simulated worker of a pool.

    `denied` is called with each refused call. `deaf` refuses receives: a lying worker may stop its
    honest part from receiving.
    """

    def __init__(self, denied: Callable[[str], None], pool: str) -> None:
        self._denied = denied
        self._pool = pool
        self.deaf = False

    def check(self, label: str, args: Sequence[Any], *, conditional: bool) -> None:
        """Raise AccessDenied if the role does not allow the call."""
        if self.deaf and label == "queue.receive":
            raise AccessDenied("This worker no longer receives messages.")
        allowed = _ALLOWED.get(label)
        if allowed is not None and allowed(args[0], self._pool, conditional):
            return
        call = f"{label}({', '.join(map(repr, args[:1]))})"
        self._denied(call)
        raise AccessDenied(f"A worker's role does not allow {call}.")


REMEMBERED = 24
"""Message bodies that a worker remembers, for the case that it begins to lie."""


@dataclass(slots=True)
class Trust:
    """The workers that lie, and the effects that their lies may have."""

    require: Callable[[bool, str, str], None]
    touched: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)
    """Instances that a manager has heard. Before, no other worker can know their ids."""
    baits: set[str] = field(default_factory=set)
    """Keys that exist only because a lie names them. No job owns one."""
    forged: set[str] = field(default_factory=set)
    """Keys of untouched jobs that a lying worker has written."""
    lied: set[str] = field(default_factory=set)
    """Bodies of messages that lying workers have sent."""
    denied: int = 0
    """Calls of lying workers that their role does not allow."""
    _liars: set[Actor] = field(default_factory=set)
    _jobs: dict[Actor, set[str]] = field(default_factory=dict)
    _bodies: dict[Actor, deque[tuple[str, str]]] = field(default_factory=dict)
    _keys: dict[str, CommitKey] = field(default_factory=dict)
    """Commit keys of jobs, as managers have sent them."""
    _beats: dict[str, tuple[Actor, dict[tuple[str, int], Any]]] = field(default_factory=dict)
    """By instance: its worker's process, and the bundles held according to each heartbeat."""

    @property
    def lies(self) -> bool:
        """Whether any worker lies."""
        return bool(self._liars)

    def is_liar(self, actor: Actor | None) -> bool:
        return actor in self._liars

    def begins_to_lie(self, actor: Actor) -> None:
        """From now on its calls are lies, and each job whose messages it had is touched."""
        self._liars.add(actor)
        self.touched |= self._jobs.get(actor, set())

    def bodies(self, actor: Actor) -> Sequence[tuple[str, str]]:
        """The (queue, body) pairs of the last messages that the process received or sent."""
        return self._bodies.get(actor, ())

    def deny(self, actor: Actor, call: str) -> None:
        """A worker has made a call outside its role. Only a lying worker may try that."""
        if actor in self._liars:
            self.denied += 1
            return
        self.require(False, "role", f"{actor.name} calls {call}, which its role does not allow")

    # --- Port calls ------------------------------------------------------------------------------

    def received(self, actor: Actor, queue: str, job: str, body: str) -> None:
        """A worker has received a message of the job."""
        self._jobs.setdefault(actor, set()).add(job)
        self._remember(actor, queue, body)
        if actor in self._liars:
            self.touched.add(job)

    def sent(self, actor: Actor, queue: str, body: str, doc: Mapping[str, Any]) -> None:
        """A worker has sent a message. `doc` is its JSON."""
        self._remember(actor, queue, body)
        if actor in self._liars:
            self.lied.add(body)
        elif actor.name.startswith("manager") and "ck" in doc:
            self._keys[doc["b"]["j"]] = CommitKey(doc["ck"])
        elif queue == object_keys.EVENTS:
            for beat in doc.get("h", ()):
                _, said = self._beats.setdefault(beat["instance"], (actor, {}))
                said[beat["worker"], beat["number"]] = (beat["gone"], beat["held"])

    def _remember(self, actor: Actor, queue: str, body: str) -> None:
        bodies = self._bodies.get(actor)
        if bodies is None:
            bodies = self._bodies[actor] = deque(maxlen=REMEMBERED)
        bodies.append((queue, body))

    def commits(self, key: str, job: str) -> bool:
        """A manager or an honest worker has written an outcome. Its key has the seal of its job,
        whatever commit key came with a message. Return whether it has."""
        commit_key = self._keys.get(job)
        right = object_keys.outcome_key(key) is not None
        right = right and (commit_key is None or object_keys.is_genuine(key, commit_key))
        self.require(right, "I8", f"{key} is written, which has not the seal of {job}")
        return right

    def reads(self, actor: Actor, key: str, size: int) -> None:
        """A manager or an honest worker has read so many bytes of an object."""
        self.require(
            size <= OUTCOME_WEIGHT or actor in self._liars,
            "I8",
            f"{actor.name} reads {key} whole, which has {size} bytes",
        )
        self.require(
            key not in self.baits or actor in self._liars, "I8", f"{actor.name} reads {key}, which only a lie names"
        )

    # --- What a manager believes -----------------------------------------------------------------

    def check_registry(self, registry: WorkerRegistry) -> None:
        """A manager may believe of an honest worker only the heartbeats that this worker sent, and
        of a lying one only that it holds bundles of jobs that were touched."""
        self.heard |= registry.workers.keys()
        if not self._liars:
            return
        for instance, (actor, said) in self._beats.items():
            worker_status = registry.workers.get(instance)
            if actor in self._liars:
                held = {one.job for one in worker_status.beat.held} if worker_status else set()
                # Lying workers can pass commit keys on to each other.
                others = sorted(held - self.touched)
                told = f"a manager believes that {instance} holds bundles of {others}"
                self.require(not others, "I8", told)
                continue
            if worker_status is not None:
                sent = said.get((worker_status.beat.worker, worker_status.beat.number))
                # A manager drops the bundles of jobs whose key the worker does not have.
                self.require(
                    sent is not None and len(worker_status.beat.held) <= len(sent[1]),
                    "I8",
                    f"{instance} never sent the heartbeat that a manager believes: {worker_status.beat}",
                )
            elif registry.has_left(instance):
                left = any(gone for gone, _ in said.values())
                self.require(left, "I8", f"a manager believes that {instance} has left")
