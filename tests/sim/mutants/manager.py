"""Planted bugs in the manager: plans, cuts, the end of a job, cancel and retry, and the search for lost bundles.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from batchlab.core import visibility_timeouts
from batchlab.core.commit import commit
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Completion, Control, JobId, StageCounts, StageName, TaskSet
from batchlab.core.ports import BundleRecord, ChangeResult, Cut, JobRecord, Round, SetControl, SetPlanned
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.bundle_inputs import Manifest
from batchlab.manager import ledger_rebuild, retry_rounds
from batchlab.manager.adoption import Adoption
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.ledger_writer import EMPTY, LedgerWriter, OutcomesByBundle, Traces
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.retry_rounds import RetryPlanner
from batchlab.manager.stage_plans import PartWriter
from batchlab.manager.state import LiveJob, Outstanding, Ports
from tests.sim.mutants.kit import Plant, planted

# --- Planning and cutting ------------------------------------------------------------------------


@planted("I1", "I2", "I3", "I7")
def gather_on_message_count(plant: Plant) -> None:
    """A counter grows with every received completion, and a gather starts when the counter reaches the number of
    upstream tasks. If an event arrives twice, the gather starts too early and omits results (I1).
    """
    heard: Counter[tuple[JobId, StageName]] = Counter()
    fold, plan = LedgerWriter.fold, JobCoordinator._plan

    @plant.method(LedgerWriter, "fold")
    async def _fold(
        self: LedgerWriter, completions: Sequence[Completion], whole: OutcomesByBundle = EMPTY, traces: Traces = EMPTY
    ) -> None:
        for completion in completions:
            if not completion.bundle.round:
                ended = len(completion.succeeded) + len(completion.failed) + len(completion.cancelled)
                heard[completion.bundle.job, completion.bundle.stage] += ended
        await fold(self, completions, whole, traces)

    @plant.method(JobCoordinator, "_plan")
    async def _plan(self: JobCoordinator, live: LiveJob, stage: StageDef) -> None:
        if not stage.chained and live.stages[stage.name].counts.planned is None:
            for name in stage.after:
                counts = live.stages[name].counts
                if not counts.ended and heard[live.id, name] >= (counts.planned or 10**9):
                    ended = replace(counts, cancelled=counts.planned or 0)
                    live.stages[name] = replace(live.stages[name], counts=ended)
        await plan(self, live, stage)


@planted("I1", "I2", "I3", "I7")
def plan_without_conditional_put(plant: Plant) -> None:
    """Plans and cuts are written without If-None-Match. A manager that has lost its lease without noticing the loss
    overwrites a plan that the new leader has used (I1, I3).
    """

    @plant.method(PartWriter, "commit")
    async def _commit(self: PartWriter, skipped: TaskSet) -> Manifest:
        await self._flush()
        parts = tuple(self._parts)
        made = Manifest(self._count, tuple(self._starts), skipped, self._round, parts)
        key = object_keys.manifest(self._job, self._stage, self._round)
        await self._patience(lambda: self._objects.put(key, made.to_bytes()))
        return made

    @plant.method(JobCoordinator, "_put_cut")
    async def _put_cut(self: JobCoordinator, cut: Cut) -> Cut:
        key = object_keys.cut(cut.job, cut.stage, cut.round, cut.seq)
        data = json_format.to_bytes(json_format.cut_to_json(cut))
        await self._ports.patience(lambda: self._ports.objects.put(key, data))
        return cut


@planted("step 3")
def cut_sent_before_committed(plant: Plant) -> None:
    """The manager sends the bundles of a cut before it commits the cut. If the manager ends in between, the next leader
    cuts the same tasks into other bundles (I1, I2).
    """
    original = JobCoordinator._commit_cut

    @plant.method(JobCoordinator, "_commit_cut")
    async def _commit_cut(self: JobCoordinator, live: LiveJob, cut: Cut) -> Cut:
        await self.send(live.job, cut.bundles)
        return await original(self, live, cut)


@planted("I3", "step 3")
def cut_only_in_memory_and_ledger(plant: Plant) -> None:
    """A cut is written only to the ledger, and not to the bucket. A ledger that is rebuilt from the bucket does not
    contain the bundles of the cut (I3).
    """

    @plant.method(JobCoordinator, "_put_cut")
    async def _put_cut(self: JobCoordinator, cut: Cut) -> Cut:
        return cut


@planted("I2", "I7")
def chained_stage_planned_once(plant: Plant) -> None:
    """The number of tasks of a chained stage is stored in a separate step after the commit of the first stage's plan.
    If the manager ends before this step, the number of tasks is missing forever (I7), or failures make the number
    negative (I2).
    """
    plan, first_cut = JobCoordinator._plan, JobCoordinator._first_cut

    @plant.method(JobCoordinator, "_plan")
    async def _plan(self: JobCoordinator, live: LiveJob, stage: StageDef) -> None:
        if not stage.chained:
            await plan(self, live, stage)

    @plant.method(JobCoordinator, "_first_cut")
    async def _first_cut(self: JobCoordinator, live: LiveJob, stage: StageDef, tasks: TaskSet) -> None:
        await first_cut(self, live, stage, tasks)
        for fed in live.job.fed_by(stage.name):
            await self._ports.ledger.apply(SetPlanned(live.id, fed.name, len(tasks), live.round))
        await self._ledger_writer.refresh(live)


# --- Ending --------------------------------------------------------------------------------------


@planted("I4")
def cancel_that_only_marks_the_ledger(plant: Plant) -> None:
    """A cancellation of a job is written only to the ledger. Workers do not read the ledger, so the workers continue to
    start tasks of the job (I4).
    """

    @plant.method(JobCoordinator, "forbid")
    async def forbid(self: JobCoordinator, live: LiveJob, word: json_format.ControlCommand) -> None:
        await self._ports.ledger.apply(SetControl(live.id, Control.CANCEL, live.round))
        live.record = replace(live.record, control=Control.CANCEL)


@planted("I4")
def cancel_acknowledged_at_once(plant: Plant) -> None:
    """A cancellation is acknowledged as soon as the control object is written. Workers that have read the control
    object just before the write continue to start tasks until they read the control object again (I4).
    """
    original = JobCoordinator.forbid

    @plant.method(JobCoordinator, "forbid")
    async def forbid(self: JobCoordinator, live: LiveJob, word: json_format.ControlCommand) -> None:
        settings, self._settings = self._settings, replace(self._settings, control_lease_s=0.0)
        try:
            await original(self, live, word)
        finally:
            self._settings = settings


@planted("I1", "I2", "I3")
def seal_that_believes_itself(plant: Plant) -> None:
    """The outstanding bundles of a cancelled job are counted as CANCELLED, even if workers have committed the bundles
    in the meantime (I3).
    """

    @plant.method(JobCoordinator, "_seal")
    async def _seal(self: JobCoordinator, live: LiveJob) -> Mapping[StageName, int]:
        await self._ledger_writer.refresh(live)
        now_s = self._ports.clock.now_s()
        for one in live.all_outstanding():
            draft = settlement.seal(one.bundle, execution="seal", worker="manager", now_s=now_s)
            key = await self._ports.keys.key_of(live.job)
            await commit(self._ports.objects, draft, self._ports.patience, key)
            await self._ledger_writer.fold([settlement.completion(draft)])
        return {name: (record.counts.planned or 0) - record.counts.terminal for name, record in live.stages.items()}


# --- Requests of users ---------------------------------------------------------------------------


@planted("I1", "I2", "I3")
def retry_runs_all_again(plant: Plant) -> None:
    """A retry of a job runs whole stages again, as if the stages were new. Tasks that had succeeded get a second result
    (I1, I2).
    """

    @plant.method(RetryPlanner, "_succeeded")
    async def _succeeded(self: RetryPlanner, job: JobId, counts: StageCounts) -> TaskSet:
        return TaskSet()


@planted("I1", "I3", "I7", "ends")
def retry_forgotten_by_the_next_leader(plant: Plant) -> None:
    """A retry re-opens its job in the ledger, and then sends the bundles of the retry. If the manager ends in between,
    the running job remains without a bundle (I7).
    """

    @plant.everywhere(retry_rounds.cuts_of_round)
    async def cuts_of_round(ports: Ports, record: JobRecord) -> tuple[Cut, ...]:
        return ()


# --- Lost bundles --------------------------------------------------------------------------------


@planted("I7", "silence")
def reconciler_that_never_looks(plant: Plant) -> None:
    """The manager assumes that queues do not lose messages, so the manager does not search for lost bundles. A job
    waits forever for a bundle that was lost or never sent (I7).
    """

    @plant.method(Reconciler, "recover_silent")
    async def look_for_the_silent(self: Reconciler) -> None:
        pass


@planted("I1", "I2", "step 3")
def reconciler_sends_committed_bundles_as_new(plant: Plant) -> None:
    """The reconciler sends a silent bundle again with the id of its next attempt, even if the bundle is already
    committed. The tasks of the bundle end under both ids (I1).
    """

    @plant.method(Reconciler, "_recover")
    async def _recover(self: Reconciler, live: LiveJob, silent: list[Outstanding]) -> None:
        for one in silent:
            one.heard_s = self._ports.clock.monotonic_s()
        again = [replace(one.bundle, attempt=one.bundle.attempt + 1) for one in silent]
        await self._coordinator.send(live.job, again)


@planted("I7")
def reconciler_that_gives_up(plant: Plant) -> None:
    """The reconciler marks a silent bundle as FAILED, although the tasks of the bundle have not failed (I1)."""

    @plant.method(Reconciler, "_recover")
    async def _recover(self: Reconciler, live: LiveJob, silent: list[Outstanding]) -> None:
        now_s = self._ports.clock.now_s()
        for one in silent:
            draft = settlement.poisoned(one.bundle, "not heard of", execution="lost", worker="manager", now_s=now_s)
            key = await self._ports.keys.key_of(live.job)
            outcome = await commit(self._ports.objects, draft, self._ports.patience, key)
            await self.forward(live.job, outcome)


@planted("I3", "I7", "ends")
def new_leader_expects_nothing(plant: Plant) -> None:
    """A new leader knows only the bundles about which it receives events. The new leader does not search for
    outstanding bundles that were lost under the previous leader (I7).
    """
    original = Adoption._prepare

    @plant.method(Adoption, "_prepare")
    async def _prepare(
        self: Adoption, result: ChangeResult, *, planned: Sequence[BundleRecord] | None = None, concurrent: bool = False
    ) -> LiveJob:
        live = await original(self, result, planned=planned, concurrent=concurrent)
        live.outstanding.clear()
        return live


# --- The rebuild ---------------------------------------------------------------------------------


@planted("I3")
def rebuild_forgets_casualties(plant: Plant) -> None:
    """A rebuild of the ledger counts the tasks in the outcomes, but not the canceled dependents of the failed tasks
    (I3).
    """
    original = ledger_rebuild._round

    @plant.everywhere(original)
    async def _round(
        ports: Ports, job: JobDef, number: int, retry: retry_rounds.Retry, job_objects: ledger_rebuild._JobObjects
    ) -> Round:
        whole = await original(ports, job, number, retry, job_objects)
        return replace(whole, casualties=[{} for _ in whole.casualties])


# --- Visibility timeouts -------------------------------------------------------------------------


@planted("timeouts")
def run_time_of_one_sample(plant: Plant) -> None:
    """The manager expects the run time of the first outcome of a stage for all tasks of the stage. The first outcome
    may be far from typical (timeouts).
    """

    @plant.everywhere(visibility_timeouts.expected_run_s)
    def expected_run_s(samples_s: Collection[float]) -> float | None:
        return max(samples_s, default=None)


@planted("timeouts")
def new_leader_that_trusts_one_task(plant: Plant) -> None:
    """A new leader expects the mean run time in the ledger of a stage after the first success of the stage. The first
    task may be far from typical (timeouts).
    """

    @plant.method(LiveJob, "learn_run_times")
    def learn_run_times(self: LiveJob) -> None:
        for name, stage in self.stages.items():
            if stage.counts.mean_s is not None:
                self.earlier_s[name] = stage.counts.mean_s


@planted("timeouts")
def run_times_of_failed_tasks(plant: Plant) -> None:
    """The manager measures the time of failed attempts, too. A task that fails early or hangs then changes the timeouts
    of the tasks that succeed (timeouts).
    """
    original = LiveJob.record_pace

    @plant.method(LiveJob, "record_pace")
    def record_pace(self: LiveJob, done: Completion, now_s: float) -> None:
        original(self, done, now_s)
        if not done.succeeded:
            self.run_times_s.setdefault(done.bundle.stage, deque(maxlen=100)).append(done.ended_s - done.started_s)
