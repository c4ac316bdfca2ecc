"""Planted bugs in the manager: plans, cuts, the end of a job, cancel and retry, and the search for lost bundles.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from batchlab.core.commit import commit
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Completion, Control, JobId, StageCounts, StageName, TaskSet
from batchlab.core.ports import ChangeResult, Cut, JobRecord, Round, SetControl, SetPlanned
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
    """A counter grows with every received completion, and the gather starts when it reaches the
    number of tasks. An event that arrives twice starts it early (I1: results are left out)."""
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
    """Plans and cuts are written without If-None-Match. A manager that does not know yet that
    another one leads overwrites a plan that the other one has used (I1, I3)."""

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
    """Bundles are sent as soon as they are cut, and the cut is committed afterwards. The next
    leader cuts the same tasks into other bundles (I1, I2)."""
    original = JobCoordinator._commit_cut

    @plant.method(JobCoordinator, "_commit_cut")
    async def _commit_cut(self: JobCoordinator, live: LiveJob, cut: Cut) -> Cut:
        await self.send(live.job, cut.bundles)
        return await original(self, live, cut)


@planted("I3", "step 3")
def cut_only_in_memory_and_ledger(plant: Plant) -> None:
    """The cut is written to the ledger only. A ledger rebuilt from the bucket does not contain its
    bundles (I3)."""

    @plant.method(JobCoordinator, "_put_cut")
    async def _put_cut(self: JobCoordinator, cut: Cut) -> Cut:
        return cut


@planted("I2", "I7")
def chained_stage_planned_once(plant: Plant) -> None:
    """The number of tasks of a chained stage is set right after the first stage's plan is
    committed. If the manager ends in between, the number is missing for ever (I7), or becomes
    negative through failures (I2)."""
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
    """A cancellation is only written to the ledger. Workers do not read the ledger, so they
    continue to start tasks (I4)."""

    @plant.method(JobCoordinator, "forbid")
    async def forbid(self: JobCoordinator, live: LiveJob, word: json_format.ControlCommand) -> None:
        await self._ports.ledger.apply(SetControl(live.id, Control.CANCEL, live.round))
        live.record = replace(live.record, control=Control.CANCEL)


@planted("I4")
def cancel_acknowledged_at_once(plant: Plant) -> None:
    """A cancellation is acknowledged as soon as the control object is written. Workers that have
    read it just before continue to start tasks until they read it again (I4)."""
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
    """The outstanding bundles of a cancelled job are counted as CANCELLED, even if workers have
    committed them in the meantime (I3)."""

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
    """A retry runs the whole stage again, as if it were new. Tasks that had succeeded have a second
    result (I1, I2)."""

    @plant.method(RetryPlanner, "_succeeded")
    async def _succeeded(self: RetryPlanner, job: JobId, counts: StageCounts) -> TaskSet:
        return TaskSet()


@planted("I1", "I3", "I7", "ends")
def retry_forgotten_by_the_next_leader(plant: Plant) -> None:
    """A retry re-opens the job in the ledger, and then sends its bundles. If the manager ends in
    between, a running job remains without a bundle (I7)."""

    @plant.everywhere(retry_rounds.cuts_of_round)
    async def cuts_of_round(ports: Ports, record: JobRecord) -> tuple[Cut, ...]:
        return ()


# --- Lost bundles --------------------------------------------------------------------------------


@planted("I7", "silence")
def reconciler_that_never_looks(plant: Plant) -> None:
    """The code assumes that queues do not lose messages, so it does not search for silent bundles.
    The job waits for ever for a bundle that was lost or never sent (I7)."""

    @plant.method(Reconciler, "recover_silent")
    async def look_for_the_silent(self: Reconciler) -> None:
        pass


@planted("I1", "I2", "step 3")
def reconciler_sends_committed_bundles_as_new(plant: Plant) -> None:
    """A silent bundle is sent again as its next attempt, even if it is committed. Its tasks end
    under both ids (I1)."""

    @plant.method(Reconciler, "_recover")
    async def _recover(self: Reconciler, live: LiveJob, silent: list[Outstanding]) -> None:
        for one in silent:
            one.heard_s = self._ports.clock.monotonic_s()
        again = [replace(one.bundle, attempt=one.bundle.attempt + 1) for one in silent]
        await self._coordinator.send(live.job, again)


@planted("I7")
def reconciler_that_gives_up(plant: Plant) -> None:
    """A silent bundle is marked as FAILED. Its tasks have not failed (I1)."""

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
    """A new leader knows only the bundles that it receives events about. It does not search for
    outstanding bundles that were lost under the previous leader (I7)."""
    original = Adoption.adopt

    @plant.method(Adoption, "adopt")
    async def adopt(self: Adoption, result: ChangeResult, *, concurrent: bool = False) -> LiveJob:
        live = await original(self, result, concurrent=concurrent)
        live.outstanding.clear()
        return live


# --- The rebuild ---------------------------------------------------------------------------------


@planted("I3")
def rebuild_forgets_casualties(plant: Plant) -> None:
    """A rebuild folds the tasks in the outcomes, but not the later tasks that became impossible
    because of them (I3)."""
    original = ledger_rebuild._round

    @plant.everywhere(original)
    async def _round(
        ports: Ports, job: JobDef, number: int, retry: retry_rounds.Retry, job_objects: ledger_rebuild._JobObjects
    ) -> Round:
        whole = await original(ports, job, number, retry, job_objects)
        return replace(whole, casualties=[{} for _ in whole.casualties])
