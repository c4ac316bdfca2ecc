"""Coordinator of a job's steps: plan the stages, cut stages into bundles, send the bundles, and end the job.

Invariants: a conditional PUT commits each plan, cut, and end of a job in advance, so managers never make two different
decisions. The manager plans a gather when the ledger shows that every upstream task has ended, never by counting
messages. Every job ends (promise I7).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from batchlab.core import atomic_write, commit
from batchlab.core.commit import Addressed, address, committed, send_all
from batchlab.core.errors import AlreadyExists, BackendError, Malformed, NotFound, Refused, UsageError
from batchlab.core.job_definition import JobDef, StageDef, with_task
from batchlab.core.model import Bundle, Control, JobState, Json, StageName, TaskSet
from batchlab.core.ports import AddCut, Cut, Ending, Finish, SetControl, SetPlanned, StageRecord
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.settlement import Verdict, judge
from batchlab.core.tracing import Subject, span
from batchlab.manager import completion_checks
from batchlab.manager.bundling import Bundler
from batchlab.manager.context import Context, Part
from batchlab.manager.dependencies import Dependencies
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.notifier import Notifier
from batchlab.manager.quarantine import UnreadableObject, read_cut
from batchlab.manager.retry_rounds import RetriedTasks
from batchlab.manager.stage_plans import StagePlans
from batchlab.manager.state import LiveJob, Superseded, set_job_state

log = logging.getLogger(__name__)


MAX_CONCURRENT_OUTCOMES = 16
MAX_CONTROL_READS = 16
"""Number of jobs whose control objects or dependencies a manager reads at the same time. A new leader reads the control
objects of all jobs, and still answers requests."""
ADVANCE_DELAY_S = 0.001
"""Delay between a change of a job and the coordinator's next step for the job."""


class JobCoordinator(Part):
    def __init__(
        self,
        context: Context,
        ledger_writer: LedgerWriter,
        bundler: Bundler,
        notifier: Notifier | None,
        on_missing: Callable[[LiveJob], Awaitable[None]],
        dependencies: Dependencies,
    ) -> None:
        """The coordinator calls `on_missing` with each job that has bundles counted by the ledger but without an
        outcome in the bucket."""
        super().__init__(context)
        self._ledger_writer = ledger_writer
        self._bundler = bundler
        self._notifier = notifier
        self._on_missing = on_missing
        self._dependencies = dependencies
        self._control_reads = asyncio.Semaphore(MAX_CONTROL_READS)
        self._lost_tasks = completion_checks.LostTasks(context.ports, context.settings.silence_s)
        self.plans = StagePlans(context.ports)
        self._inputs = Inputs(context.ports.objects, context.ports.patience)

    async def conduct(self, live: LiveJob) -> None:
        """Advance the job after each change, until the job has ended."""
        while not live.ended.is_set():
            live.wake.clear()
            if live.unreadable:
                raise live.unreadable
            await self.advance(live)
            live.trouble = ""
            if not live.ended.is_set():
                await live.wake.wait()
                # The delay before the next step lets waiting clients run first, and combines events that arrive in
                # bursts.
                await asyncio.sleep(ADVANCE_DELAY_S)

    async def advance(self, live: LiveJob) -> None:
        """Advance the job by all steps that are possible now."""
        if live.must_read_control:
            await self._recheck_control(live)
        if live.record.control is Control.CANCEL:
            await self.stop(live, json_format.ControlCommand(Control.CANCEL))
            return
        if live.record.control is Control.PAUSE or live.record.state is JobState.SCHEDULED:
            return
        if live.waits_for and not await self._may_begin(live):
            return
        try:
            for stage in live.job.stages:
                await self._plan(live, stage)
                await self._cut(live, stage)
        except UsageError as error:
            await self._fail(live, str(error))
            return
        verdict = judge(live.job, live.counts)
        if verdict.stop:
            await self._fail(live, await self._reason(live, verdict))
        elif live.is_complete and await self.fetch_missing_outcomes(live):
            if live.must_read_control:
                return  # the next call of `advance` reads the job's control object
            if missing := await completion_checks.uncommitted_bundles(self._ports, live):
                log.error("%d bundles were counted and not committed", len(missing), extra={"job": live.id})
                await self._on_missing(live)
                return
            state = JobState.FAILED if verdict.failed else JobState.SUCCEEDED
            await self._end(live, state, await self._reason(live, verdict), {})
        else:
            await self._end_lost(live)

    async def _may_begin(self, live: LiveJob) -> bool:
        """Return whether the conditions of all dependencies hold. End the job if a condition can no longer hold."""
        try:
            async with self._control_reads:
                live.waits_for = await self._dependencies.unmet(live.job)
        except Refused as error:
            await self._fail(live, f"{error.message[0].lower()}{error.message[1:].rstrip('.')}")
            return False
        live.notify()
        if live.waits_for and live.record.state is not JobState.PENDING:
            await set_job_state(self._ports, live, JobState.PENDING)
        return not live.waits_for

    async def _end_lost(self, live: LiveJob) -> None:
        """Restore a job with tasks that are in no bundle, or end the job if the bucket also lacks the bundles (promise
        I7)."""
        recovery = self._lost_tasks.recovery(live)
        if recovery is completion_checks.Recovery.RESTORE:
            log.error("all bundles of the job have ended, but not all of its tasks", extra={"job": live.id})
            await self._on_missing(live)
        elif recovery is completion_checks.Recovery.FAIL:
            lost = sum(_uncut_tasks(live).values())
            await self._fail(live, f"{lost} tasks are in no bundle: an outcome lacks its follow-up bundles")

    async def _plan(self, live: LiveJob, stage: StageDef) -> None:
        record = live.stages[stage.name]
        if record.counts.planned is not None:
            return
        if stage.chained:
            # Every step checks the upstream stage, because the previous manager may have died right after it planned
            # the upstream stage.
            upstream = live.stages[stage.after[0]].counts.planned
            if upstream is not None:
                await self._ledger_writer.write(live, SetPlanned(live.id, stage.name, upstream, live.round))
            return
        # A job's raw input is the same in each round, but gathered results may change between rounds.
        round_ = live.round if stage.after else 0
        if live.must_read_control or any(not live.stages[u].counts.ended for u in stage.after):
            return
        if stage.gather is not None and judge(live.job, live.counts).failed:
            # After upstream failures, the gather does not run, because its result would not show that a part of the
            # input is missing.
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
        """Return the tasks of the stage from the stage's plan. Create the plan of the stage if the plan does not
        exist."""
        manifest = await self.plans.read(live.job, stage.name, round_)
        if manifest is None and not stage.after and live.job.input is not None:
            await set_job_state(self._ports, live, JobState.PENDING)
            manifest = await self.plans.plan_input(live.job, stage)
        elif manifest is None and stage.after:
            counts = {u: live.stages[u].counts for u in stage.after}
            manifest = await self.plans.plan_stage(live.job, stage, round_, counts)
        if manifest is None:
            plan, spec = (object_keys.manifest(live.id, stage.name, round_), object_keys.spec(live.id))
            raise UsageError(
                f"Job {live.id} has items of its own, but neither {plan} nor {spec} contains them.",
                remedy="Submit it through the Python API, or give it an input.",
            )
        return TaskSet.span(0, manifest.count) - manifest.skipped

    async def _first_cut(self, live: LiveJob, stage: StageDef, tasks: TaskSet) -> None:
        round_ = live.round
        bundles, uncut = self._bundler.wave(live, stage, tasks, round_)
        now_s = self._clock.now_s()
        cut = Cut(live.id, stage.name, round_, 0, bundles, uncut, len(tasks), now_s)
        await self._commit_and_send(live, cut)
        extra = {"job": live.id, "stage": stage.name}
        log.info("planned %d tasks, the first %d bundles sent", len(tasks), len(bundles), extra=extra)
        self._context.wake_if_short(stage.pool)

    async def send_opening(self, job: JobDef, opening: commit_keys.Opening, *, again: bool = False) -> None:
        """Send the bundles of a job's opening. With `again`, the bundles are sent as copies, which workers first check
        for an outcome."""
        assert opening.cut
        self._inputs.keep(job.id, opening.cut.stage, opening.items)
        bundles = opening.cut.bundles
        copies = [replace(bundle, losses=1) for bundle in bundles] if again else bundles
        await self.send(job, copies)

    async def _cut(self, live: LiveJob, stage: StageDef) -> None:
        """Commit and send bundles while the pool's queue has room."""
        while live.record.control is Control.RUN:
            record = live.stages[stage.name]
            round_ = live.round
            bundles, uncut = self._bundler.wave(live, stage, record.left, round_)
            if not bundles:
                return
            seq, now_s = record.cut_seq + 1, self._clock.now_s()
            cut = Cut(live.id, stage.name, round_, seq, bundles, uncut, at_s=now_s)
            await self._commit_and_send(live, cut)

    async def _commit_cut(self, live: LiveJob, cut: Cut) -> Cut:
        """Commit a cut, and return the committed cut, which may be the cut of an earlier manager."""
        cut = await self.plans.opening_cut(live.job, cut) or await self._put_cut(cut)
        await self._ledger_writer.write(live, AddCut(cut))
        now_s = self._clock.monotonic_s()
        live.add_outstanding((bundle, now_s) for bundle in cut.bundles)
        return cut

    async def _put_cut(self, cut: Cut) -> Cut:
        key = object_keys.cut(cut.job, cut.stage, cut.round, cut.seq)
        try:
            await self._patience(
                lambda: self._objects.put(key, json_format.to_bytes(json_format.cut_to_json(cut)), if_absent=True)
            )
        except AlreadyExists:
            return await read_cut(self._ports, key)
        return cut

    async def _commit_and_send(self, live: LiveJob, cut: Cut) -> None:
        above = live.spans.get(cut.stage) or live.job.trace
        about = Subject(live.id, cut.stage)
        with self._context.fair_share.pending(live.job, cut):
            with span(self._tracer, "cut", above, about, bundles=len(cut.bundles)) as cutting:
                counts = await self._commit_cut(live, cut)
            bundles = counts.bundles
            if counts is not cut:
                # An earlier manager may have sent the bundles, and the ledger may have lost the cut in a power failure.
                # The bundles are therefore sent as copies, because a worker checks for an outcome before it runs a copy
                # of a bundle.
                bundles = tuple(replace(bundle, losses=1) for bundle in bundles)
            await self.send(live.job, bundles, trace=cutting.context)

    async def send(
        self, job: JobDef, bundles: Sequence[Bundle], *, trace: str = "", copy_s: float | None = None
    ) -> None:
        """Send bundles to their pool's queue, with the inputs of the bundles if the inputs are small. With `copy_s`,
        the messages are speculative copies that may run for `copy_s` seconds."""
        above, about = trace or job.trace, Subject(job.id)
        with span(self._tracer, "send", above, about, bundles=len(bundles)) as sending:
            messages: list[Addressed] = []
            key, now_s = await self._keys.key_of(job), self._clock.now_s()
            for bundle in bundles:
                items: Sequence[Json] | None = None
                if bundle.source is None and job.stage(bundle.stage).gather != "*":
                    with suppress(NotFound):  # the worker reports the missing input in an outcome
                        items = await self._inputs.resolve(job, bundle, key)
                delay_s, trace = settlement.wait_s(job, bundle, now_s), sending.context
                messages.append(
                    address(
                        job,
                        bundle,
                        key,
                        items=items,
                        delay_s=delay_s,
                        now_s=now_s,
                        trace=trace,
                        copy_s=copy_s,
                        expected_s=self._lives.expected_s(bundle),
                    )
                )
            await send_all(self._queue, messages, self._patience)

    async def _fail(self, live: LiveJob, reason: str) -> None:
        await self.stop(live, json_format.ControlCommand(Control.CANCEL, JobState.FAILED, reason))

    async def stop(self, live: LiveJob, word: json_format.ControlCommand) -> None:
        """End the job early: workers cannot start further tasks, and the manager commits CANCELLED for outstanding
        bundles. `word` sets the job's final state, unless the bucket already has a "cancel"."""
        await self.forbid(live, word)
        closed = await self._seal(live)
        # The cancellation is written again, because the bucket may have lost the control object in the meantime.
        written = await commit.write_cancellation(
            self._objects, live.id, replace(word, round=live.round), self._patience
        )
        if written is None:
            await self._record_committed_end(live)
            raise Superseded(live)
        await self._end(live, written.state, written.reason, closed)

    async def give_up(self, live: LiveJob, error: Malformed) -> None:
        """End a job with an unreadable plan, cut, or other decision. If the definition of the job is unreadable too,
        only the ledger records the end of the job. The bucket then records the end of its outstanding bundles."""
        key = error.key if isinstance(error, UnreadableObject) else object_keys.committed(live.id)
        self._quarantine.object(key, error, live.id, "object")
        reason = f"the stored object {key} cannot be read: {error.message}"
        try:
            await self._fail(live, reason)
        except (Malformed, NotFound):
            # A worker that has read the definition before may commit an outcome until the manager seals the bundle.
            with suppress(Malformed, NotFound):
                await self._seal_outstanding(live)
            await self.abandon(live, reason)

    async def abandon(self, live: LiveJob, reason: str) -> None:
        """End a job only in the ledger, because the bucket has lost the job's objects. The outstanding bundles are
        CANCELLED in the ledger, so the ledger does not count their tasks again if a worker commits a bundle later."""
        if outstanding := live.all_outstanding():
            name, now_s = f"manager-{live.round}", self._clock.now_s()
            sealed = [settlement.seal(o.bundle, execution=name, worker=name, now_s=now_s) for o in outstanding]
            await self._ledger_writer.fold([settlement.completion(outcome) for outcome in sealed])
        await self._record(live, Ending(JobState.FAILED, reason, self._clock.now_s(), _uncut_tasks(live)))

    async def forbid(self, live: LiveJob, word: json_format.ControlCommand) -> None:
        """Write "cancel" to the job's control object, and wait until workers cannot start a task of the job (promise
        I4). The first "cancel" stays in the control object, so a new leader ends the job in the state that the first
        "cancel" names. Raise Superseded if the job is in a later round."""
        if live.forbidden:
            return
        async with live.control_lock:
            if live.record.control is not Control.CANCEL:
                word = replace(word, round=live.round)
                if not await commit.write_cancellation(self._objects, live.id, word, self._patience):
                    await self._record_committed_end(live)
                    raise Superseded(live)
                await self.record_control(live, Control.CANCEL)
        await asyncio.sleep(self._settings.control_lease_s * 1.1)
        live.forbidden = True

    async def record_control(self, live: LiveJob, word: Control) -> None:
        """Record the job's control command in the ledger and in memory. Raise Superseded if the job is in a later
        round."""
        change = SetControl(live.id, word, live.round)
        if (await self._ledger.apply(change)).has_control(change):
            live.record = replace(live.record, control=word)
            live.notify()
            if word is Control.RUN:
                live.wake.set()
        else:
            await self._ledger_writer.refresh(live)

    async def _recheck_control(self, live: LiveJob) -> None:
        # The flag is reset before the read, because an event during the read may set the flag.
        live.must_read_control = False
        live.mark()
        try:
            async with self._control_reads:
                await self.follow_control(live)
        except BackendError:
            live.must_read_control = True
            live.mark()
            raise

    async def follow_control(self, live: LiveJob) -> None:
        """Read the control command from the bucket, and apply the command to the job. Another manager may have written
        a control command without a change of the ledger."""
        async with live.control_lock:
            if live.record.control is Control.CANCEL:
                return
            word = await self._read_control(live)
            if word is None:
                return
            if word.control is Control.CANCEL and word.round < live.round:
                # Only a manager of release 0.1.0 leaves a "cancel" of an earlier round, because release 0.1.0 wrote the
                # control object without a condition.
                await commit.permit_round(self._objects, live.id, live.round, self._patience)
                word = json_format.ControlCommand(Control.RUN, round=live.round)
            if word.control is live.record.control or word.round > live.round:
                return
            log.warning("the control word %s was not in the ledger", word.control, extra={"job": live.id})
            await self.record_control(live, word.control)
        if word.control is not Control.CANCEL:
            state = JobState.PAUSED if word.control is Control.PAUSE else JobState.RUNNABLE
            await set_job_state(self._ports, live, state)
        live.wake.set()

    async def _read_control(self, live: LiveJob) -> json_format.ControlCommand | None:
        """Return the command in the job's control object, or None if the object is lost or damaged. Write a lost or
        damaged control object again from the ledger."""
        try:
            return await commit.read_command(self._objects, live.id, self._patience)
        except NotFound:
            # A job whose command is "run" does not need its control object, because workers run a job without a control
            # object.
            if live.record.control is Control.RUN:
                return None
        except Malformed as error:
            self._quarantine.object(object_keys.control(live.id), error, live.id, "object")
        await commit.repair_command(self._objects, live.id, live.record.control, live.round, self._patience)
        return None

    async def _seal(self, live: LiveJob) -> Mapping[StageName, int]:
        """Commit CANCELLED for every outstanding bundle without an outcome. Return the number of unended tasks of each
        stage."""
        for stage in live.job.stages:
            record = live.stages[stage.name]
            if not stage.chained and (record.left or record.counts.planned is None):
                await self._close_cuts(live, stage.name, record)
        # The refresh reads the first cuts that another manager committed. A first cut sets the number of tasks of later
        # stages.
        await self._ledger_writer.refresh(live)
        for stage in live.job.stages:
            if stage.chained:
                await self._plan(live, stage)
        await self._seal_outstanding(live)
        return _uncut_tasks(live)

    async def _seal_outstanding(self, live: LiveJob) -> None:
        """Commit CANCELLED for every outstanding bundle without an outcome, and fold the committed outcomes."""
        name = f"manager-{live.round}"
        while outstanding := live.all_outstanding()[:MAX_CONCURRENT_OUTCOMES]:
            now_s = self._clock.now_s()
            drafts = [settlement.seal(o.bundle, execution=name, worker=name, now_s=now_s) for o in outstanding]
            outcomes = await asyncio.gather(*(self._outcomes.commit(live.job, draft) for draft in drafts))
            await self._ledger_writer.fold([settlement.completion(outcome) for outcome in outcomes])

    async def _close_cuts(self, live: LiveJob, stage: StageName, record: StageRecord) -> None:
        """Commit an empty next cut, so that an earlier leader cannot commit further cuts. If an earlier leader has
        already committed the next cut, the bundles of the committed cut are canceled too."""
        round_ = live.round
        seq = record.cut_seq + 1 if record.plan_round == round_ else 0
        while True:
            planned = 0 if record.counts.planned is None and seq == 0 else None
            empty = Cut(live.id, stage, round_, seq, (), TaskSet(), planned)
            if await self._commit_cut(live, empty) == empty:
                return
            seq += 1

    async def _end(self, live: LiveJob, state: JobState, reason: str, closed: Mapping[StageName, int]) -> None:
        """Commit the end of the job, and record the committed end. `closed` has the number of tasks that will never
        run, by stage."""
        with span(self._tracer, "end", live.job.trace, Subject(live.id), state=state.value):
            closed = {name: tasks for name, tasks in closed.items() if tasks}
            await self._record(
                live, await self._commit_ending(live, Ending(state, reason, self._clock.now_s(), closed))
            )

    async def _commit_ending(self, live: LiveJob, ending: Ending) -> Ending:
        data = json_format.to_bytes(json_format.ending_to_json(ending))
        key = object_keys.final(live.id, live.round)
        try:
            with atomic_write.of_single_call(live.job.is_single_call):
                await self._patience(lambda: self._objects.put(key, data, if_absent=True))
        except AlreadyExists:
            try:
                return json_format.ending_from_json(
                    json_format.loads(await self._patience(lambda: self._objects.get(key)))
                )
            except Malformed as error:
                self._quarantine.object(key, error, live.id, "object")
        return ending

    async def _record_committed_end(self, live: LiveJob) -> None:
        """Record the end of a round that the bucket has and the ledger lacks.

        A retry writes the control object of its round only after the end of the earlier round is committed. If a power
        failure destroys both the ledger's record of the end and the retry, the control object still names the round of
        the retry.
        """
        with suppress(NotFound):
            data = await self._patience(lambda: self._objects.get(object_keys.final(live.id, live.round)))
            await self._record(live, json_format.ending_from_json(json_format.loads(data)))

    async def _record(self, live: LiveJob, ending: Ending) -> None:
        """Record the committed end of the job in the ledger, and wake the clients that wait for the job's end."""
        if self._notifier:
            await self._notifier.ended(live, ending)
        if await self._ledger_writer.write(live, Finish(live.id, ending, live.round)):
            self._counts.count_end(ending.state)
            # The log omits the reason of the job's end, because the reason may contain a user's text.
            log.info("ended %s in round %d", ending.state, live.round, extra={"job": live.id})
        live.end()

    async def _reason(self, live: LiveJob, verdict: Verdict) -> str:
        """Return the reason of the job's end, with the message of the job's first failure that no retry has run
        again."""
        if not verdict.reason:
            return ""
        try:
            retried = await RetriedTasks.read(self._ports, live.record)
        except (NotFound, UnreadableObject):
            return verdict.reason  # the bucket's retry object was lost or damaged after the manager had used it
        for record in await self._ledger.bundles(live.id, failed=True, limit=None if live.round else 1):
            failed = record.completion.failed if record.completion else TaskSet()
            current = retried.remaining(record.bundle.round, record.bundle.stage, failed)
            if not current:
                continue
            key = await self._keys.key_of(live.job)
            try:
                outcome = await committed(self._objects, record.bundle, self._patience, key)
            except Malformed:
                break  # the bucket's outcome was damaged after the manager had counted the outcome
            for failure in outcome.failed if outcome else ():
                if failure.final and failure.task in current:
                    return with_task(verdict.reason, record.bundle.stage, failure.task, failure.reason)
        return verdict.reason

    async def fetch_missing_outcomes(self, live: LiveJob) -> bool:
        """Fold committed outcomes whose event was lost. Return whether the ledger has every bundle's outcome (promise
        I3). All tasks of a job can end before the ledger has every outcome, because a split bundle's event may arrive
        after the events of its halves."""
        while outstanding := live.all_outstanding()[:MAX_CONCURRENT_OUTCOMES]:
            results = await asyncio.gather(*(self._outcomes.read(live.job, o.bundle) for o in outstanding))
            outcomes = [outcome for outcome in results if outcome]
            await self._ledger_writer.fold([settlement.completion(outcome) for outcome in outcomes])
            if len(outcomes) < len(outstanding):
                return False
        return True


def _uncut_tasks(live: LiveJob) -> Mapping[StageName, int]:
    """Return the number of unended tasks of each stage when no bundle is outstanding. Each number is at least 0,
    although forged outcomes may count more tasks than were planned."""
    return {name: max(0, (record.counts.planned or 0) - record.counts.terminal) for name, record in live.stages.items()}
