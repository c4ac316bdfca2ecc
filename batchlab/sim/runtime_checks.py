"""Checks of the promises during the run: at each write, send, delete, and start.

Invariant: the watch changes nothing. It uses the effects of port calls, as the services behind the
ports receive them, so it holds for any code above the ports.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.errors import Malformed, TooNew
from batchlab.core.job_definition import task_name
from batchlab.core.model import Bundle, Control, JobId, StageCounts, StageName
from batchlab.core.ports import MAX_VISIBILITY_S, Clock, Cut, Ending, Message, StageRecord
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.manager.unresponsive_workers import UNKNOWN_WORK
from batchlab.sim.actors import CURRENT, Actor, JobControls, SimulationError
from batchlab.sim.event_log import Name, bundle_in, doc_of, name_in, name_of_bundle, told_in
from batchlab.sim.faults import LATENCY_S
from batchlab.sim.progress_checks import GIVE_BACK_S, Leads, Oracles, Silences, StartTimes
from batchlab.sim.storage_faults import Unsynced
from batchlab.sim.worker_rights import Trust
from batchlab.worker.heartbeats import RETURN_S

TOLERANCE_S = 1.0

_FLUSHED = ("AddJob", "Reopen", "SetControl", "restore", "forget")
FLUSHED = frozenset(f"ledger.{name}" for name in _FLUSHED)
"""Calls whose transaction waits for the disk before it is acknowledged."""

BEGIN_S = 2 * LATENCY_S[1]
"""Longest time from the write of a start marker to the start of the task, without faults: the
answer of that write, and a read of the control object."""


RECENT_S = 60.0
"""Seconds for which a fault may still delay the sends of its target."""


ADOPTED = 0.2
"""Share of `silence_s` for which a new leader waits before it sends a bundle again."""


class Violated(SimulationError):
    """A promise does not hold."""


@dataclass(slots=True)
class Hold:
    """A task message that an actor holds since `received_s`, received for the `receives`th time. At
    `asked_s` the holder last changed its visibility timeout. If `given_back`, it did so to release
    the message."""

    actor: Actor
    bundle: Name
    receives: int
    losses: int
    received_s: float
    asked_s: float
    given_back: bool = False


@dataclass(slots=True)
class Start:
    """A task that began. `ended_s` is None while it runs, and stays None if its worker died."""

    at_s: float
    actor: Actor | None
    job: JobId
    stage: StageName
    task: int
    round: int
    ended_s: float | None = None


@dataclass(slots=True)
class Watch:
    """Record of the effects that ports, services, and runners report. `fail` ends the run with the
    error."""

    clock: Clock
    queue: SimQueue
    fail: Callable[[SimulationError], None]
    frozen: Callable[[Actor], bool]
    thawed_s: Callable[[Actor], float]
    visibility_s: float
    """Visibility timeout that workers set to keep a message. See `_gives_back` for other values."""
    lease_s: float
    """Seconds after a read of the control object in which workers may start tasks of its job."""
    lead_ttl_s: float
    silence_s: float
    """Seconds for which a bundle may be silent before a manager looks for it."""
    are_looks_slow: bool = False
    starts: list[Start] = field(default_factory=list)
    flushed: Callable[[], None] = lambda: None
    """Called after each call of FLUSHED."""
    damaged: set[str] = field(default_factory=set)
    """Jobs with an object that the store has damaged."""
    trust: Trust = field(init=False)
    oracles: Oracles = field(init=False)
    controls: JobControls = field(init=False)
    unsynced: Unsynced = field(init=False)
    _begun: dict[Actor, set[Name]] = field(default_factory=dict)
    """The bundles of which a worker has started tasks."""
    leads: Leads = field(init=False)
    start_times: StartTimes = field(init=False)
    _killed_s: dict[Actor, float] = field(default_factory=dict)
    """Workers that ended without draining, and when."""
    _written: dict[str, tuple[Actor, float]] = field(default_factory=dict)
    """The writer of each start marker, and when it was first written. Withdrawn markers are left
    out."""
    _planned: set[Name] = field(default_factory=set)
    _opened: set[Name] = field(default_factory=set)
    """Planned bundles of definitions. A client that repeats its request makes the manager send
    copies of them."""
    _following: set[Name] = field(default_factory=set)
    """Planned bundles that follow from an outcome."""
    _committed: set[Name] = field(default_factory=set)
    _holds: dict[tuple[str, str], Hold] = field(default_factory=dict)
    _settled_s: dict[tuple[Actor, Name], float] = field(default_factory=dict)
    _disturbed_s: dict[Actor, float] = field(default_factory=dict)
    _counts: dict[tuple[JobId, StageName], tuple[int, StageCounts]] = field(default_factory=dict)
    _context: Context = field(init=False)
    silences: Silences = field(init=False)

    def __post_init__(self) -> None:
        self.trust = Trust(self._require)
        self.oracles = Oracles(self._require)
        self.controls = JobControls(self.clock)
        self.unsynced = Unsynced(self.clock)
        self.leads = Leads(self._require, self.lead_ttl_s, self.thawed_s)
        self.start_times = StartTimes(self._require)
        self.silences = Silences(self._require, self.silence_s)
        # Its timers expire even while its process is frozen.
        self._context = copy_context()

    def _require(self, holds: bool, promise: str, facts: str, job: str | None = None) -> None:
        """Fail unless the condition `holds` or a lying worker has touched the `job`."""
        if not holds and job not in self.trust.touched:
            self.fail(Violated(f"{promise} is violated: {facts}"))

    # --- The bucket ------------------------------------------------------------------------------

    def written(self, key: str, before: bytes | None, data: bytes, if_absent: bool) -> None:
        """I1: a committed outcome never changes, and is written by a conditional put."""
        parts = key.split("/")
        if parts[0] != "jobs":
            return
        if CURRENT.get() is not None:  # Otherwise a client wrote it, and waits for the manager.
            self.unsynced.written(key, before)
        job, kind = parts[1], parts[2]
        if self.trust.is_liar(CURRENT.get()):
            self._forged(key, job, parts, data)
            return
        if kind == "control.json":
            self.controls.written(job, json_format.control_from_bytes(data))
            return
        if kind == "final":
            self.controls.ended(job)
        if kind not in ("spec.json", "retries", "final"):
            kind = parts[3]
        if kind in ("starts", "running"):
            return
        if kind == "outcomes" and not self.trust.commits(key, job):
            return
        self._require(before in (None, data), "I1", f"{key} has changed after its commit", job)
        # Parts are written before the manifest that commits them. Their names are hashes of their
        # content.
        conditional = if_absent or parts[-1].startswith(("part-", "item-"))
        self._require(conditional, "I1", f"{key} is written without a condition")
        self._learn(kind, parts[-2], data)

    def taken_back(self, key: str, before: bytes | None) -> None:
        """Record that a power cut has undone a write."""
        parts = key.split("/")
        if parts[2] == "control.json":
            word = json_format.ControlCommand(Control.RUN)
            with suppress(Malformed, TooNew):  # The store had damaged it before.
                word = json_format.control_from_bytes(before or b"")
            self.controls.written(parts[1], word)
        elif object_keys.is_outcome(key):
            outcome_key = object_keys.outcome_key(key)
            assert outcome_key
            name = outcome_key.job, outcome_key.stage, outcome_key.bundle
            self._committed.discard(name)
            self.oracles.uncommitted(name)

    def _forged(self, key: str, job: str, parts: Sequence[str], data: bytes) -> None:
        """Record an object that a lying worker has written. It may commit a bundle that the worker
        had."""
        if job not in self.trust.touched:
            self.trust.forged.add(key)
        elif parts[3] == "outcomes":
            # The lie may have any content. Only a readable one commits a bundle.
            with suppress(Exception):
                self._learn("outcomes", parts[-2], data)

    def _learn(self, kind: str, folder: str, data: bytes) -> None:
        if kind == "outcomes":
            outcome = json_format.outcome_from_json(json_format.loads(data))
            name = name_of_bundle(outcome.bundle)
            planned = name in self._planned
            self._require(planned, "I1", f"{name} is committed, but not planned", name[0])
            self._committed.add(name)
            self.oracles.committed(name, self.clock.monotonic_s())
            self.start_times.committed(outcome)
            follows = [
                name_of_bundle(follow.bundle)
                for follow in outcome.follows
                if follow.bundle.job == outcome.bundle.job  # Otherwise it is a lie.
            ]
            self._planned.update(follows)
            self._following.update(follows)
        elif kind == "spec.json":
            doc = json_format.loads(data)
            job, opening = json_format.job_from_json(doc), commit_keys.opening_in(doc)
            self.oracles.defined(job)
            self.start_times.defined(job)
            if opening and opening.cut:
                self._opened.update(map(name_of_bundle, opening.cut.bundles))
                self._cut(opening.cut)
        elif folder == "cuts":
            self._cut(json_format.cut_from_json(json_format.loads(data)))
        elif kind == "retries":
            for cut in json_format.loads(data)["cuts"]:
                self._plan(json_format.cut_from_json(cut).bundles)

    def _cut(self, cut: Cut) -> None:
        self._plan(cut.bundles)
        actor = CURRENT.get()
        if actor is not None and actor.name.startswith("manager"):
            now_s = self.clock.monotonic_s()
            since_s = max(self.leads.led_s(actor), self._disturbed_s.get(actor, 0.0))
            self.oracles.cut(cut, now_s, since_s, self.controls.live_since_s)

    def _plan(self, bundles: Sequence[Bundle]) -> None:
        self._planned.update(map(name_of_bundle, bundles))

    # --- Port calls ------------------------------------------------------------------------------

    def disturbed(self, actor: Actor, for_s: float = 0.0) -> None:
        """Record that a lasting fault has hit the actor. From now on it is excused if it is
        late."""
        until_s = self.clock.monotonic_s() + for_s
        self._disturbed_s[actor] = max(until_s, self._disturbed_s.get(actor, 0.0))

    def called(self, actor: Actor, label: str, args: Sequence[Any], result: Any) -> None:
        """Record that a port call of `actor` has taken effect."""
        self._leads(actor, label, result)
        if label == "queue.receive":
            self._received(actor, args[0], result)
        elif label == "queue.send":
            self._sends(actor, args[0], args[1])
        elif label == "queue.delete":
            self._deletes(actor, args[0], args[1])
        elif label == "queue.change_visibility":
            self._extends(args[0], args[1])
        elif label in FLUSHED:
            self.flushed()
        elif label == "objects.put" and "/starts/" in args[0]:
            self._marks(actor, args[0])
        elif label == "objects.get":
            self.trust.reads(actor, args[0], len(result))
        elif label == "objects.delete" and not self.trust.is_liar(actor):
            self._require(False, "I1", f"{actor.name} deletes {args[0]}")

    def _marks(self, actor: Actor, key: str) -> None:
        """Record when an execution first marked its start of a suspect. Forget a withdrawn
        marker."""
        folder, _, label = key.rpartition("/")
        execution, *then = label.split(".")
        start = f"{folder}/{execution}"
        if object_keys.WITHDRAWN in then:
            self._written.pop(start, None)
        else:
            self._written.setdefault(start, (actor, self.clock.monotonic_s()))

    def _leads(self, actor: Actor, label: str, result: Any) -> None:
        now_s = self.clock.monotonic_s()
        if label == "ledger.lease":
            self.leads.leased(actor, result.owner, now_s)
        elif actor.name.startswith("manager"):
            since_s = now_s - self.lead_ttl_s
            self.leads.called(actor, label, now_s, disturbed=self._excused(actor, since_s))

    def _received(self, actor: Actor, queue: str, messages: Sequence[Message]) -> None:
        now_s = self.clock.monotonic_s()
        if queue == object_keys.EVENTS:
            return
        for message in messages:
            bundle = bundle_in(doc_of(message.body))
            if bundle is None:
                continue
            name = name_of_bundle(bundle)
            # A lie, and a bundle that no manager has planned, may be deleted without a check.
            is_work = name in self._planned and message.body not in self.trust.lied
            if not _carries_tasks(queue):
                if is_work:
                    self.oracles.dead_letter(message.receipt, bundle, now_s)
                continue
            self.trust.received(actor, queue, name[0], message.body)
            self._require(
                not self.oracles.is_draining(actor, now_s) or self._excused(actor, now_s),
                "I6",
                f"{actor.name} receives {name} though it was told to drain",
                name[0],
            )
            if is_work:
                hold = Hold(actor, name, message.receive_count, bundle.losses, now_s, now_s)
                self._holds[queue, message.receipt] = hold

    def _sends(self, actor: Actor, queue: str, messages: Sequence[Any]) -> None:
        now_s = self.clock.monotonic_s()
        lies = self.trust.is_liar(actor)
        for message in messages:
            doc = doc_of(message.body)
            self.trust.sent(actor, queue, message.body, doc)
            if lies:
                continue
            if queue == object_keys.EVENTS:
                for told in told_in(doc):
                    self._require(
                        told in self._committed,
                        "step 3",
                        f"{actor.name} tells of {told} before it is committed",
                        told[0],
                    )
                    self._settled_s[actor, told] = now_s
            elif (bundle := bundle_in(doc)) is not None:
                name = name_of_bundle(bundle)
                disturbed = self._excused(actor, now_s - RECENT_S)
                self.oracles.sent(actor.name, bundle, now_s, disturbed=disturbed)
                self.silences.sent(name)
                self._keeps_losses(actor, bundle)
                self._looks_first(actor, bundle, now_s)
                self._require(
                    name in self._planned,
                    "step 3",
                    f"{actor.name} sends {name}, which follows from nothing that is committed",
                    name[0],
                )
                self._settled_s[actor, name] = now_s

    def _keeps_losses(self, actor: Actor, bundle: Bundle) -> None:
        """Check that a worker that sends its bundle again passes on how often the bundle was lost.
        A follow-up may also be sent because of its outcome. It then counts as new."""
        name = name_of_bundle(bundle)
        least = [
            hold.losses + hold.receives - 1
            for hold in self._holds.values()
            if hold.actor is actor and hold.bundle == name
        ]
        self._require(
            not least or name in self._following or bundle.losses >= min(least),
            "losses",
            f"{actor.name} sends {name} with {bundle.losses} losses instead of {least}",
            name[0],
        )

    def _looks_first(self, actor: Actor, bundle: Bundle, now_s: float) -> None:
        """Check that a manager that has just begun to lead sends no bundle again that a worker
        still has."""
        led_s, name = self.leads.led_s(actor), name_of_bundle(bundle)
        if not 0.0 <= now_s - led_s < ADOPTED * self.silence_s:
            return
        if name in self._opened or self.oracles.has_dead_letters(led_s):
            return  # Their outcomes are forwarded again.
        holds = [hold for hold in self._holds.values() if hold.bundle == name]
        are_well = all(hold.actor.alive and not self._excused(hold.actor, hold.received_s) for hold in holds)
        # Workers drop the messages of a paused job, so a resume sends all of its bundles.
        since_s = min((hold.received_s for hold in holds), default=now_s)
        self._require(
            since_s >= led_s or not are_well or self.controls.was_stopped(name[0], since_s),
            "waste",
            f"{actor.name} leads since {led_s:.1f} and sends {name} again, which a worker has",
            name[0],
        )

    def _deletes(self, actor: Actor, queue: str, receipts: Sequence[str]) -> None:
        if queue != object_keys.EVENTS and not _carries_tasks(queue):
            self.oracles.deleted(receipts, is_live=self.controls.is_live)
        for receipt in receipts:
            hold = self._holds.pop((queue, receipt), None)
            if hold is None:
                continue
            # A manager sends its copy before it knows which bundles the dead worker held, so this
            # is allowed at any time.
            since_s = hold.received_s if hold.actor is actor else 0.0
            done = self._settled_s.get((actor, hold.bundle), -1.0) >= since_s
            # The manager may replace a part that its worker kept, after the worker had reported the
            # bundle and returned the rest.
            told_s = self._settled_s.get((hold.actor, hold.bundle), -1.0)
            done = done or (hold.actor is not actor and told_s >= hold.received_s)
            self._require(
                done or self.controls.was_stopped(hold.bundle[0], hold.received_s),
                "step 4",
                f"{actor.name} deletes {hold.bundle}, and has neither told of it nor sent it again",
                hold.bundle[0],
            )

    def _extends(self, queue: str, changes: Sequence[tuple[str, float]]) -> None:
        now_s = self.clock.monotonic_s()
        for receipt, visibility_s in changes:
            hold = self._holds.get((queue, receipt))
            if hold is None:
                continue
            hold.asked_s, hold.given_back = now_s, self._gives_back(hold, visibility_s)
            beyond = now_s + visibility_s > hold.received_s + MAX_VISIBILITY_S
            self._require(
                not beyond or self._excused(hold.actor, hold.received_s),
                "12 h",
                f"{hold.actor.name} asks to hold {hold.bundle} longer than SQS lets anybody",
                hold.bundle[0],
            )

    def _gives_back(self, hold: Hold, visibility_s: float) -> bool:
        """Return whether a change of the visibility timeout gives the message back. Its value is
        then less than the one that keeps the message, or is the wait after so many receives, which
        may exceed a short timeout. If both are equal, the worker has the benefit of the doubt."""
        return visibility_s < self.visibility_s or visibility_s == RETURN_S * hold.receives

    def lapsed(self, queue: str, receipt: str) -> None:
        """Check that no worker loses a message to its timeout while it could extend it."""
        hold = self._holds.pop((queue, receipt), None)
        if hold is None or hold.given_back or not hold.actor.alive:
            return
        self._require(
            self._excused(hold.actor, hold.asked_s),
            "heartbeat",
            f"the visibility of {hold.bundle} ran out in the hands of {hold.actor.name}, which is "
            f"alive and was not disturbed since {hold.asked_s:.3f}",
            hold.bundle[0],
        )

    def _excused(self, actor: Actor, since_s: float) -> bool:
        disturbed_s = self._disturbed_s.get(actor, -1.0)
        return self.frozen(actor) or disturbed_s >= since_s - TOLERANCE_S

    def leaves(self, actor: Actor) -> None:
        """Record that a worker starts to drain."""
        self.oracles.leaves(actor, self.clock.monotonic_s())
        if self.are_looks_slow:
            return  # A worker may wait for an answer before it gives a message back.
        loop = asyncio.get_running_loop()
        loop.call_later(GIVE_BACK_S, self._has_given_back, actor, context=self._context)

    def _has_given_back(self, actor: Actor) -> None:
        """I6: a draining worker holds no message whose tasks it has not begun."""
        for (queue, receipt), hold in list(self._holds.items()):
            is_kept = hold.actor is actor and not hold.given_back and actor.alive
            if not is_kept or self.oracles.has_begun(actor, hold.bundle):
                continue
            self._require(
                not self.queue.held_s(queue, receipt) or self._excused(actor, hold.received_s),
                "I6",
                f"{actor.name} was told to drain {GIVE_BACK_S} s ago and keeps {hold.bundle}",
                hold.bundle[0],
            )

    def look_for_the_silent(self, leaders: Sequence[Actor]) -> None:
        """I7, at any time: lost bundles are found, even if the queues do not become empty."""
        names = [name for name in self._planned - self._committed if self.controls.is_live(name[0])]
        held = {hold.bundle for hold in self._holds.values() if hold.actor.alive}
        sent = self._in_queues() if names else set()
        lost = sorted(name for name in names if name not in held and name not in sent)
        since_s = [
            max(self.leads.led_s(leader), self._disturbed_s.get(leader, 0.0))
            for leader in leaders
            if not self.frozen(leader)
        ]
        self.silences.look(lost, max(since_s, default=None), self.clock.monotonic_s())

    def _in_queues(self) -> set[Name]:
        bodies = [body for name in self.queue.names() for body in self.queue.bodies(name)]
        return {name for body in bodies if (name := name_in(body))}

    def left(self, actor: Actor) -> None:
        """I6: a worker that has drained and left holds no message, unless its own calls were lost.

        A message given back with a wait counts as given back, because its holder asked for the
        wait.
        """
        for (queue, receipt), hold in list(self._holds.items()):
            if hold.actor is not actor or hold.given_back:
                continue
            self._require(
                not self.queue.held_s(queue, receipt) or self._excused(actor, hold.received_s),
                "I6",
                f"{actor.name} has left, and {hold.bundle} waits for its timeout",
                hold.bundle[0],
            )

    def notified(self, job: str, moment: str, ending: Ending | None) -> None:
        """Check that a notification reports an end that is committed."""
        state = ending.state.value.lower() if ending else "not ended"
        facts = f"a target is notified that {job} is {moment}, and it is {state}"
        self._require(state == moment, "notifications", facts, job)

    # --- Tasks -----------------------------------------------------------------------------------

    def started(self, start: Start) -> None:
        """I4: no task starts after its job's cancellation has been acknowledged."""
        self.starts.append(start)
        forbidden_s = self.controls.forbidden_s.get(start.job)
        self._require(
            forbidden_s is None,
            "I4",
            f"{start.job}: its cancellation was acknowledged at {forbidden_s}, and task "
            f"{task_name(start.stage, start.task)} starts",
            start.job,
        )
        since_s = self.controls.stopped_s(start.job)
        self._require(
            start.at_s <= since_s + self.lease_s,
            "lease",
            f"{start.job} is stopped since {since_s}, and task "
            f"{task_name(start.stage, start.task)} starts at {start.at_s}",
            start.job,
        )

    def begins(self, bundle: Bundle, task: int, actor: Actor | None) -> None:
        """Check and record the start of a task of this bundle."""
        now_s = self.clock.monotonic_s()
        if actor is not None:
            self._begun.setdefault(actor, set()).add(name_of_bundle(bundle))
        self.start_times.started(bundle, task, self.clock.now_s())
        disturbed = actor is not None and self._excused(actor, now_s - RECENT_S)
        self.oracles.started(bundle, now_s, actor, disturbed=disturbed)
        name = name_of_bundle(bundle)
        # The worker may have received it twice, and starts either message.
        holds = [hold for hold in self._holds.values() if hold.actor is actor and hold.bundle == name]
        if actor is not None and holds:
            received_s = min(one.received_s for one in holds)
            deliveries = min(one.losses + one.receives - 1 for one in holds)
            self.oracles.begins_again(actor, bundle, received_s, deliveries)

    def killed(self, actor: Actor) -> None:
        """Record that a worker has ended without draining."""
        self._killed_s[actor] = self.clock.monotonic_s()

    def replaced(self, actor: Actor, cause: str) -> None:
        """I8: a manager replaces the instance of an honest worker only in three cases. It received
        no heartbeat from it, a fault has hit it, or it runs only copies of bundles that have ended
        (with or without an outcome)."""
        is_needed = any(
            name not in self._committed and self.controls.is_live(name[0]) for name in self._begun.get(actor, ())
        )
        recent_s = self.clock.monotonic_s() - RECENT_S
        self._require(
            self.trust.is_liar(actor)
            or "silent" in cause
            or (cause.startswith(UNKNOWN_WORK) and not is_needed)
            or self._excused(actor, recent_s),
            "I8",
            f"the instance of {actor.name}, which tells the truth, is replaced: {cause}",
        )

    def lost_starts(self, bundle: Bundle, task: int) -> int:
        """Return how many workers started the task of this bundle and were killed or disturbed
        since.

        A start marker is written before the task begins. If another task's crash kills a worker in
        between, the marker counts as a start.
        """
        where = bundle.job, bundle.stage, task, bundle.round
        lost = {
            start.actor
            for start in self.starts
            if (start.job, start.stage, start.task, start.round) == where and self._came_to_grief(start)
        }
        for key, (actor, at_s) in self._written.items():
            died_s = self._killed_s.get(actor, math.inf)
            if key.startswith(object_keys.starts(bundle)) and (died_s <= at_s + BEGIN_S or self._excused(actor, at_s)):
                lost.add(actor)
        return len(lost)

    def _came_to_grief(self, start: Start) -> bool:
        actor = start.actor
        return actor is not None and (actor in self._killed_s or self._excused(actor, start.at_s))

    # --- The ledger ------------------------------------------------------------------------------

    def forget_counts(self) -> None:
        """Reset the counters, because the ledger is rebuilt."""
        self._counts.clear()

    def counted(self, job: JobId, round_: int, stages: Sequence[StageRecord]) -> None:
        """I2, at any time: no more tasks have ended than were planned, and counters do not fall
        within a round."""
        for record in stages:
            now = record.counts
            if now.planned is not None:
                told = f"{job}/{now.stage}: {now.planned} planned, {now.terminal} ended"
                self._require(now.terminal <= now.planned, "I2", told, job)
            before_round, before = self._counts.get((job, now.stage), (-1, now))
            self._counts[job, now.stage] = round_, now
            if before_round != round_:
                continue
            for what in ("succeeded", "failed", "cancelled"):
                was, is_ = getattr(before, what), getattr(now, what)
                told = f"{job}/{now.stage}: {what} fell from {was} to {is_} in round {round_}"
                self._require(is_ >= was, "I2", told, job)


def _carries_tasks(queue: str) -> bool:
    return queue.startswith("tasks-") and not queue.endswith("-dead")
