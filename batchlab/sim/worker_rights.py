"""Rights of a worker's role on AWS, enforced at the ports of simulated workers, and a record of lying workers.

Invariant: a call outside the rights of a role is refused. `tests/sim/test_worker_rights.py` compares the key patterns
and queue actions of this module with the stack template.

Promise I8: a lying worker harms only touched jobs. A job counts as touched if a lying worker has received a message of
the job at any time, even before its first lie. The promises to a touched job are not checked.
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
    "grid/leader.json",
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
"""Keys of objects that the bucket's policy protects from overwriting."""


_may_read, _may_write, _is_conditional = (
    # In IAM, a `*` matches any characters, including slashes.
    re.compile("|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in patterns), re.DOTALL).fullmatch
    for patterns in (READS, WRITES, CONDITIONAL)
)


def _is_allowed(label: str, name: str, pool: str, *, conditional: bool) -> bool:
    """Return whether the role of a worker in `pool` allows a call. `name` is the key or the queue of the call."""
    match label:
        case "objects.list":
            return True
        case "objects.put" | "objects.upload":
            return bool(_may_write(name)) and (conditional or not _is_conditional(name))
        case "objects.get" | "objects.get_range" | "objects.get_if_changed" | "objects.head" | "objects.download":
            return bool(_may_read(name))
        case "queue.receive" | "queue.delete" | "queue.change_visibility":
            return name == object_keys.tasks_queue(pool)
        case "queue.send":
            return name == object_keys.EVENTS or (name.startswith("tasks-") and not name.endswith("-dead"))
    return False


class AccessDenied(BackendError):
    """Error of AWS for a call that the role does not allow."""


class Rights:
    """The rights of one simulated worker of a pool.

    `denied` is called with each refused call. With `deaf`, receives are refused, because a lying worker may stop its
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
        if _is_allowed(label, args[0] if args else "", self._pool, conditional=conditional):
            return
        call = f"{label}({', '.join(map(repr, args[:1]))})"
        self._denied(call)
        raise AccessDenied(f"A worker's role does not allow {call}.")


MAX_BODIES = 24
"""Number of message bodies that each worker's record stores, in case the worker begins to lie."""


@dataclass(slots=True)
class Trust:
    """Record of the lying workers and of the possible effects of lies."""

    check: Callable[[bool, str, str], None]
    touched: set[str] = field(default_factory=set)
    known_instances: set[str] = field(default_factory=set)
    """Instances whose heartbeat a manager has received.

    Other workers cannot know the id of an instance before its first heartbeat.
    """
    baits: set[str] = field(default_factory=set)
    """Keys of objects that belong to no job and exist only because a lie names the objects."""
    forged: set[str] = field(default_factory=set)
    """Keys of objects of untouched jobs that a lying worker has written."""
    lies_sent: set[str] = field(default_factory=set)
    """Bodies of messages that lying workers have sent."""
    denied: int = 0
    """Number of refused calls of lying workers."""
    _liars: set[Actor] = field(default_factory=set)
    _jobs: dict[Actor, set[str]] = field(default_factory=dict)
    _bodies: dict[Actor, deque[tuple[str, str]]] = field(default_factory=dict)
    _keys: dict[str, CommitKey] = field(default_factory=dict)
    """Commit keys of jobs, taken from messages of managers."""
    _beats: dict[str, tuple[Actor, dict[tuple[str, int], Any]]] = field(default_factory=dict)
    """Process of the worker on each instance, and the bundles held in each of its heartbeats."""

    @property
    def lies(self) -> bool:
        """Whether any worker lies."""
        return bool(self._liars)

    def is_liar(self, actor: Actor | None) -> bool:
        return actor in self._liars

    def on_corruption(self, actor: Actor) -> None:
        """Record that a worker lies from now on. Each job whose messages the lying worker had becomes touched."""
        self._liars.add(actor)
        self.touched |= self._jobs.get(actor, set())

    def bodies(self, actor: Actor) -> Sequence[tuple[str, str]]:
        """Return the (queue, body) pairs of the last messages that the process received or sent."""
        return self._bodies.get(actor, ())

    def on_denial(self, actor: Actor, call: str) -> None:
        """Record a call that the worker's role does not allow.

        Only a lying worker may try a call that its role does not allow.
        """
        if actor in self._liars:
            self.denied += 1
            return
        self.check(False, "role", f"{actor.name} calls {call}, which its role does not allow")

    # --- Port calls ------------------------------------------------------------------------------

    def on_receive(self, actor: Actor, queue: str, job: str, body: str) -> None:
        """Record that a worker has received a message of the job."""
        self._jobs.setdefault(actor, set()).add(job)
        self._remember(actor, queue, body)
        if actor in self._liars:
            self.touched.add(job)

    def on_send(self, actor: Actor, queue: str, body: str, doc: Mapping[str, Any]) -> None:
        """Record that a worker has sent a message. `doc` is the JSON document of the message body."""
        self._remember(actor, queue, body)
        if actor in self._liars:
            self.lies_sent.add(body)
        elif actor.name.startswith("manager") and "ck" in doc:
            self._keys[doc["b"]["j"]] = CommitKey(doc["ck"])
        elif queue == object_keys.EVENTS:
            for beat in doc.get("h", ()):
                _, sent = self._beats.setdefault(beat["instance"], (actor, {}))
                sent[beat["worker"], beat["number"]] = (beat["gone"], beat["held"])

    def _remember(self, actor: Actor, queue: str, body: str) -> None:
        self._bodies.setdefault(actor, deque(maxlen=MAX_BODIES)).append((queue, body))

    def check_seal(self, key: str, job: str) -> bool:
        """Return whether the key of a new outcome has the seal of its job. A wrong seal breaks promise I8.

        The outcome was written by a manager or an honest worker. A writer that received a wrong commit key makes a
        wrong seal.
        """
        commit_key = self._keys.get(job)
        is_sealed = object_keys.outcome_key(key) is not None
        is_sealed = is_sealed and (commit_key is None or object_keys.is_genuine(key, commit_key))
        self.check(is_sealed, "I8", f"{key} is written, which has not the seal of {job}")
        return is_sealed

    def check_read(self, actor: Actor, key: str, size: int) -> None:
        """Check that an honest process may read `size` bytes of an object."""
        if actor in self._liars:
            return
        self.check(size <= OUTCOME_WEIGHT, "I8", f"{actor.name} reads {key} whole, which has {size} bytes")
        self.check(key not in self.baits, "I8", f"{actor.name} reads {key}, which only a lie names")

    # --- Registries of managers ------------------------------------------------------------------

    def check_registry(self, registry: WorkerRegistry) -> None:
        """Check a manager's record of workers.

        The manager may record a heartbeat of an honest worker only if the worker sent the heartbeat. The manager may
        record a lying worker's claim to hold a bundle only if the bundle's job is touched.
        """
        self.known_instances |= registry.workers.keys()
        if not self._liars:
            return
        for instance, (actor, sent) in self._beats.items():
            status = registry.workers.get(instance)
            if actor in self._liars:
                held = {held.job for held in status.beat.held} if status else set()
                # Lying workers can pass commit keys on to other lying workers.
                others = sorted(held - self.touched)
                self.check(not others, "I8", f"a manager believes that {instance} holds bundles of {others}")
            elif status is not None:
                beat = sent.get((status.beat.worker, status.beat.number))
                # A manager drops a worker's bundles of jobs whose commit key the worker does not have.
                is_right = beat is not None and len(status.beat.held) <= len(beat[1])
                facts = f"{instance} never sent the heartbeat that a manager believes: {status.beat}"
                self.check(is_right, "I8", facts)
            elif registry.has_left(instance):
                has_left = any(gone for gone, _ in sent.values())
                self.check(has_left, "I8", f"a manager believes that {instance} has left")
