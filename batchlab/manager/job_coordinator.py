"""The steps of a job: plan its stages, cut them into bundles, send the bundles, and end the job.

Invariants: a conditional PUT commits each decision (plan, cut, final) before it takes effect, so
each decision is made once. A gather is planned only when the ledger shows that every upstream task
has ended, never by counting messages. A job always ends (I7). The steps are in one file to show
their order. Other modules of this package implement them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from batchlab.core import atomic_write, commit
from batchlab.core.commit import Addressed, address, committed, send_all
from batchlab.core.errors import AlreadyExists, BackendError, Malformed, NotFound, UsageError
from batchlab.core.job_definition import JobDef, StageDef, with_task
from batchlab.core.model import Bundle, Control, JobState, Json, StageName, TaskSet
from batchlab.core.port_retries import set_within
from batchlab.core.ports import AddCut, Cut, Ending, Finish, SetControl, SetPlanned, StageRecord
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.settlement import Verdict, judge
from batchlab.core.tracing import NO_TRACER, Subject, Tracer, span
from batchlab.manager import completion_checks
from batchlab.manager.bundling import Bundler
from batchlab.manager.counters import Counters
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.quarantine import OutcomeStore, Quarantine, UnreadableObject, read_cut
from batchlab.manager.stage_plans import StagePlans
from batchlab.manager.state import LiveJob, ManagerSettings, Ports, Superseded, set_job_state

log = logging.getLogger(__name__)

SEALED_AT_ONCE = 16

CONTROL_OBJECT_DELAY_S = 0.05
"""A job that ends sooner gets no control object. Without one, workers read the spec."""
ADVANCE_DELAY_S = 0.001
"""Delay between a change of a job and the next step."""


class JobCoordinator:
    """The steps of a job after its submission."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        ledger_writer: LedgerWriter,
        bundler: Bundler,
        on_plan: Callable[[str], None],
        counts: Counters | None = None,
        tracer: Tracer = NO_TRACER,
        on_end: Callable[[LiveJob, Ending], Awaitable[None]] | None = None,
        on_missing: Callable[[LiveJob], Awaitable[None]] | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """`on_plan` is called with the pool of a stage whose number of tasks is known now, so that
        the pool can grow. `on_end` is called with the committed end of a job before the ledger has
        it. `on_missing` is called with a job that has counted bundles without an outcome."""
        self._on_end = on_end
        self._on_missing = on_missing or _leave_unchanged
        self._counts = counts or Counters()
        self._tracer = tracer
        self._ports = ports
        self._settings = settings
        self._ledger_writer = ledger_writer
        self._bundler = bundler
        self._on_plan = on_plan
        self._quarantine = quarantine or Quarantine(self._counts)
        self._outcomes = OutcomeStore(ports, self._quarantine)
        self._lost = completion_checks.LostTasks(ports, settings.silence_s)
        self.plans = StagePlans(ports)
        self._inputs = Inputs(ports.objects, ports.patience)

    async def conduct(self, live: LiveJob) -> None:
        """Advance the job whenever it is poked, until it has ended."""
        if live.all_outstanding() and not live.allowed:
            # The job's first bundles are under way, and their latency matters most.
            await set_within(live.poke, CONTROL_OBJECT_DELAY_S)
            await asyncio.sleep(ADVANCE_DELAY_S)
        while not live.ended.is_set():
            live.poke.clear()
            if live.unreadable:
                raise live.unreadable
            await self.advance(live)
            live.trouble = ""
            if not live.ended.is_set():
                await live.poke.wait()
                # Waiting clients go first, and events arrive in bursts.
                await asyncio.sleep(ADVANCE_DELAY_S)

    async def advance(self, live: LiveJob) -> None:
        """Do everything that can be done for the job now."""
        if not live.allowed and not live.is_through:
            await self._allow(live)
        if live.doubtful:
            await self._make_sure(live)
        if live.record.control is Control.CANCEL:
            await self.stop(live, json_format.ControlCommand(Control.CANCEL))
            return
        if live.record.control is Control.PAUSE or live.record.state is JobState.SCHEDULED:
            return
        try:
            for stage in live.job.stages:
                await self._plan(live, stage)
                await self._cut(live, stage)
        except UsageError as error:
            await self.stop(live, json_format.ControlCommand(Control.CANCEL, JobState.FAILED, str(error)))
            return
        verdict = judge(live.job, [s.counts for s in live.stages.values()])
        if verdict.stop:
            reason = await self._explained(live, verdict)
            await self.stop(live, json_format.ControlCommand(Control.CANCEL, JobState.FAILED, reason))
        elif live.is_through and await self._accounted(live):
            if live.doubtful:
                return  # the next step reads the control word
            if missing := await completion_checks.uncommitted_bundles(self._ports, live):
                about = {"job": live.id}
                log.error("%d bundles were counted and not committed", len(missing), extra=about)
                await self._on_missing(live)
                return
            state = JobState.FAILED if verdict.failed else JobState.SUCCEEDED
            await self._finish(live, state, await self._explained(live, verdict), {})
        else:
            await self._end_lost(live)

    async def _end_lost(self, live: LiveJob) -> None:
        """End a job with tasks in no bundle, unless the bucket has more (I7)."""
        step = self._lost.step(live)
        if step is completion_checks.Recovery.RESTORE:
            about = {"job": live.id}
            log.error("its bundles have ended, but not all of its tasks", extra=about)
            await self._on_missing(live)
        elif step is completion_checks.Recovery.FAIL:
            lost = sum(_uncut_tasks(live).values())
            reason = f"{lost} tasks are in no bundle: an outcome lacks its follow-up bundles"
            await self.stop(live, json_format.ControlCommand(Control.CANCEL, JobState.FAILED, reason))

    # --- Planning --------------------------------------------------------------------------------

    async def _plan(self, live: LiveJob, stage: StageDef) -> None:
        record = live.stages[stage.name]
        if record.counts.planned is not None:
            return
        if stage.chained:
            # Checked at every step and not together with the upstream plan. If the manager died in
            # between, the stage would never end.
            upstream = live.stages[stage.after[0]].counts.planned
            if upstream is not None:
                await self._ledger_writer.write(live, SetPlanned(live.id, stage.name, upstream, live.round))
            return
        # The raw input is the same in each round. Gathered results may change.
        round_ = live.round if stage.after else 0
        if live.doubtful or any(not live.stages[u].counts.ended for u in stage.after):
            return
        if stage.gather is not None and self._doomed(live):
            # A total over a part of the input would look like a total over all of it.
            await self._first_cut(live, stage, TaskSet())
            return
        links = [context for upstream in stage.after for context in live.traced.get(upstream, ())]
        name, about = "gather" if stage.after else "plan", Subject(live.id, stage.name)
        with span(self._tracer, name, live.job.trace, about, links=links) as planning:
            live.spans[stage.name] = planning.context
            tasks = await self._planned(live, stage, round_)
            planning.note(planned=len(tasks))
        await self._first_cut(live, stage, tasks)

    async def _planned(self, live: LiveJob, stage: StageDef, round_: int) -> TaskSet:
        """Return the tasks of the stage from its plan. Make the plan if it does not exist."""
        manifest = await self.plans.existing(live.job, stage.name, round_)
        if manifest is None and not stage.after and live.job.input is not None:
            await set_job_state(self._ports, live, JobState.PENDING)
            manifest = await self.plans.of_input(live.job, stage)
        elif manifest is None and stage.after:
            counts = {u: live.stages[u].counts for u in stage.after}
            manifest = await self.plans.of_stages(live.job, stage, round_, counts)
        if manifest is None:
            plan, spec = (object_keys.manifest(live.id, stage.name, round_), object_keys.spec(live.id))
            raise UsageError(
                f"Job {live.id} has items of its own, but neither {plan} nor {spec} contains them.",
                remedy="Submit it through the Python API, or give it an input.",
            )
        return TaskSet.span(0, manifest.count) - manifest.skipped

    async def _first_cut(self, live: LiveJob, stage: StageDef, tasks: TaskSet) -> None:
        round_ = live.round
        bundles, left = self._bundler.wave(live, stage, tasks, round_)
        now_s = self._ports.clock.now_s()
        cut = Cut(live.id, stage.name, round_, 0, bundles, left, len(tasks), now_s)
        await self._commit_and_send(live, cut)
        about = {"job": live.id, "stage": stage.name}
        log.info("planned %d tasks, the first %d bundles sent", len(tasks), len(bundles), extra=about)
        self._on_plan(stage.pool)

    def _doomed(self, live: LiveJob) -> bool:
        return judge(live.job, [s.counts for s in live.stages.values()]).failed

    async def send_opening(self, job: JobDef, opening: commit_keys.Opening, *, again: bool = False) -> None:
        """Send the bundles of the opening. With `again` send copies, for which workers first look
        for an outcome."""
        assert opening.cut
        self._inputs.keep(job.id, opening.cut.stage, opening.items)
        bundles = opening.cut.bundles
        copies = [replace(bundle, losses=1) for bundle in bundles] if again else bundles
        await self.send(job, copies)

    def begin(self, live: LiveJob, cut: Cut) -> None:
        """Add the bundles of the opening to the outstanding ones."""
        now_s = self._ports.clock.monotonic_s()
        live.expect((bundle, now_s) for bundle in cut.bundles)
        self._on_plan(live.job.stage(cut.stage).pool)

    # --- Cutting ---------------------------------------------------------------------------------

    async def _cut(self, live: LiveJob, stage: StageDef) -> None:
        """Commit and send bundles while the pool's queue has room."""
        while live.record.control is Control.RUN:
            record = live.stages[stage.name]
            round_ = live.round
            bundles, left = self._bundler.wave(live, stage, record.left, round_)
            if not bundles:
                return
            seq, now_s = record.cut_seq + 1, self._ports.clock.now_s()
            cut = Cut(live.id, stage.name, round_, seq, bundles, left, at_s=now_s)
            await self._commit_and_send(live, cut)

    async def _commit_cut(self, live: LiveJob, cut: Cut) -> Cut:
        """Commit a cut and return the one that counts, possibly one of an earlier manager."""
        cut = await self.plans.opened(live.job, cut) or await self._put_cut(cut)
        await self._ledger_writer.write(live, AddCut(cut))
        now_s = self._ports.clock.monotonic_s()
        live.expect((bundle, now_s) for bundle in cut.bundles)
        return cut

    async def _put_cut(self, cut: Cut) -> Cut:
        key = object_keys.cut(cut.job, cut.stage, cut.round, cut.seq)
        objects, patience = self._ports.objects, self._ports.patience
        try:
            await patience(lambda: objects.put(key, json_format.to_bytes(json_format.cut_to_json(cut)), if_absent=True))
        except AlreadyExists:
            return await read_cut(self._ports, key)
        return cut

    async def _commit_and_send(self, live: LiveJob, cut: Cut) -> None:
        above = live.spans.get(cut.stage) or live.job.trace
        about = Subject(live.id, cut.stage)
        with span(self._tracer, "cut", above, about, bundles=len(cut.bundles)) as cutting:
            counts = await self._commit_cut(live, cut)
        bundles = counts.bundles
        if counts is not cut:
            # An earlier manager may have sent the bundles, and the ledger lost that in a power
            # failure. So they are sent as copies, for which workers first look for an outcome.
            bundles = tuple(replace(bundle, losses=1) for bundle in bundles)
        await self.send(live.job, bundles, trace=cutting.context)

    async def send(self, job: JobDef, bundles: Sequence[Bundle], *, trace: str = "") -> None:
        """Put bundles on their pool's queue, with their inputs if these are small."""
        above, about = trace or job.trace, Subject(job.id)
        with span(self._tracer, "send", above, about, bundles=len(bundles)) as sending:
            await self._send(job, bundles, sending.context)

    async def _send(self, job: JobDef, bundles: Sequence[Bundle], trace: str) -> None:
        messages: list[Addressed] = []
        key = await self._ports.keys.key_of(job)
        now_s = self._ports.clock.now_s()
        for bundle in bundles:
            items: Sequence[Json] | None = None
            if bundle.source is None and job.stage(bundle.stage).gather != "*":
                try:
                    items = await self._inputs.resolve(job, bundle, key)
                except NotFound:
                    items = None  # the worker finds the same and reports it in an outcome
            wait_s = settlement.wait_s(job, bundle, now_s)
            messages.append(address(job, bundle, key, items=items, delay_s=wait_s, now_s=now_s, trace=trace))
        await send_all(self._ports.queue, messages, self._ports.patience)

    # --- Ending ----------------------------------------------------------------------------------

    async def stop(self, live: LiveJob, word: json_format.ControlCommand) -> None:
        """End the job early: no further task starts, and outstanding bundles are sealed.

        `word` sets the job's final state, unless an earlier word was written.
        """
        await self.forbid(live, word)
        closed = await self._seal(live)
        # The word is written again if the store has lost it meanwhile.
        objects, patience = self._ports.objects, self._ports.patience
        written = await commit.write_cancellation(objects, live.id, replace(word, round=live.round), patience)
        if written is None:
            raise Superseded(live)
        await self._finish(live, written.state, written.reason, closed)

    async def give_up(self, live: LiveJob, error: Malformed) -> None:
        """End a job whose plan, cut, or other decision cannot be read. If the bucket refuses, end
        it only in the ledger."""
        key = error.key if isinstance(error, UnreadableObject) else object_keys.committed(live.id)
        self._quarantine.object(key, error, live.id, "object")
        reason = f"the stored object {key} cannot be read: {error.message}"
        try:
            await self.stop(live, json_format.ControlCommand(Control.CANCEL, JobState.FAILED, reason))
        except (Malformed, NotFound):
            await self.abandon(live, reason)

    async def abandon(self, live: LiveJob, reason: str) -> None:
        """End a job without objects in the bucket, only in the ledger."""
        now_s = self._ports.clock.now_s()
        await self._record(live, Ending(JobState.FAILED, reason, now_s, _uncut_tasks(live)))

    async def forbid(self, live: LiveJob, word: json_format.ControlCommand) -> None:
        """Write "cancel" to the control object, and wait until no worker can start a task (I4).

        The first such word stays, so that a new leader ends the job in the same state. Raises
        Superseded if the job is in a later round.
        """
        if live.forbidden:
            return
        async with live.control_lock:
            if live.record.control is not Control.CANCEL:
                word = replace(word, round=live.round)
                objects, patience = self._ports.objects, self._ports.patience
                if not await commit.write_cancellation(objects, live.id, word, patience):
                    raise Superseded(live)
                await self.record_control(live, Control.CANCEL)
        await asyncio.sleep(self._settings.control_lease_s * 1.1)
        live.forbidden = True

    async def _allow(self, live: LiveJob) -> None:
        """Write the control object that allows tasks to start, if it does not exist. Workers with
        the job's first bundles do not wait for it."""
        objects, patience = self._ports.objects, self._ports.patience
        # A job that was conducted before has one, and a cancellation must not be undone.
        run = json_format.ControlCommand(Control.RUN, round=live.round)
        with atomic_write.repeated():
            await commit.replace_command(objects, live.id, run, patience, over=None)
        live.allowed = True

    async def record_control(self, live: LiveJob, word: Control) -> None:
        """Record the written control word in the ledger and in memory. Raises Superseded."""
        change = SetControl(live.id, word, live.round)
        if (await self._ports.ledger.apply(change)).has_control(change):
            live.record = replace(live.record, control=word)
            live.changed()
        else:
            await self._ledger_writer.refresh(live)

    async def _make_sure(self, live: LiveJob) -> None:
        live.doubtful = False  # first, because a new doubt may arise meanwhile
        try:
            await self.heed(live)
        except BackendError:
            live.doubtful = True
            raise

    async def heed(self, live: LiveJob) -> None:
        """Read the control word that workers follow, and act on it.

        Another manager may have written the word without recording it in the ledger.
        """
        async with live.control_lock:
            if live.record.control is Control.CANCEL:
                return
            word = await self._word(live)
            if word is None:
                return
            if word.control is Control.CANCEL and word.round < live.round:
                # Only a manager of release 0.1.0 leaves such a word, because it wrote without a
                # condition.
                objects, patience = self._ports.objects, self._ports.patience
                await commit.permit_round(objects, live.id, live.round, patience)
                word = json_format.ControlCommand(Control.RUN, round=live.round)
            if word.control is live.record.control or word.round > live.round:
                return
            about = {"job": live.id}
            log.warning("the control word is %s, and the ledger did not have it", word.control, extra=about)
            await self.record_control(live, word.control)
        if word.control is not Control.CANCEL:
            paused = word.control is Control.PAUSE
            await set_job_state(self._ports, live, JobState.PAUSED if paused else JobState.RUNNABLE)
        live.poke.set()

    async def _word(self, live: LiveJob) -> json_format.ControlCommand | None:
        """Return the control word that workers follow, or None. If its object is lost or damaged,
        write the ledger's word again."""
        objects, patience = self._ports.objects, self._ports.patience
        try:
            return await commit.read_command(objects, live.id, patience)
        except NotFound:
            # Without the object, workers run the job.
            if live.record.control is Control.RUN:
                return None
        except Malformed as error:
            self._quarantine.object(object_keys.control(live.id), error, live.id, "object")
        await commit.repair_command(objects, live.id, live.record.control, live.round, patience)
        return None

    async def _seal(self, live: LiveJob) -> Mapping[StageName, int]:
        """Commit CANCELLED for every outstanding bundle without an outcome.

        Return the number of tasks of each stage that never came into a bundle.
        """
        for stage in live.job.stages:
            record = live.stages[stage.name]
            if not stage.chained and (record.left or record.counts.planned is None):
                await self._close_cuts(live, stage.name, record)
        # The refresh finds a first cut of another manager, which sets the number of tasks of later
        # stages.
        await self._ledger_writer.refresh(live)
        for stage in live.job.stages:
            if stage.chained:
                await self._plan(live, stage)
        who = f"manager-{live.round}"
        while outstanding := live.all_outstanding()[:SEALED_AT_ONCE]:
            now_s = self._ports.clock.now_s()
            drafts = [settlement.sealed(one.bundle, execution=who, worker=who, now_s=now_s) for one in outstanding]
            outcomes = await asyncio.gather(*(self._outcomes.commit(live.job, draft) for draft in drafts))
            await self._ledger_writer.fold([settlement.completion(outcome) for outcome in outcomes])
        return _uncut_tasks(live)

    async def _close_cuts(self, live: LiveJob, stage: StageName, record: StageRecord) -> None:
        """Commit an empty next cut, so that an earlier leader cannot cut any more. If it has
        already committed that cut, its bundles are sealed too."""
        round_ = live.round
        seq = record.cut_seq + 1 if record.plan_round == round_ else 0
        while True:
            planned = 0 if record.counts.planned is None and seq == 0 else None
            empty = Cut(live.id, stage, round_, seq, (), TaskSet(), planned)
            if await self._commit_cut(live, empty) == empty:
                return
            seq += 1

    async def _finish(self, live: LiveJob, state: JobState, reason: str, closed: Mapping[StageName, int]) -> None:
        about = Subject(live.id)
        with span(self._tracer, "end", live.job.trace, about, state=state.value):
            await self._end(live, state, reason, closed)

    async def _end(self, live: LiveJob, state: JobState, reason: str, closed: Mapping[StageName, int]) -> None:
        some = {name: tasks for name, tasks in closed.items() if tasks}
        ending = Ending(state, reason, self._ports.clock.now_s(), some)
        data = json_format.to_bytes(json_format.ending_to_json(ending))
        key = object_keys.final(live.id, live.round)
        objects, patience = self._ports.objects, self._ports.patience
        try:
            with atomic_write.of_single_call(live.job.is_single_call):
                await patience(lambda: objects.put(key, data, if_absent=True))
        except AlreadyExists:
            try:
                ending = json_format.ending_from_json(json_format.loads(await patience(lambda: objects.get(key))))
            except Malformed as error:
                self._quarantine.object(key, error, live.id, "object")
        await self._record(live, ending)

    async def _record(self, live: LiveJob, ending: Ending) -> None:
        """Record the end of the job in the ledger, and wake those who wait for it."""
        if self._on_end:
            await self._on_end(live, ending)
        is_new = await self._ledger_writer.write(live, Finish(live.id, ending, live.round))
        if is_new:
            self._counts.ended(ending.state)
            # The reason is not logged, because it may contain a user's text.
            log.info("ended %s in round %d", ending.state, live.round, extra={"job": live.id})
        live.ended.set()
        live.poke.set()

    async def _explained(self, live: LiveJob, verdict: Verdict) -> str:
        """Return the verdict's reason, with the message of the first failure."""
        if not verdict.reason:
            return ""
        records = await self._ports.ledger.bundles(live.id, failed=True, limit=1)
        objects, patience = self._ports.objects, self._ports.patience
        for record in records:
            key = await self._ports.keys.key_of(live.job)
            try:
                outcome = await committed(objects, record.bundle, patience, key)
            except Malformed:
                break  # the outcome was readable when it was counted
            for failure in outcome.failed if outcome else ():
                if failure.final:
                    return with_task(verdict.reason, record.bundle.stage, failure.task, failure.reason)
        return verdict.reason

    async def _accounted(self, live: LiveJob) -> bool:
        """Return whether every bundle's outcome is in the ledger. Fetch outcomes whose event was
        lost.

        All tasks can have ended before that. The event of a split bundle may arrive after the
        events of its halves, or never (I3).
        """
        while outstanding := live.all_outstanding()[:SEALED_AT_ONCE]:
            found = await asyncio.gather(*(self._outcomes.of(live.job, one.bundle) for one in outstanding))
            outcomes = [outcome for outcome in found if outcome]
            await self._ledger_writer.fold([settlement.completion(outcome) for outcome in outcomes])
            if len(outcomes) < len(outstanding):
                return False
        return True


async def _leave_unchanged(_: LiveJob) -> None:
    """Leave the job as it is if nothing can restore it."""


def _uncut_tasks(live: LiveJob) -> Mapping[StageName, int]:
    """Return the number of tasks of each stage without an end, once no bundle is outstanding.
    Forged outcomes may count more tasks than were planned."""
    return {name: max(0, (record.counts.planned or 0) - record.counts.terminal) for name, record in live.stages.items()}
