"""Checks of the grid's promises during a simulation: at each write, send, delete, and start of a task.

Invariant: a `Watch` only observes the simulation. A `Watch` records the effects of port calls at the services, so its
checks are valid for any code that calls the ports.
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
from batchlab.core.fair_share import SharePolicy
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Bundle, Control, JobId, JobState, Json, Outcome, StageCounts, StageName
from batchlab.core.ports import Clock, Cut, Ending, Message, StageRecord
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.core.service_settings import MAX_VISIBILITY_S
from batchlab.manager.unresponsive_workers import UNKNOWN_WORK
from batchlab.sim.actors import CURRENT, Actor, JobControls, SimulationError, Violated
from batchlab.sim.audit_checks import AuditChecks
from batchlab.sim.event_log import Name, bundle_in, doc_of, name_in, name_of_bundle, reported_in
from batchlab.sim.faults import LATENCY_S, SLOW_LOOKS_S
from batchlab.sim.gpu_checks import GpuChecks
from batchlab.sim.progress_checks import (
    GIVE_BACK_S,
    WAITS_S,
    CopyChecks,
    DependencyChecks,
    LeadershipChecks,
    SilenceChecks,
    StartTimeChecks,
    TimeoutChecks,
    WasteChecks,
)
from batchlab.sim.share_checks import ShareChecks
from batchlab.sim.storage_faults import Unsynced
from batchlab.sim.worker_rights import Trust
from batchlab.worker.heartbeats import RETURN_S

TOLERANCE_S = 1.0

FLUSHED = frozenset(f"ledger.{name}" for name in ("AddJob", "Reopen", "SetControl", "restore", "forget"))
"""Ledger calls that the ledger acknowledges only after their transaction is on the disk."""

BEGIN_S = 2 * LATENCY_S[1]
"""Longest time from the write of a start marker to the start of the task, without faults.

After the write of a start marker, the worker waits for the answer and reads the control object.
"""

COPY = "cp"
"""Key of the run time limit in the message of a speculative copy."""
EXPECTED = "ex"
"""Key of the expected run times in a task message."""

RECENT_S = 60.0
"""Seconds after a fault in which the fault may still delay the sends of its target."""

THAWED_S = 10.0
"""Seconds after its thaw in which an actor may complete sends that it prepared before it was frozen."""

ADOPTION_SHARE = 0.2
"""Share of `silence_s` for which a new leader waits before it sends a bundle again."""


@dataclass(slots=True)
class HeldMessage:
    """A task message that an actor has received and not deleted.

    `extended_s` is the time when the holder last changed the visibility timeout of the message. `given_back` is true if
    the change of the visibility timeout returned the message to the queue.
    """

    actor: Actor
    bundle: Name
    receives: int
    losses: int
    received_s: float
    extended_s: float
    is_copy: bool = False
    """Whether the message is a speculative copy."""
    given_back: bool = False

    @property
    def deliveries(self) -> int:
        """Number of earlier deliveries of the bundle."""
        return self.losses + self.receives - 1


@dataclass(slots=True)
class Start:
    """A task that began. `ended_s` is None while the task runs, and stays None if the task's worker died."""

    at_s: float
    actor: Actor | None
    job: JobId
    stage: StageName
    task: int
    round: int
    item: Json = None
    ended_s: float | None = None


@dataclass(slots=True)
class Watch:
    """Record of the effects that ports, services, and runners report. `fail` ends the simulation with an error."""

    clock: Clock
    queue: SimQueue
    fail: Callable[[SimulationError], None]
    frozen: Callable[[Actor], bool]
    thawed_s: Callable[[Actor], float]
    visibility_s: float
    """Visibility timeout that workers set to keep a message.

    `_gives_back` decides whether a different timeout returns a message.
    """
    lease_s: float
    """Seconds after a read of the control object in which workers may start tasks of its job."""
    lead_ttl_s: float
    silence_s: float
    """Seconds without news of a bundle after which a manager looks for the bundle."""
    are_looks_slow: bool = False
    starts: list[Start] = field(default_factory=list)
    flushed: Callable[[], None] = lambda: None
    """Function called after each ledger call in FLUSHED."""
    damaged: set[str] = field(default_factory=set)
    """Jobs with an object that the store has damaged."""
    trust: Trust = field(init=False)
    waste: WasteChecks = field(init=False)
    controls: JobControls = field(init=False)
    unsynced: Unsynced = field(init=False)
    leadership: LeadershipChecks = field(init=False)
    start_times: StartTimeChecks = field(init=False)
    dependencies: DependencyChecks = field(init=False)
    silences: SilenceChecks = field(init=False)
    shares: ShareChecks = field(init=False)
    copies: CopyChecks = field(init=False)
    gpus: GpuChecks = field(init=False)
    timeouts: TimeoutChecks = field(init=False)
    audits: AuditChecks = field(init=False)
    _jobs: dict[str, JobDef] = field(default_factory=dict)
    """Definitions of all jobs in the bucket, by id."""
    _begun: dict[Actor, set[Name]] = field(default_factory=dict)
    """Bundles of which each worker has started tasks, by worker."""
    _last_starts: dict[Name, Start] = field(default_factory=dict)
    """The last start of a task of each bundle, by bundle."""
    _killed_s: dict[Actor, float] = field(default_factory=dict)
    """The time of each worker's end, for workers that ended without draining."""
    _start_markers: dict[str, tuple[Actor, float]] = field(default_factory=dict)
    """The writer and the time of the first write of each start marker, except withdrawn markers."""
    _planned: set[Name] = field(default_factory=set)
    _opened: set[Name] = field(default_factory=set)
    """Bundles that are planned in job definitions.

    The manager sends another copy of the planned bundles if a client repeats its request.
    """
    _following: set[Name] = field(default_factory=set)
    """Planned bundles that are follow-ups of an outcome."""
    _committed: set[Name] = field(default_factory=set)
    _deleted: set[str] = field(default_factory=set)
    """Jobs whose deletion is committed."""
    _holds: dict[tuple[str, str], HeldMessage] = field(default_factory=dict)
    _stopped_s: dict[tuple[Actor, Name], float] = field(default_factory=dict)
    """Time at which a manager deleted a worker's message of a bundle with a speculative copy."""
    _settled_s: dict[tuple[Actor, Name], float] = field(default_factory=dict)
    _disturbed_s: dict[Actor, float] = field(default_factory=dict)
    _counts: dict[tuple[JobId, StageName], tuple[int, StageCounts]] = field(default_factory=dict)
    _context: Context = field(init=False)

    def __post_init__(self) -> None:
        self.trust = Trust(self.check)
        self.waste = WasteChecks(self.check, self._jobs)
        self.controls = JobControls(self.clock)
        self.unsynced = Unsynced(self.clock)
        self.leadership = LeadershipChecks(self.check, self.lead_ttl_s, self.thawed_s)
        self.start_times = StartTimeChecks(self.check, self._jobs)
        self.dependencies = DependencyChecks(self.check, self._jobs)
        self.silences = SilenceChecks(self.check, self.silence_s)
        self.shares = ShareChecks(self.check, self.controls.is_live, self.controls.live_since_s)
        self.copies = CopyChecks(self.check, self._jobs)
        self.timeouts = TimeoutChecks(self.check, self.leadership)
        self.audits = AuditChecks(self.check)
        # The watch's timers expire even while a process is frozen.
        self._context = copy_context()
        self.gpus = GpuChecks(self.check, self._jobs, self.controls.is_live, self.controls.live_since_s, self._context)

    def check(self, holds: bool, promise: str, facts: str, job: str | None = None) -> None:
        """Fail if the condition `holds` is false and no lying worker has touched the `job`."""
        if not holds and job not in self.trust.touched:
            self.fail(Violated(f"{promise} is violated: {facts}"))

    # --- The bucket ------------------------------------------------------------------------------

    def on_write(self, key: str, before: bytes | None, data: bytes, if_absent: bool) -> None:
        """Check I1: a committed outcome never changes, and is written by a conditional put."""
        parts = key.split("/")
        self._record_shares(key, data)
        self.audits.on_write(key, before, data)
        if parts[0] != "jobs":
            return
        # A write without a current actor comes from a client, which waits for the manager.
        if CURRENT.get() is not None:
            self.unsynced.on_write(key, before)
        job, kind = parts[1], parts[2]
        if self.trust.is_liar(CURRENT.get()):
            if job not in self.trust.touched:
                self.trust.forged.add(key)
            elif parts[3] == "outcomes":
                # An outcome that a lying worker forged may have any content. Only an outcome with readable content
                # commits a bundle.
                with suppress(Exception):
                    self._record_plan("outcomes", parts[-2], data)
            return
        if kind == "control.json":
            self.shares.remember(self.clock.monotonic_s())
            self.controls.on_write(job, json_format.control_from_bytes(data))
            return
        if kind == "final":
            self.controls.on_end(job)
            self.gpus.on_job_end(job)
            self.shares.on_end(job, self.clock.monotonic_s())
            self.dependencies.on_end(job, JobState(json_format.loads(data)["state"]))
        if kind not in ("spec.json", "retries", "final"):
            kind = parts[3]
        if kind in ("starts", "running"):
            return
        if kind == "outcomes" and not self.trust.check_seal(key, job):
            return
        if kind == "spec.json" and data == json_format.deleted_job(JobId(job)):
            return  # The note of a deleted job replaces the definition.
        self.check(before in (None, data), "I1", f"{key} has changed after its commit", job)
        # The parts of a manifest are written before the manifest that commits the parts. The name of a part is a hash
        # of the part's content, so the write of a part does not need a condition.
        is_conditional = if_absent or parts[-1].startswith(("part-", "item-"))
        self.check(is_conditional, "I1", f"{key} is written without a condition")
        self._record_plan(kind, parts[-2], data)

    def on_undo(self, key: str, before: bytes | None) -> None:
        """Record that a power cut has undone a write."""
        parts = key.split("/")
        if parts[2] == "control.json":
            word = json_format.ControlCommand(Control.RUN)
            with suppress(Malformed, TooNew):  # The store may have damaged the control object before the power cut.
                word = json_format.control_from_bytes(before or b"")
            self.controls.on_write(parts[1], word)
        elif outcome_key := object_keys.outcome_key(key):
            name = outcome_key.job, outcome_key.stage, outcome_key.bundle
            self._committed.discard(name)
            self.waste.on_undo(name)

    def _record_plan(self, kind: str, folder: str, data: bytes) -> None:
        """Record which bundles an object commits or plans."""
        if kind == "outcomes":
            outcome = json_format.outcome_from_json(json_format.loads(data))
            name = name_of_bundle(outcome.bundle)
            self.check(name in self._planned, "I1", f"{name} is committed, but not planned", name[0])
            self._check_copy_commit(outcome)
            self.timeouts.on_commit(outcome)
            self._committed.add(name)
            self.gpus.on_commit(name)
            self.waste.on_commit(name, self.clock.monotonic_s())
            self.start_times.on_commit(outcome)
            # A follow-up of another job than the outcome's job is a lie.
            bundles = [follow.bundle for follow in outcome.follows if follow.bundle.job == outcome.bundle.job]
            self._plan(bundles)
            self._following.update(map(name_of_bundle, bundles))
        elif kind in ("spec.json", "retries") and json_format.is_deleted(
            doc := json_format.loads(data, known=json_format.MENDED)
        ):
            self._deleted.add(doc["id"])
        elif kind == "spec.json":
            doc = json_format.loads(data)
            job, opening = json_format.job_from_json(doc), commit_keys.opening_in(doc)
            self._jobs[job.id] = job
            self.shares.on_definition(job, self.clock.monotonic_s())
            if opening and opening.cut:
                self._opened.update(map(name_of_bundle, opening.cut.bundles))
                self._cut(opening.cut)
        elif folder == "cuts":
            self._cut(json_format.cut_from_json(json_format.loads(data)))
        elif kind == "retries":
            for cut in json_format.loads(data, known=json_format.MENDED)["cuts"]:
                retried = json_format.cut_from_json(cut).bundles
                self._plan(retried)
                self.shares.on_plan(retried)

    def _record_shares(self, key: str, data: bytes) -> None:
        shares, now_s = self.shares, self.clock.monotonic_s()
        if key == object_keys.SHARES:
            policy = json_format.loads(data)["policy"]
            shares.on_policy(None if policy is None else SharePolicy.from_json(policy), now_s)
            self.waste.has_share_policy = policy is not None
        elif key == object_keys.SHARE_USE:
            shares.on_save(now_s)

    def _cut(self, cut: Cut) -> None:
        self._plan(cut.bundles)
        actor, now_s = CURRENT.get(), self.clock.monotonic_s()
        since_s = math.inf
        if actor is not None and actor.name.startswith("manager"):
            since_s = self._undisturbed_lead_s(actor)
            self.waste.check_cut(cut, now_s, since_s, self.controls.live_since_s)
        self.shares.on_cut(cut, now_s, since_s)
        self.gpus.on_cut(cut, now_s, since_s)

    def _plan(self, bundles: Sequence[Bundle]) -> None:
        self._planned.update(map(name_of_bundle, bundles))
        for bundle in bundles:
            self.timeouts.on_plan(bundle, self.clock.monotonic_s())

    # --- Port calls ------------------------------------------------------------------------------

    def on_fault(self, actor: Actor, for_s: float = 0.0) -> None:
        """Record that a lasting fault has hit the actor. Checks then accept late calls of the actor."""
        until_s = self.clock.monotonic_s() + for_s
        self._disturbed_s[actor] = max(until_s, self._disturbed_s.get(actor, 0.0))

    def _excused(self, actor: Actor, since_s: float) -> bool:
        """Return whether the actor is frozen, or a fault has hit the actor after `since_s`."""
        return self.frozen(actor) or self._disturbed_s.get(actor, -1.0) >= since_s - TOLERANCE_S

    def _undisturbed_lead_s(self, actor: Actor) -> float:
        return max(self.leadership.led_s(actor), self._disturbed_s.get(actor, 0.0))

    def _on_lease(self, actor: Actor, owner: str, now_s: float) -> None:
        self.shares.on_lease(actor.name, owner, now_s)
        if actor.name == owner and not self._excused(actor, now_s):
            self.shares.check_idle(now_s, self._undisturbed_lead_s(actor))
        self.leadership.on_lease(actor, owner, now_s)

    def on_call(self, actor: Actor, label: str, args: Sequence[Any], result: Any) -> None:
        """Record that a port call of `actor` has taken effect."""
        now_s = self.clock.monotonic_s()
        self.shares.on_call(label, args, result, now_s)
        if label == "ledger.lease":
            self._on_lease(actor, result.owner, now_s)
        elif actor.name.startswith("manager") and not _writes_audit(label, args):
            disturbed = self._excused(actor, now_s - self.lead_ttl_s)
            self.leadership.check_call(actor, label, now_s, disturbed=disturbed)
        if label == "queue.receive":
            self._on_receive(actor, args[0], result)
        elif label == "queue.send":
            self._sends(actor, args[0], args[1])
        elif label == "queue.delete":
            self._deletes(actor, args[0], args[1])
        elif label == "queue.change_visibility":
            self._extends(args[0], args[1])
        elif label in FLUSHED:
            self.flushed()
        elif label == "objects.put" and "/starts/" in args[0]:
            folder, _, name = args[0].rpartition("/")
            execution, *suffixes = name.split(".")
            start = f"{folder}/{execution}"
            if object_keys.WITHDRAWN in suffixes:
                self._start_markers.pop(start, None)
            else:
                self._start_markers.setdefault(start, (actor, now_s))
        elif label == "objects.get":
            self.trust.check_read(actor, args[0], len(result))
        elif label == "objects.delete" and not self.trust.is_liar(actor):
            kept = [key for key in args[0] if not self._may_delete(key)]
            self.check(not kept, "I1", f"{actor.name} deletes {kept}")

    def _may_delete(self, key: str) -> bool:
        """Return whether the object is a request to delete a job, or belongs to a job whose deletion is committed."""
        folder, *parts = key.split("/")
        job = parts[1].removesuffix(".json") if folder == "grid" else parts[0]
        return key.startswith(object_keys.DELETIONS) or job in self._deleted

    def _on_receive(self, actor: Actor, queue: str, messages: Sequence[Message]) -> None:
        now_s = self.clock.monotonic_s()
        if queue == object_keys.EVENTS:
            return
        for message in messages:
            doc = doc_of(message.body)
            bundle = bundle_in(doc)
            if bundle is None:
                continue
            name = name_of_bundle(bundle)
            # The check of deletes skips lies and bundles that no manager has planned.
            is_work = name in self._planned and message.body not in self.trust.lies_sent
            if not _carries_tasks(queue):
                if is_work and COPY not in doc:
                    self.waste.on_dead_letter(message.receipt, bundle, now_s)
                continue
            self.trust.on_receive(actor, queue, name[0], message.body)
            # A queue may still answer the long poll of a frozen worker that was killed.
            is_dead = not actor.alive
            may_receive = is_dead or not self.waste.is_draining(actor, now_s) or self._excused(actor, now_s)
            self.check(may_receive, "I6", f"{actor.name} receives {name} though it was told to drain", name[0])
            if is_work:
                is_copy = COPY in doc
                hold = HeldMessage(actor, name, message.receive_count, bundle.losses, now_s, now_s, is_copy)
                self._holds[queue, message.receipt] = hold

    def _sends(self, actor: Actor, queue: str, messages: Sequence[Any]) -> None:
        now_s = self.clock.monotonic_s()
        is_liar = self.trust.is_liar(actor)
        for message in messages:
            doc = doc_of(message.body)
            self.trust.on_send(actor, queue, message.body, doc)
            if is_liar:
                continue
            if queue == object_keys.EVENTS:
                for name in reported_in(doc):
                    facts = f"{actor.name} tells of {name} before it is committed"
                    self.check(name in self._committed, "step 3", facts, name[0])
                    self._settled_s[actor, name] = now_s
            elif (bundle := bundle_in(doc)) is not None:
                name = name_of_bundle(bundle)
                is_thawed = self.thawed_s(actor) >= now_s - THAWED_S
                disturbed = is_thawed or self._excused(actor, now_s - RECENT_S)
                self.waste.check_send(actor.name, bundle, now_s, disturbed=disturbed)
                self.silences.on_send(name)
                self._check_losses(actor, bundle)
                self._check_stopped(actor, name, now_s)
                if actor.name.startswith("manager"):
                    self.timeouts.check_send(actor.name, bundle, doc.get(EXPECTED, {}), now_s)
                if COPY in doc:
                    waiting = [] if disturbed else self._waiting(queue)
                    self.copies.check_send(actor.name, bundle, doc[COPY], waiting)
                else:
                    self._check_adoption(actor, name, now_s)
                    self._check_running(actor, bundle, now_s)
                facts = f"{actor.name} sends {name}, which follows from nothing that is committed"
                self.check(name in self._planned, "step 3", facts, name[0])
                self._settled_s[actor, name] = now_s

    def _waiting(self, queue: str) -> list[Name]:
        """Return the bundles that wait in the queue for a slot, except copies and bundles that have ended."""
        since_s = self.clock.now_s() - WAITS_S
        bodies = [body for body, visible_s in self.queue.waiting(queue) if visible_s < since_s]
        names = [name for body in bodies if COPY not in doc_of(body) and (name := name_in(body))]
        return [name for name in names if name in self._planned - self._committed and self.controls.is_live(name[0])]

    def _check_losses(self, actor: Actor, bundle: Bundle) -> None:
        """Check that a worker that sends its bundle again passes on the number of the bundle's losses.

        The check of losses skips follow-ups of outcomes, because a follow-up that is sent again counts as a new bundle.
        """
        name = name_of_bundle(bundle)
        expected = [hold.deliveries for hold in self._held_by(actor, name)]
        is_right = not expected or name in self._following or bundle.losses >= min(expected)
        facts = f"{actor.name} sends {name} with {bundle.losses} losses instead of {expected}"
        self.check(is_right, "losses", facts, name[0])

    def _check_stopped(self, actor: Actor, name: Name, now_s: float) -> None:
        """Check that a worker that lost against a speculative copy does not send its bundle again.

        A draining worker may not know yet that it has lost.
        """
        stopped_s = self._stopped_s.get((actor, name))
        is_allowed = (
            stopped_s is None
            or name in self._following
            or self.waste.is_draining(actor, now_s)
            or self._excused(actor, stopped_s)
        )
        facts = f"{actor.name} sends {name} again, although another worker's outcome has stopped its run"
        self.check(is_allowed, "copies", facts, name[0])

    def _held_by(self, actor: Actor | None, name: Name) -> list[HeldMessage]:
        return [hold for hold in self._holds.values() if hold.actor is actor and hold.bundle == name]

    def _check_adoption(self, actor: Actor, name: Name, now_s: float) -> None:
        """Check that a new leader does not send a bundle again while a worker still holds the bundle."""
        led_s = self.leadership.led_s(actor)
        if not 0.0 <= now_s - led_s < ADOPTION_SHARE * self.silence_s:
            return
        if name in self._opened or self.waste.has_dead_letters(led_s):
            return  # A new leader forwards the outcomes of dead letters again.
        holds = [hold for hold in self._holds.values() if hold.bundle == name]
        are_well = all(hold.actor.alive and not self._excused(hold.actor, hold.received_s) for hold in holds)
        # Workers drop the messages of a paused job, so a resume sends all bundles of the job.
        since_s = min((hold.received_s for hold in holds), default=now_s)
        may_send = since_s >= led_s or not are_well or self.controls.was_stopped(name[0], since_s)
        facts = f"{actor.name} leads since {led_s:.1f} and sends {name} again, which a worker has"
        self.check(may_send, "waste", facts, name[0])

    def _check_running(self, actor: Actor, bundle: Bundle, now_s: float) -> None:
        """Check that a manager does not send a bundle again while a healthy worker runs one of its tasks."""
        name = name_of_bundle(bundle)
        if not actor.name.startswith("manager") or name in self._following:
            return  # A manager forwards the follow-ups of an outcome again if the event of the outcome was lost.
        start = self._last_starts.get(name)
        if start is None or start.ended_s is not None or start.actor is None or not start.actor.alive:
            return
        # A task that has run for less than `silence_s` may be unreported. Workers that drain return their bundles, and
        # a resume sends all bundles of the job. A manager sends a bundle again if another copy was a dead letter.
        is_expected = (
            now_s - start.at_s < self.silence_s
            or self._undisturbed_lead_s(actor) > start.at_s
            or self._excused(start.actor, start.at_s)
            or self.waste.is_draining(start.actor, now_s)
            or self.waste.has_dead_letters(start.at_s)
            or self.controls.was_stopped(bundle.job, start.at_s)
        )
        facts = f"{actor.name} sends {name} again, which {start.actor.name} runs since {start.at_s:.1f}"
        self.check(is_expected, "waste", facts, bundle.job)

    def _deletes(self, actor: Actor, queue: str, receipts: Sequence[str]) -> None:
        if queue != object_keys.EVENTS and not _carries_tasks(queue):
            self.waste.check_deletes(receipts, is_live=self.controls.is_live)
        for receipt in receipts:
            hold = self._holds.pop((queue, receipt), None)
            if hold is None:
                continue
            # A manager sends a copy of a bundle before the manager knows that the dead worker held the bundle, so an
            # earlier send counts.
            since_s = hold.received_s if hold.actor is actor else 0.0
            is_done = self._settled_s.get((actor, hold.bundle), -1.0) >= since_s
            # After a worker has reported a bundle and kept a part of its tasks, the manager may replace the part.
            reported_s = self._settled_s.get((hold.actor, hold.bundle), -1.0)
            is_done = is_done or (hold.actor is not actor and reported_s >= hold.received_s)
            if hold.actor is not actor and hold.bundle in self._committed:
                self._stopped_s[hold.actor, hold.bundle] = self.clock.monotonic_s()
            # Another worker has the bundle of a copy.
            may_delete = is_done or hold.is_copy or self.controls.was_stopped(hold.bundle[0], hold.received_s)
            facts = f"{actor.name} deletes {hold.bundle}, and has neither told of it nor sent it again"
            self.check(may_delete, "step 4", facts, hold.bundle[0])

    def _extends(self, queue: str, changes: Sequence[tuple[str, float]]) -> None:
        now_s = self.clock.monotonic_s()
        for receipt, visibility_s in changes:
            hold = self._holds.get((queue, receipt))
            if hold is None:
                continue
            hold.extended_s, hold.given_back = now_s, self._gives_back(hold, visibility_s)
            is_beyond = now_s + visibility_s > hold.received_s + MAX_VISIBILITY_S
            facts = f"{hold.actor.name} asks to hold {hold.bundle} longer than SQS lets anybody"
            self.check(not is_beyond or self._excused(hold.actor, hold.received_s), "12 h", facts, hold.bundle[0])

    def _gives_back(self, hold: HeldMessage, visibility_s: float) -> bool:
        """Return whether a change of the visibility timeout returns the message to the queue.

        A timeout that is shorter than `visibility_s` returns the message. The timeout that a worker sets after a
        service error also returns the message, even if it exceeds a short `visibility_s`.
        """
        return visibility_s < self.visibility_s or visibility_s == RETURN_S * hold.receives

    def on_lapse(self, queue: str, receipt: str) -> None:
        """Check that no worker loses a message to its timeout while the worker could extend the timeout."""
        hold = self._holds.pop((queue, receipt), None)
        if hold is None or hold.given_back or not hold.actor.alive:
            return
        facts = (
            f"the visibility of {hold.bundle} ran out in the hands of {hold.actor.name}, which is "
            f"alive and was not disturbed since {hold.extended_s:.3f}"
        )
        self.check(self._excused(hold.actor, hold.extended_s), "heartbeat", facts, hold.bundle[0])

    def on_drain(self, actor: Actor) -> None:
        """Record that a worker starts to drain."""
        self.waste.on_drain(actor, self.clock.monotonic_s())
        if self.are_looks_slow:
            # With slow reads of control objects, a worker may wait for an answer before the worker returns a message.
            return
        loop = asyncio.get_running_loop()
        loop.call_later(GIVE_BACK_S, self._check_drain, actor, context=self._context)

    def _check_drain(self, actor: Actor) -> None:
        """Check I6: a draining worker does not hold messages whose tasks the worker has not begun."""
        for (queue, receipt), hold in list(self._holds.items()):
            is_kept = hold.actor is actor and not hold.given_back and actor.alive
            if not is_kept or self.waste.has_begun(actor, hold.bundle):
                continue
            is_allowed = not self.queue.held_s(queue, receipt) or self._excused(actor, hold.received_s)
            facts = f"{actor.name} was told to drain {GIVE_BACK_S} s ago and keeps {hold.bundle}"
            self.check(is_allowed, "I6", facts, hold.bundle[0])

    def check_silences(self, leaders: Sequence[Actor]) -> None:
        """Check I7 at any time: lost bundles are found, even if the queues do not become empty."""
        names = [name for name in self._planned - self._committed if self.controls.is_live(name[0])]
        held_bundles = {hold.bundle for hold in self._holds.values() if hold.actor.alive}
        sent: set[Name] = set()
        if names:
            bodies = [body for queue in self.queue.names() for body in self.queue.bodies(queue)]
            sent = {name for body in bodies if (name := name_in(body))}
        lost = sorted(name for name in names if name not in held_bundles and name not in sent)
        since_s = [self._undisturbed_lead_s(leader) for leader in leaders if not self.frozen(leader)]
        leader_s = self.leadership.last_s
        self.silences.check_progress(lost, max(since_s, default=None), self.clock.monotonic_s(), leader_s)

    def on_exit(self, actor: Actor) -> None:
        """Check I6: a worker that has drained and exited does not hold messages, unless the worker's calls were lost.

        A message that the worker returned to the queue with a delay does not count as held.
        """
        for (queue, receipt), hold in list(self._holds.items()):
            if hold.actor is not actor or hold.given_back:
                continue
            is_allowed = not self.queue.held_s(queue, receipt) or self._excused(actor, hold.received_s)
            facts = f"{actor.name} has left, and {hold.bundle} waits for its timeout"
            self.check(is_allowed, "I6", facts, hold.bundle[0])

    def on_notification(self, job: str, moment: str, ending: Ending | None) -> None:
        """Check that a notification reports an end that is committed."""
        state = ending.state.value.lower() if ending else "not ended"
        facts = f"a target is notified that {job} is {moment}, and it is {state}"
        self.check(state == moment, "notifications", facts, job)

    # --- Tasks -----------------------------------------------------------------------------------

    def on_start(self, start: Start) -> None:
        """Check I4: no task starts after the cancellation of its job has been acknowledged."""
        self.starts.append(start)
        task = task_name(start.stage, start.task)
        forbidden_s = self.controls.forbidden_s.get(start.job)
        facts = f"{start.job}: its cancellation was acknowledged at {forbidden_s}, and task {task} starts"
        self.check(forbidden_s is None, "I4", facts, start.job)
        since_s = self.controls.stopped_s(start.job)
        facts = f"{start.job} is stopped since {since_s}, and task {task} starts at {start.at_s}"
        self.check(start.at_s <= since_s + self.lease_s, "lease", facts, start.job)

    def on_task(self, bundle: Bundle, task: int, actor: Actor | None) -> None:
        """Check and record the start of a task of `bundle`."""
        now_s, name = self.clock.monotonic_s(), name_of_bundle(bundle)
        if actor is not None:
            self._check_copy(actor, bundle, task)
            self._begun.setdefault(actor, set()).add(name)
            self._last_starts[name] = self.starts[-1]
        self.start_times.check_start(bundle, task, self.clock.now_s())
        self.dependencies.check_start(bundle.job)
        disturbed = actor is not None and self._excused(actor, now_s - RECENT_S)
        self.waste.check_start(bundle, now_s, actor, disturbed=disturbed)
        # A worker that has received a bundle twice may run either message.
        holds = self._held_by(actor, name)
        if actor is not None and holds:
            received_s = min(hold.received_s for hold in holds)
            deliveries = min(hold.deliveries for hold in holds)
            self.waste.check_rerun(actor, bundle, received_s, deliveries)

    def _check_copy_commit(self, outcome: Outcome) -> None:
        actor = CURRENT.get()
        holds = self._held_by(actor, name_of_bundle(outcome.bundle))
        if actor is not None and holds and all(hold.is_copy for hold in holds):
            self.copies.check_commit(actor, outcome)

    def _check_copy(self, actor: Actor, bundle: Bundle, task: int) -> None:
        before, holds = self._last_starts.get(name_of_bundle(bundle)), self._held_by(actor, name_of_bundle(bundle))
        if before is None or before.actor is not actor or before.ended_s is not None or before.task != task:
            return
        # A worker with two messages of the same bundle in addition to the copy may run both.
        originals = [hold for hold in holds if not hold.is_copy]
        is_original = len(originals) == 1 and originals[0].received_s <= before.at_s
        is_copy = any(hold.is_copy and not hold.given_back for hold in holds)
        self.copies.check_start(actor, bundle, is_original, is_copy)

    def on_kill(self, actor: Actor) -> None:
        """Record that a worker has ended without draining."""
        self._killed_s[actor] = self.clock.monotonic_s()

    def on_replace(self, actor: Actor, cause: str) -> None:
        """Check I8: a manager replaces the instance of an honest worker only for one of three reasons.

        The reasons are a missing heartbeat, a fault that hit the worker, and a worker that runs only copies of ended
        bundles. A bundle may end with or without an outcome.
        """
        is_needed = any(
            name not in self._committed and self.controls.is_live(name[0]) for name in self._begun.get(actor, ())
        )
        is_allowed = (
            self.trust.is_liar(actor)
            or "silent" in cause
            or (cause.startswith(UNKNOWN_WORK) and not is_needed)
            or self._excused(actor, self.clock.monotonic_s() - RECENT_S)
        )
        facts = f"the instance of {actor.name}, which tells the truth, is replaced: {cause}"
        self.check(is_allowed, "I8", facts)

    def lost_starts(self, bundle: Bundle, task: int) -> int:
        """Return the number of workers that started the task of `bundle` and were later killed or disturbed.

        A worker writes a start marker before the task begins. If the crash of another task kills the worker between the
        marker and the start, the marker counts as a start.
        """
        where = bundle.job, bundle.stage, task, bundle.round
        begin_s = BEGIN_S + (SLOW_LOOKS_S[1] if self.are_looks_slow else 0.0)
        lost = {
            start.actor
            for start in self.starts
            if start.actor is not None
            and (start.job, start.stage, start.task, start.round) == where
            and (start.actor in self._killed_s or self._excused(start.actor, start.at_s))
        }
        for key, (actor, at_s) in self._start_markers.items():
            died_s = self._killed_s.get(actor, math.inf)
            if key.startswith(object_keys.starts(bundle)) and (died_s <= at_s + begin_s or self._excused(actor, at_s)):
                lost.add(actor)
        return len(lost)

    # --- The ledger ------------------------------------------------------------------------------

    def forget_counts(self) -> None:
        """Reset the counters, because the ledger is rebuilt."""
        self._counts.clear()

    def check_counts(self, job: JobId, round_: int, stages: Sequence[StageRecord]) -> None:
        """Check I2 at any time: at most the planned tasks have ended, and no counter decreases within a round."""
        for record in stages:
            now = record.counts
            name = f"{job}/{now.stage}"
            if now.planned is not None:
                facts = f"{name}: {now.planned} planned, {now.terminal} ended"
                self.check(now.terminal <= now.planned, "I2", facts, job)
            before_round, before = self._counts.get((job, now.stage), (-1, now))
            self._counts[job, now.stage] = round_, now
            if before_round != round_:
                continue
            for what in ("succeeded", "failed", "cancelled"):
                was, is_ = getattr(before, what), getattr(now, what)
                self.check(is_ >= was, "I2", f"{name}: {what} fell from {was} to {is_} in round {round_}", job)


def _writes_audit(label: str, args: Sequence[Any]) -> bool:
    """Return whether a call stores audit records, which a manager also stores after it has lost its lease."""
    return label == "objects.put" and str(args[0]).startswith(object_keys.AUDIT)


def _carries_tasks(queue: str) -> bool:
    return queue.startswith("tasks-") and not queue.endswith("-dead")
