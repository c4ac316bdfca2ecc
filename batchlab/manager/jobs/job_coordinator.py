"""Moves a job on: plans its stages, cuts them into bundles, sends those, and ends the job.

Invariants: a decision is committed by a conditional PUT before it is acted on (plan, cut, final),
so it is taken once whoever takes it; a gather is planned only when the ledger shows every task
upstream terminal (never by counting messages); a job always ends (I7). The steps are in one file,
since their order is what there is to see; how each is done is in its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from batchlab.core import atomic_write, control_object
from batchlab.core.commit import Addressed, address, committed, send_all
from batchlab.core.errors import AlreadyExists, BackendError, Malformed, NotFound, UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Control, JobState, Json, StageName, TaskSet
from batchlab.core.ports import AddCut, Cut, Ending, Finish, SetControl, SetPlanned, StageRecord
from batchlab.core.protocol import json_format, object_keys, settlement, spec_object
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.settlement import Verdict, judge
from batchlab.core.retry import set_within
from batchlab.core.task_names import with_task
from batchlab.core.tracing import NOBODY, Subject, Tracer, span
from batchlab.manager.counters import Counts
from batchlab.manager.events.folding import Folder
from batchlab.manager.events.quarantine import Outcomes, Quarantine, UnreadableObject, read_cut
from batchlab.manager.jobs import completion_checks
from batchlab.manager.jobs.bundling import Cutter
from batchlab.manager.jobs.stage_plans import Plans
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports, Superseded, move

log = logging.getLogger(__name__)

SEALED_AT_ONCE = 16

BEGUN_S = 0.05
"""A job that ends sooner gets no control object: where none is, a worker asks for the spec."""
MOMENT_S = 0.001
"""From news of a job to what follows from it."""


class Conductor:
    """The steps of one job's life after its submission."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        folder: Folder,
        cutter: Cutter,
        on_plan: Callable[[str], None],
        counts: Counts | None = None,
        tracer: Tracer = NOBODY,
        on_end: Callable[[LiveJob, Ending], Awaitable[None]] | None = None,
        on_missing: Callable[[LiveJob], Awaitable[None]] | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """`on_plan` is called with the pool of a stage whose number of tasks has become known, so
        that capacity can be had for it; `on_end` with the end of a job that is committed and not in
        the ledger yet; `on_missing` with a job that has counted bundles without an outcome."""
        self._on_end = on_end
        self._on_missing = on_missing or _keep
        self._counts = counts or Counts()
        self._tracer = tracer
        self._ports = ports
        self._settings = settings
        self._folder = folder
        self._cutter = cutter
        self._on_plan = on_plan
        self._quarantine = quarantine or Quarantine(self._counts)
        self._outcomes = Outcomes(ports, self._quarantine)
        self._lost = completion_checks.Lost(ports, settings.silence_s)
        self.plans = Plans(ports)
        self._inputs = Inputs(ports.objects, ports.patience)

    async def conduct(self, live: LiveJob) -> None:
        """Advance the job whenever it is poked, until it has ended."""
        if live.all_outstanding() and not live.allowed:
            # It has begun, and nothing is as urgent as its first bundles, on their way and back.
            await set_within(live.poke, BEGUN_S)
            await asyncio.sleep(MOMENT_S)
        while not live.ended.is_set():
            live.poke.clear()
            if live.unreadable:
                raise live.unreadable
            await self.advance(live)
            live.trouble = ""
            if not live.ended.is_set():
                await live.poke.wait()
                # Those who wait for results go first; and events come in swarms.
                await asyncio.sleep(MOMENT_S)

    async def advance(self, live: LiveJob) -> None:
        """Do everything that can be done for the job now."""
        if not live.allowed and not live.is_through:
            await self._allow(live)
        if live.doubtful:
            await self._make_sure(live)
        if live.record.control is Control.CANCEL:
            await self.stop(live, json_format.Word(Control.CANCEL))
            return
        if live.record.control is Control.PAUSE or live.record.state is JobState.SCHEDULED:
            return
        try:
            for stage in live.job.stages:
                await self._plan(live, stage)
                await self._cut(live, stage)
        except UsageError as error:
            await self.stop(live, json_format.Word(Control.CANCEL, JobState.FAILED, str(error)))
            return
        verdict = judge(live.job, [s.counts for s in live.stages.values()])
        if verdict.stop:
            reason = await self._explained(live, verdict)
            await self.stop(live, json_format.Word(Control.CANCEL, JobState.FAILED, reason))
        elif live.is_through and await self._accounted(live):
            if live.doubtful:
                return  # until the next time, which heeds the word
            if missing := await completion_checks.uncommitted(self._ports, live):
                about = {"job": live.id}
                log.error("%d bundles were counted and not committed", len(missing), extra=about)
                await self._on_missing(live)
                return
            state = JobState.FAILED if verdict.failed else JobState.SUCCEEDED
            await self._finish(live, state, await self._explained(live, verdict), {})
        else:
            await self._end_lost(live)

    async def _end_lost(self, live: LiveJob) -> None:
        """End a job some tasks of which are in no bundle, unless the bucket knows of more (I7)."""
        step = self._lost.step(live)
        if step is completion_checks.Step.RESTORE:
            about = {"job": live.id}
            log.error("its bundles have ended, but not all of its tasks", extra=about)
            await self._on_missing(live)
        elif step is completion_checks.Step.FAIL:
            lost = sum(_never_cut(live).values())
            reason = f"{lost} tasks are in no bundle: an outcome lacks what follows from it"
            await self.stop(live, json_format.Word(Control.CANCEL, JobState.FAILED, reason))

    # --- Planning --------------------------------------------------------------------------------

    async def _plan(self, live: LiveJob, stage: StageDef) -> None:
        record = live.stages[stage.name]
        if record.counts.planned is not None:
            return
        if stage.chained:
            # Asked again at every advance, not done along with the upstream plan: a manager that
            # dies in between would leave a stage that never ends.
            upstream = live.stages[stage.after[0]].counts.planned
            if upstream is not None:
                await self._folder.write(
                    live, SetPlanned(live.id, stage.name, upstream, live.round)
                )
            return
        # The raw input does not change from round to round; what is gathered may.
        round_ = live.round if stage.after else 0
        if live.doubtful or any(not live.stages[u].counts.ended for u in stage.after):
            return
        if stage.gather is not None and self._doomed(live):
            # Totals over a part of the input would look like totals over all of it.
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
        """The tasks of the stage, as its plan has them, which is made where there is none."""
        manifest = await self.plans.existing(live.job, stage.name, round_)
        if manifest is None and not stage.after and live.job.input is not None:
            await move(self._ports, live, JobState.PENDING)
            manifest = await self.plans.of_input(live.job, stage)
        elif manifest is None and stage.after:
            counts = {u: live.stages[u].counts for u in stage.after}
            manifest = await self.plans.of_stages(live.job, stage, round_, counts)
        if manifest is None:
            plan, spec = (
                object_keys.manifest(live.id, stage.name, round_),
                object_keys.spec(live.id),
            )
            raise UsageError(
                f"Job {live.id} says it brings its own items, but neither {plan} nor {spec} has "
                f"them.",
                remedy="Submit it through the Python API, or give it an input.",
            )
        return TaskSet.span(0, manifest.count) - manifest.skipped

    async def _first_cut(self, live: LiveJob, stage: StageDef, tasks: TaskSet) -> None:
        round_ = live.round
        bundles, left = self._cutter.wave(live, stage, tasks, round_)
        now_s = self._ports.clock.now_s()
        cut = Cut(live.id, stage.name, round_, 0, bundles, left, len(tasks), now_s)
        await self._commit_and_send(live, cut)
        about = {"job": live.id, "stage": stage.name}
        log.info(
            "planned %d tasks, the first %d bundles sent", len(tasks), len(bundles), extra=about
        )
        self._on_plan(stage.pool)

    def _doomed(self, live: LiveJob) -> bool:
        return judge(live.job, [s.counts for s in live.stages.values()]).failed

    async def send_opening(
        self, job: JobDef, opening: spec_object.Opening, *, again: bool = False
    ) -> None:
        """Send what the opening has cut; `again`: as copies, which look for an outcome first."""
        assert opening.cut
        self._inputs.keep(job.id, opening.cut.stage, opening.items)
        bundles = opening.cut.bundles
        copies = [replace(one, losses=1) for one in bundles] if again else bundles
        await self.send(job, copies)

    def begin(self, live: LiveJob, cut: Cut) -> None:
        """From now on expect what the opening has cut."""
        now_s = self._ports.clock.monotonic_s()
        live.expect((bundle, now_s) for bundle in cut.bundles)
        self._on_plan(live.job.stage(cut.stage).pool)

    # --- Cutting ---------------------------------------------------------------------------------

    async def _cut(self, live: LiveJob, stage: StageDef) -> None:
        """Commit and send bundles while there is room for them in the pool's queue."""
        while live.record.control is Control.RUN:
            record = live.stages[stage.name]
            round_ = live.round
            bundles, left = self._cutter.wave(live, stage, record.left, round_)
            if not bundles:
                return
            seq, now_s = record.cut_seq + 1, self._ports.clock.now_s()
            cut = Cut(live.id, stage.name, round_, seq, bundles, left, at_s=now_s)
            await self._commit_and_send(live, cut)

    async def _commit_cut(self, live: LiveJob, cut: Cut) -> Cut:
        """Commit a cut; returns the one that counts, which a manager before us may have made."""
        cut = await self.plans.opened(live.job, cut) or await self._put_cut(cut)
        await self._folder.write(live, AddCut(cut))
        now_s = self._ports.clock.monotonic_s()
        live.expect((bundle, now_s) for bundle in cut.bundles)
        return cut

    async def _put_cut(self, cut: Cut) -> Cut:
        key = object_keys.cut(cut.job, cut.stage, cut.round, cut.seq)
        objects, patience = self._ports.objects, self._ports.patience
        try:
            await patience(
                lambda: objects.put(
                    key, json_format.to_bytes(json_format.cut_to_json(cut)), if_absent=True
                )
            )
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
            # A manager before us may have sent them, and the ledger has lost that in a power cut.
            # As copies, which look for an outcome first.
            bundles = tuple(replace(one, losses=1) for one in bundles)
        await self.send(live.job, bundles, trace=cutting.context)

    async def send(
        self,
        job: JobDef,
        bundles: Sequence[Bundle],
        *,
        trace: str = "",
    ) -> None:
        """Put bundles on their pool's queue, with their inputs where these are small."""
        above, about = trace or job.trace, Subject(job.id)
        with span(self._tracer, "send", above, about, bundles=len(bundles)) as sending:
            await self._send(job, bundles, sending.context)

    async def _send(self, job: JobDef, bundles: Sequence[Bundle], trace: str) -> None:
        messages: list[Addressed] = []
        key = await self._ports.keys.of(job)
        now_s = self._ports.clock.now_s()
        for bundle in bundles:
            items: Sequence[Json] | None = None
            if bundle.source is None and job.stage(bundle.stage).gather != "*":
                try:
                    items = await self._inputs.resolve(job, bundle, key)
                except NotFound:
                    items = None  # the worker finds the same, and says so in an outcome
            wait_s = settlement.wait_s(job, bundle, now_s)
            messages.append(
                address(job, bundle, key, items=items, delay_s=wait_s, now_s=now_s, trace=trace)
            )
        await send_all(self._ports.queue, messages, self._ports.patience)

    # --- Ending ----------------------------------------------------------------------------------

    async def stop(self, live: LiveJob, word: json_format.Word) -> None:
        """End the job before its time: no task starts any more, what is outstanding is sealed.

        `word` says what it ends as, unless an earlier one has been written.
        """
        await self.forbid(live, word)
        closed = await self._seal(live)
        # It is written again if the store has lost it meanwhile.
        objects, patience = self._ports.objects, self._ports.patience
        written = await control_object.insist(
            objects, live.id, replace(word, round=live.round), patience
        )
        if written is None:
            raise Superseded(live)
        await self._finish(live, written.state, written.reason, closed)

    async def give_up(self, live: LiveJob, error: Malformed) -> None:
        """End a job of which an object cannot be read that commits a decision, such as a plan or a
        cut. If the bucket does not let it end, end it in the ledger alone."""
        key = error.key if isinstance(error, UnreadableObject) else object_keys.committed(live.id)
        self._quarantine.object(key, error, live.id, "object")
        reason = f"the stored object {key} cannot be read: {error.message}"
        try:
            await self.stop(live, json_format.Word(Control.CANCEL, JobState.FAILED, reason))
        except (Malformed, NotFound):
            await self.abandon(live, reason)

    async def abandon(self, live: LiveJob, reason: str) -> None:
        """End a job of which the bucket has nothing left, in the ledger alone."""
        now_s = self._ports.clock.now_s()
        await self._record(live, Ending(JobState.FAILED, reason, now_s, _never_cut(live)))

    async def forbid(self, live: LiveJob, word: json_format.Word) -> None:
        """Write "cancel" where the workers look, and wait until none can start a task (I4).

        The first such word stays: a leader that takes over must not end the job as something else.
        Superseded where the job is in a later round by now.
        """
        if live.forbidden:
            return
        async with live.control_lock:
            if live.record.control is not Control.CANCEL:
                word = replace(word, round=live.round)
                objects, patience = self._ports.objects, self._ports.patience
                if not await control_object.insist(objects, live.id, word, patience):
                    raise Superseded(live)
                await self.record_control(live, Control.CANCEL)
        await asyncio.sleep(self._settings.control_lease_s * 1.1)
        live.forbidden = True

    async def _allow(self, live: LiveJob) -> None:
        """Write the control object that allows tasks to start, where there is none. Those who got
        the job's first bundles do not wait for it."""
        objects, patience = self._ports.objects, self._ports.patience
        # There is one where the job was conducted before, and a cancellation must not be undone.
        run = json_format.Word(Control.RUN, round=live.round)
        with atomic_write.repeated():
            await control_object.say(objects, live.id, run, patience, over=None)
        live.allowed = True

    async def record_control(self, live: LiveJob, word: Control) -> None:
        """Let the ledger and memory have the word that was written; Superseded."""
        change = SetControl(live.id, word, live.round)
        if (await self._ports.ledger.apply(change)).has_control(change):
            live.record = replace(live.record, control=word)
            live.changed()
        else:
            await self._folder.refresh(live)

    async def _make_sure(self, live: LiveJob) -> None:
        live.doubtful = False  # first: a doubt that comes meanwhile stays
        try:
            await self.heed(live)
        except BackendError:
            live.doubtful = True
            raise

    async def heed(self, live: LiveJob) -> None:
        """Take note of the word that the workers follow.

        A manager that died, or is leader no longer, may have written it and told nobody else.
        """
        async with live.control_lock:
            if live.record.control is Control.CANCEL:
                return
            word = await self._word(live)
            if word is None:
                return
            if word.control is Control.CANCEL and word.round < live.round:
                # Only a manager of release 0.1.0, which wrote without a condition, leaves that.
                objects, patience = self._ports.objects, self._ports.patience
                await control_object.permit(objects, live.id, live.round, patience)
                word = json_format.Word(Control.RUN, round=live.round)
            if word.control is live.record.control or word.round > live.round:
                return
            about = {"job": live.id}
            log.warning("the word is %s, which the ledger did not know", word.control, extra=about)
            await self.record_control(live, word.control)
        if word.control is not Control.CANCEL:
            paused = word.control is Control.PAUSE
            await move(self._ports, live, JobState.PAUSED if paused else JobState.RUNNABLE)
        live.poke.set()

    async def _word(self, live: LiveJob) -> json_format.Word | None:
        """Return the word that the workers follow, None if there is none. If the store has lost or
        damaged its object, write the word of the ledger again."""
        objects, patience = self._ports.objects, self._ports.patience
        try:
            return await control_object.word_of(objects, live.id, patience)
        except NotFound:
            # Without an object the workers run the job.
            if live.record.control is Control.RUN:
                return None
        except Malformed as error:
            self._quarantine.object(object_keys.control(live.id), error, live.id, "object")
        await control_object.mend(objects, live.id, live.record.control, live.round, patience)
        return None

    async def _seal(self, live: LiveJob) -> Mapping[StageName, int]:
        """Commit CANCELLED for every outstanding bundle; whoever committed before us counts.

        Answers how many tasks of each stage never came into a bundle.
        """
        for stage in live.job.stages:
            record = live.stages[stage.name]
            if not stage.chained and (record.left or record.counts.planned is None):
                await self._close_cuts(live, stage.name, record)
        # A first cut may have been found there: what it feeds has as many tasks.
        await self._folder.refresh(live)
        for stage in live.job.stages:
            if stage.chained:
                await self._plan(live, stage)
        who = f"manager-{live.round}"
        while outstanding := live.all_outstanding()[:SEALED_AT_ONCE]:
            now_s = self._ports.clock.now_s()
            drafts = [
                settlement.sealed(one.bundle, execution=who, worker=who, now_s=now_s)
                for one in outstanding
            ]
            outcomes = await asyncio.gather(
                *(self._outcomes.commit(live.job, draft) for draft in drafts)
            )
            await self._folder.fold([settlement.completion(outcome) for outcome in outcomes])
        return _never_cut(live)

    async def _close_cuts(self, live: LiveJob, stage: StageName, record: StageRecord) -> None:
        """Take the place of the next cut, so that a manager that was leader before us and has
        not noticed cannot cut any more; if it has just done so, its bundles are ours to seal."""
        round_ = live.round
        seq = record.cut_seq + 1 if record.plan_round == round_ else 0
        while True:
            planned = 0 if record.counts.planned is None and seq == 0 else None
            empty = Cut(live.id, stage, round_, seq, (), TaskSet(), planned)
            if await self._commit_cut(live, empty) == empty:
                return
            seq += 1

    async def _finish(
        self, live: LiveJob, state: JobState, reason: str, closed: Mapping[StageName, int]
    ) -> None:
        about = Subject(live.id)
        with span(self._tracer, "end", live.job.trace, about, state=state.value):
            await self._end(live, state, reason, closed)

    async def _end(
        self, live: LiveJob, state: JobState, reason: str, closed: Mapping[StageName, int]
    ) -> None:
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
                ending = json_format.ending_from_json(
                    json_format.loads(await patience(lambda: objects.get(key)))
                )
            except Malformed as error:
                self._quarantine.object(key, error, live.id, "object")
        await self._record(live, ending)

    async def _record(self, live: LiveJob, ending: Ending) -> None:
        """Let the ledger know of the job's end, and those who wait for it."""
        if self._on_end:
            await self._on_end(live, ending)
        is_new = await self._folder.write(live, Finish(live.id, ending, live.round))
        if is_new:
            self._counts.ended(ending.state)
            # Not the reason: it may be in a user's own words.
            log.info("ended %s in round %d", ending.state, live.round, extra={"job": live.id})
        live.ended.set()
        live.poke.set()

    async def _explained(self, live: LiveJob, verdict: Verdict) -> str:
        """The verdict's reason with the first failure's own words, for a person."""
        if not verdict.reason:
            return ""
        records = await self._ports.ledger.bundles(live.id, failed=True, limit=1)
        objects, patience = self._ports.objects, self._ports.patience
        for record in records:
            key = await self._ports.keys.of(live.job)
            try:
                outcome = await committed(objects, record.bundle, patience, key)
            except Malformed:
                break  # it was read when it was counted
            for failure in outcome.failed if outcome else ():
                if failure.final:
                    return with_task(
                        verdict.reason, record.bundle.stage, failure.task, failure.reason
                    )
        return verdict.reason

    async def _accounted(self, live: LiveJob) -> bool:
        """Whether every bundle's outcome is in the ledger; fetches those whose event was lost.

        All tasks can be terminal without that: the halves of a split bundle may be heard of
        before it is, and the event of the split itself may never come (I3).
        """
        while outstanding := live.all_outstanding()[:SEALED_AT_ONCE]:
            found = await asyncio.gather(
                *(self._outcomes.of(live.job, one.bundle) for one in outstanding)
            )
            outcomes = [outcome for outcome in found if outcome]
            await self._folder.fold([settlement.completion(outcome) for outcome in outcomes])
            if len(outcomes) < len(outstanding):
                return False
        return True


async def _keep(_: LiveJob) -> None:
    """Leave a job as it is where nothing can restore it."""


def _never_cut(live: LiveJob) -> Mapping[StageName, int]:
    """How many tasks of each stage have come to no end, once no bundle is outstanding. Forged
    outcomes of a worker that has the job's commit key may count more tasks than were planned."""
    return {
        name: max(0, (record.counts.planned or 0) - record.counts.terminal)
        for name, record in live.stages.items()
    }
