"""Check of fair share: a manager divides the window of a pool among shares as a reference computation does.

The reference computation uses only the effects of port calls: the stored policy, cuts, and folds. It gives away one
place after the other, while the manager computes all places at once (`core.fair_share.places`). An undisturbed manager
learns of an effect within SETTLE_S, so a cut may agree with any state of the last SETTLE_S.

Two further checks do not depend on the computation: smaller tasks of a share do not overtake a larger task at a limit
forever, and tasks do not wait while a pool has no bundle to run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchlab.core.fair_share import SharePolicy, share_of
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Pool, StageName
from batchlab.core.ports import Cut, Fold, FoldResult
from batchlab.sim.event_log import Name, name_of_bundle
from batchlab.sim.progress_checks import KNOWN_S, Check

SETTLE_S = 1.0
BUNDLE_S = 0.75
"""Smallest estimate in seconds of an outstanding bundle, which is the target duration of a bundle."""
UNMEASURED_S = 1.0
"""Estimate in seconds of an outstanding bundle before the first measurement."""
SPARE_PLACES = 1
"""Places above the reference that a cut may take, because rounding may move the last place to another share."""

OVERTAKEN_S = 100.0
"""Time in seconds after which smaller tasks of a share may not overtake a waiting task any more."""
IDLE_S = 25.0
"""Longest time in seconds for which tasks wait while a pool has no bundle to run."""
UNSURE_S = 300.0
"""Time in seconds within which a leader finds the outcome of a bundle that an earlier leader has folded."""

Place = tuple[str, str]
"""A pool and a share."""
StageKey = tuple[str, StageName]


@dataclass(slots=True)
class Sent:
    """Outstanding bundles of a share in a pool, with their slots and their estimated slot seconds, except bundles that
    wait for a backoff."""

    bundles: int = 0
    slots: int = 0
    slot_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Used:
    """Use of a share in a pool in slot seconds at `at_s`. After a crash, the next leader may not know the use above
    `least_s`."""

    least_s: float = 0.0
    most_s: float = 0.0
    at_s: float = 0.0

    def at(self, policy: SharePolicy, now_s: float) -> Used:
        factor = math.exp(-(now_s - self.at_s) / policy.decay_s)
        return Used(self.least_s * factor, self.most_s * factor, now_s)


@dataclass(frozen=True, slots=True)
class State:
    """State of all pools at one moment."""

    at_s: float
    policy: SharePolicy
    sent: dict[Place, Sent]
    used: dict[Place, Used]
    left: dict[StageKey, int]
    active: frozenset[str]


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim of a share to the places of a window, for the reference computation."""

    weight: float
    use_s: float
    place_s: float
    max_places: float


def reference_places(claims: dict[str, Claim], window: int) -> dict[str, int]:
    """Give each place of the window to the share with the lowest weighted use, and return the places of each share."""
    result = dict.fromkeys(claims, 0)
    for _ in range(window):
        open_ = [share for share, claim in claims.items() if result[share] < claim.max_places]
        if not open_:
            break
        lowest = min(
            open_,
            key=lambda share: (
                claims[share].weight * (claims[share].use_s + result[share] * claims[share].place_s),
                share,
            ),
        )
        result[lowest] += 1
    return result


@dataclass(slots=True)
class ShareChecks:
    """Check of each cut against the reference computation. `pools` are the pools of the world, and `window` is the
    number of outstanding bundles per slot."""

    check: Check
    is_live: Callable[[str], bool]
    """Function that returns whether a job may run."""
    live_since_s: Callable[[str], float]
    is_on: bool = False
    """Whether the world has shares. The check ignores all events of other worlds."""
    pools: dict[str, Pool] = field(default_factory=dict)
    window: int = 3
    policy: SharePolicy | None = None
    cuts: int = 0
    """Number of checked cuts."""
    _jobs: dict[str, JobDef] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)
    _outstanding: dict[Name, None] = field(default_factory=dict)
    _delayed_s: dict[Name, float] = field(default_factory=dict)
    """Time at which the backoff of each delayed bundle ends."""
    _overtaken_s: dict[StageKey, float] = field(default_factory=dict)
    """Time since which smaller tasks of the same share overtake a stage that has no outstanding bundle."""
    _idle_s: dict[str, float] = field(default_factory=dict)
    """Time since which tasks wait in each pool without a bundle to run."""
    _done_s: dict[Name, float] = field(default_factory=dict)
    _leaders: set[str] = field(default_factory=set)
    _led_s: float = 0.0
    _unsure_s: float = -math.inf
    """Time since which the leader may count a follow-up as outstanding although an earlier leader has folded it."""
    _mean_s: dict[StageKey, float] = field(default_factory=dict)
    _left: dict[StageKey, int] = field(default_factory=dict)
    _left_since_s: dict[StageKey, float] = field(default_factory=dict)
    _used: dict[Place, Used] = field(default_factory=dict)
    _recent: deque[tuple[float, Place, float]] = field(default_factory=deque)
    """Uses with their times since the last stored use, by pool and share."""
    _states: deque[State] = field(default_factory=deque)

    def remember(self, now_s: float) -> None:
        """Store the state before an event at `now_s`."""
        if self.policy is None:
            return
        active = {share_of(job) for name, job in self._jobs.items() if name not in self._ended}
        active |= {share for (_, share), used in self._used.items() if now_s - used.at_s <= self.policy.decay_s + 2.0}
        state = State(now_s, self.policy, self._sent(now_s), dict(self._used), dict(self._left), frozenset(active))
        self._states.append(state)
        while self._states[0].at_s < now_s - SETTLE_S and len(self._states) > 1:
            self._states.popleft()

    def _sent(self, now_s: float) -> dict[Place, Sent]:
        result: dict[Place, Sent] = {}
        for bundle in self._outstanding:
            job, name, _ = bundle
            definition, stage = self._jobs[job], StageName(name)
            if self.is_live(job) and self._delayed_s.get(bundle, now_s) <= now_s:
                stage_def = definition.stage(stage)
                sent = result.setdefault((stage_def.pool, share_of(definition)), Sent())
                sent.bundles += 1
                sent.slots += stage_def.slots
                estimate_s = max(BUNDLE_S, self._mean_s.get((job, stage), UNMEASURED_S))
                sent.slot_s += stage_def.slots * estimate_s
        return result

    # --- Events ----------------------------------------------------------------------------------

    def on_policy(self, policy: SharePolicy | None, now_s: float) -> None:
        self.remember(now_s)
        if self.policy is not None and policy is not None:
            self._used = {place: used.at(self.policy, now_s) for place, used in self._used.items()}
        elif policy is None:
            self._used.clear()
            self._states.clear()
        self._overtaken_s.clear()
        self.policy = policy

    def on_definition(self, job: JobDef, now_s: float) -> None:
        if not self.is_on:
            return
        self.remember(now_s)
        self._jobs[job.id] = job

    def on_end(self, job: str, now_s: float) -> None:
        if not self.is_on:
            return
        self.remember(now_s)
        self._ended.add(job)
        self._outstanding = {name: None for name in self._outstanding if name[0] != job}
        for key in [key for key in self._left if key[0] == job]:
            del self._left[key], self._left_since_s[key]

    def on_plan(self, bundles: Sequence[Bundle]) -> None:
        """Record planned bundles. The caller has remembered the state."""
        for name in map(name_of_bundle, bundles):
            if name not in self._done_s and name[0] in self._jobs and name[0] not in self._ended:
                self._outstanding[name] = None

    def on_call(self, label: str, args: Sequence[Any], result: Any, now_s: float) -> None:
        """Record the effect of a port call."""
        if self.is_on and label == "ledger.Fold":
            self.on_fold(args[0], result, now_s)

    def on_fold(self, fold: Fold, result: FoldResult, now_s: float) -> None:
        """Record the completions that the ledger has accepted."""
        self.remember(now_s)
        for completion, is_new in zip(fold.completions, result.new, strict=True):
            bundle = completion.bundle
            job = self._jobs.get(bundle.job)
            self._done_s[name_of_bundle(bundle)] = now_s
            self._outstanding.pop(name_of_bundle(bundle), None)
            self._delayed_s.pop(name_of_bundle(bundle), None)
            if job is None or bundle.job in self._ended:
                continue
            follows = [follow.bundle for follow in completion.follows]
            if any(self._done_s.get(name_of_bundle(follow), now_s) < self._led_s for follow in follows):
                self._unsure_s = now_s
            self.on_plan(follows)
            for follow in completion.follows:
                if follow.delay_s and name_of_bundle(follow.bundle) in self._outstanding:
                    self._delayed_s[name_of_bundle(follow.bundle)] = now_s + follow.delay_s
            if is_new and self.policy is not None:
                stage = job.stage(bundle.stage)
                # The integral of the decay over the run of the bundle, which has just ended.
                took_s, decay_s = max(0.0, completion.ended_s - completion.started_s), self.policy.decay_s
                use_s = stage.slots * decay_s * (1 - math.exp(-took_s / decay_s))
                place = stage.pool, share_of(job)
                used = self._used.get(place, Used(at_s=now_s)).at(self.policy, now_s)
                self._used[place] = Used(used.least_s + use_s, used.most_s + use_s, now_s)
                self._recent.append((now_s, place, use_s))
        for rows in result.jobs.values():
            for record in rows.stages:
                if record.counts.mean_s is not None:
                    self._mean_s[rows.id, record.counts.stage] = record.counts.mean_s

    def on_save(self, now_s: float) -> None:
        """Record that a leader has stored the use of the shares."""
        while self._recent and self._recent[0][0] < now_s - SETTLE_S:
            self._recent.popleft()

    def on_lease(self, manager: str, owner: str, now_s: float) -> None:
        """Record that the ledger told a manager that `owner` holds the lease. A new leader may not know the use since
        the last stored use."""
        if not self.is_on or manager != owner or manager in self._leaders:
            return
        self._leaders.add(manager)
        self._led_s = now_s
        if self.policy is None:
            return
        self._used = {place: used.at(self.policy, now_s) for place, used in self._used.items()}
        for at_s, place, use_s in self._recent:
            used = self._used[place]
            lost_s = use_s * math.exp(-(now_s - at_s) / self.policy.decay_s)
            self._used[place] = Used(max(0.0, used.least_s - lost_s), used.most_s, now_s)
        self._recent.clear()

    # --- The check -------------------------------------------------------------------------------

    def on_cut(self, cut: Cut, now_s: float, since_s: float) -> None:
        """Check a cut of a manager without faults since `since_s`, and record the cut."""
        if not self.is_on:
            return
        self.remember(now_s)
        is_known = now_s - since_s >= KNOWN_S and now_s - self._unsure_s >= UNSURE_S
        if self.policy is not None and cut.bundles and is_known and not cut.round:
            self.cuts += 1
            facts = [self._wrong(state, cut, now_s, since_s) for state in self._states]
            self.check("" in facts, "share", facts[-1], cut.job)
            self._check_overtaking(cut, now_s, since_s)
        self.on_plan(cut.bundles)
        key = cut.job, cut.stage
        if cut.left and cut.job not in self._ended:
            self._left[key] = len(cut.left)
            self._left_since_s.setdefault(key, now_s)
        else:
            self._left.pop(key, None)
            self._left_since_s.pop(key, None)

    def _check_overtaking(self, cut: Cut, now_s: float, since_s: float) -> None:
        """Check that smaller tasks do not take the slots below a limit while a task of the same share waits for more
        slots."""
        job = self._jobs[cut.job]
        stage, share = job.stage(cut.stage), share_of(job)
        self._overtaken_s.pop((cut.job, cut.stage), None)
        limit = self.policy.attributes(share).max_slots if self.policy else None
        if limit is None:
            return
        busy = {name[:2] for name in self._outstanding}
        slots = min(state.sent.get((stage.pool, share), Sent()).slots for state in self._states)
        for key in self._left:
            other = self._jobs[key[0]]
            larger = other.stage(key[1])
            is_peer = share_of(other) == share and larger.pool == stage.pool and other.priority == job.priority
            if not is_peer or larger.slots <= stage.slots or not self.is_live(key[0]):
                continue
            if key in busy:
                self._overtaken_s.pop(key, None)
                continue
            begun_s = max(self._left_since_s.get(key, now_s), since_s, self.live_since_s(key[0]))
            begun_s = max(begun_s, self._overtaken_s.setdefault(key, now_s))
            is_blocked = slots > 0 and slots + larger.slots > limit
            facts = f"{cut.job} gets slots below the limit of share {share}, for which {key} waits since {begun_s:.1f}"
            self.check(not is_blocked or now_s - begun_s <= OVERTAKEN_S, "share", facts, cut.job)

    def check_idle(self, now_s: float, since_s: float) -> None:
        """Check that tasks do not wait while each outstanding bundle of their pool waits for a backoff. The leader has
        led without faults since `since_s`."""
        if not self.is_on or self.policy is None:
            return
        for pool in self.pools:
            waiting = [key for key in self._left if self._jobs[key[0]].stage(key[1]).pool == pool]
            waiting = [key for key in waiting if self.is_live(key[0])]
            known_s = [max(self._left_since_s.get(key, now_s), self.live_since_s(key[0])) for key in waiting]
            busy = [name for name in self._outstanding if self._jobs[name[0]].stage(StageName(name[1])).pool == pool]
            if not waiting or not all(self._waits_long(name, now_s) for name in busy):
                self._idle_s.pop(pool, None)
                continue
            idle_s = max(self._idle_s.setdefault(pool, now_s), since_s, min(known_s))
            facts = f"{waiting} wait since {idle_s:.1f}, although pool {pool} is idle"
            self.check(now_s - idle_s <= IDLE_S, "share", facts, waiting[0][0])

    def _waits_long(self, name: Name, now_s: float) -> bool:
        """Return whether the backoff of the bundle ends much later than a bundle that starts now."""
        soon_s = now_s + 2 * self._mean_s.get((name[0], StageName(name[1])), UNMEASURED_S) + 5.0
        return self._delayed_s.get(name, now_s) > soon_s or not self.is_live(name[0])

    def _wrong(self, state: State, cut: Cut, now_s: float, since_s: float) -> str:
        """Return what is wrong with the cut in the state, or "" for a right cut."""
        job = self._jobs[cut.job]
        stage, share = job.stage(cut.stage), share_of(job)
        pool, size, place = self.pools[stage.pool], len(cut.bundles), (stage.pool, share)
        max_slots = pool.max_size * pool.slots
        sent = state.sent.get(place, Sent())
        limit = state.policy.attributes(share).max_slots
        if limit is not None and sent.slots + size * stage.slots > limit and (sent.slots or size > 1):
            return f"share {share} gets {size} bundles of {stage.slots} slots above {sent.slots} of at most {limit}"
        if state.policy.reservation:
            ratio = (state.policy.reservation / 100) ** max(1, len(state.active | {share}))
            usable = math.floor(max_slots * (1 - ratio) + 1e-9)
            slots = sum(one.slots for (name, _), one in state.sent.items() if name == stage.pool)
            if slots + size * stage.slots > usable and (slots or size > 1):
                return f"{cut.job} gets {size} bundles above {slots} slots, of which {usable} are not reserved"
        claims = self._claims(state, place, now_s, since_s)
        places = reference_places(claims, self.window * max_slots + 1)
        if sent.bundles + size > places[share] + SPARE_PLACES:
            uses = {one: round(claim.weight * claim.use_s, 2) for one, claim in claims.items()}
            return (
                f"share {share} gets {size} bundles above {sent.bundles}, its places are {places} for the uses {uses}"
            )
        return ""

    def _claims(self, state: State, place: Place, now_s: float, since_s: float) -> dict[str, Claim]:
        """Return the claims of all shares in the pool. In doubt, the share in `place` has the larger claim."""
        pool, share = place
        waiting: dict[str, int] = {}
        for (name, stage), tasks in state.left.items():
            job = self._jobs[name]
            known_s = max(self._left_since_s.get((name, stage), now_s), since_s, self.live_since_s(name))
            if job.stage(stage).pool == pool and now_s - known_s >= KNOWN_S:
                waiting[share_of(job)] = waiting.get(share_of(job), 0) + tasks
        sent_in_pool = [sent for (name, _), sent in state.sent.items() if name == pool]
        bundles = sum(sent.bundles for sent in sent_in_pool)
        usual_s = sum(sent.slot_s for sent in sent_in_pool) / bundles if bundles else BUNDLE_S
        claims: dict[str, Claim] = {}
        for one in sorted({share, *waiting, *(name for where, name in state.sent if where == pool)}):
            sent, attributes = state.sent.get((pool, one), Sent()), state.policy.attributes(one)
            used = state.used.get((pool, one), Used(at_s=now_s)).at(state.policy, now_s)
            max_places = math.inf if one == share else sent.bundles + waiting.get(one, 0)
            if attributes.max_slots is not None and one != share:
                max_places = min(max_places, sent.bundles + max(0, attributes.max_slots - sent.slots))
            place_s = sent.slot_s / sent.bundles if sent.bundles else usual_s
            claims[one] = Claim(attributes.weight, used.least_s if one == share else used.most_s, place_s, max_places)
        return claims
