"""A worker's events count only for its own jobs and its own instance."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from batchlab.adapters.clock import RandomIds
from batchlab.core.commit import commit
from batchlab.core.errors import Unreachable
from batchlab.core.model import Bundle, Completion, Failure, FailureKind, JobId, Outcome, TaskSet
from batchlab.core.ports import Message
from batchlab.core.pricing.request_costs import Requests, WorkerRequests
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.protocol.commit_keys import jobs_in, with_proofs
from batchlab.core.protocol.messages import Beat, CounterReport, Duplicate, Events, HeldBundle, events_message
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey
from batchlab.manager.counters import BEAT
from batchlab.manager.worker_registry import InstanceKeys
from tests.support.attacks.victim import Victim
from tests.support.attacks.worker_rights import WorkerRights, actions, worker_of
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid
from tests.support.server.api import MAP, Rig, job
from tests.support.waiting import until

OTHER_KEY = CommitKey("0f" * 16)


def forged(bundle: Bundle, value: int = -1) -> Outcome:
    return Outcome(bundle, "evil-1", "evil", 1.0, 2.0, bundle.tasks, (value,), (0.1,))


def lies(bundle: Bundle) -> list[Events]:
    """Return false events with every fact that an event can state about a bundle."""
    done = settlement.completion(forged(bundle))
    failed = replace(done, succeeded=TaskSet(), failed=bundle.tasks)
    cancelled = replace(done, succeeded=TaskSet(), cancelled=bundle.tasks)
    return [
        *(Events(completions=(one,)) for one in (done, failed, cancelled)),
        Events(outcomes=(forged(bundle),)),
        Events(committed=(object_keys.outcome(bundle, UNSEALED),)),
        Events(committed=(object_keys.outcome(bundle, OTHER_KEY),)),
        Events(duplicates=(Duplicate(bundle.job, bundle.stage, "execution", "evil-1", 1e9),)),
        Events(traces=((bundle.job, bundle.stage, bundle.id, "00-x"),)),
    ]


def bodies(events: Events, keys: Mapping[JobId, CommitKey]) -> list[str]:
    """Return the message without proofs, with the proofs of a worker with these keys, and with such a proof under the
    name of another job."""
    text = events_message(events)
    mine = with_proofs(text, keys, lambda job: keys[job])
    moved = json.loads(mine)
    proofs = list(moved.pop("p").values())
    of_others = json.dumps({"p": dict.fromkeys(jobs_in(events), proofs[0])})
    return [text, mine, f"{of_others[:-1]},{text[1:]}"]


def test_events_about_another_job_are_not_counted(bring_up: Bring, tmp_path: Path) -> None:
    """Completions, outcomes, keys, duplicates, and traces need the proof of their own job. The proof of another job is
    not accepted."""
    grid = bring_up()
    victim = Victim(grid, tmp_path / "victim")
    victim.submit()
    own = {JobId("attacker-1"): OTHER_KEY}
    before = grid.client.job(victim.id)["stages"]
    with worker_of(grid) as worker:
        for task in range(victim.tasks):
            bundle = victim.bundle(task)
            text = json_format.outcome_text(forged(bundle))
            worker.put(object_keys.outcome(bundle, UNSEALED), text, if_absent=True)
            for events in lies(bundle):
                worker.send_events(*bodies(events, own))
    victim.open_gate()
    victim.check(tmp_path / "results")
    assert before[0]["succeeded"] == 0


def instances_of(grid: LocalGrid) -> dict[str, str]:
    """The state of each instance."""
    pools = grid.client.grid()["pools"]
    return {one["id"]: one["state"] for pool in pools for one in pool["instances"]}


def beat_of(instance: str, **changes: Any) -> Beat:
    beat = Beat(f"w-{instance}", instance, "default", time.time(), 1, 0, (), 10**9)
    return replace(beat, **changes)


def test_heartbeats_of_another_instance_are_ignored(bring_up: Bring, tmp_path: Path) -> None:
    """A heartbeat without the key of its instance neither silences nor ends the instance's worker. A heartbeat of an
    unknown instance is ignored."""
    grid = bring_up()
    victim = Victim(grid, tmp_path / "victim")
    victim.submit()
    until(lambda: len(victim.started()) == victim.tasks or victim.started())
    there = until(lambda: {k: v for k, v in instances_of(grid).items() if v == "InService"})
    unknown = [f"evil-{number}" for number in range(2000)]
    with worker_of(grid) as worker:
        for instance in there:
            for changes in (
                {"gone": True},
                {"gone": True, "key": OTHER_KEY},
                {"leaving": True, "worker": "w-evil", "key": OTHER_KEY},
                {"busy": 1000, "key": OTHER_KEY},
            ):
                beat = beat_of(instance, **changes)
                asked = WorkerRequests(beat.worker, instance, Requests(sqs=1e9))
                told = CounterReport(beat.worker, {"duplicate": 1000})
                events = Events(beats=(beat,), requests=(asked,), counters=(told,))
                worker.send_events(events_message(events))
        beats = [beat_of(one, gone=one[-1] in "13579") for one in unknown]
        for start in range(0, len(beats), 500):
            worker.send_events(events_message(Events(beats=tuple(beats[start : start + 500]))))
    victim.open_gate()
    victim.check(tmp_path / "results")
    assert instances_of(grid).keys() >= there.keys()
    assert not [one for one in instances_of(grid) if one.startswith("evil")]
    assert grid.client.grid()["unreadable"] >= 4 * len(there)
    with worker_of(grid) as worker:
        names, readable = " ".join(worker.list()), b"".join(worker.readable().values())
    assert victim.id in names
    assert not [one for one in there if one in names or one.encode() in readable]


def test_no_worker_learns_the_id_of_a_new_instance() -> None:
    """The first key of an instance is accepted, so other workers must not learn the id of an instance before that. The
    ids on `local` and in containers are random, and a worker's role on AWS cannot list instances."""
    ids = {RandomIds().fresh("w") for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("w-[0-9a-f]{16}", one) for one in ids)
    listing = {action for action in actions() if re.search(":(Describe|List|[*])", action)}
    assert listing == {"s3:ListBucket"}


# --- A manager in this process -------------------------------------------------------------------


def take(rig: Rig, *messages: str) -> None:
    """Let the manager process event messages, and wait until it has."""
    collector = rig.manager._collector
    rig.run(collector._process([Message("m", message, "r", 1, 0.0, 0.0) for message in messages]))


def test_only_the_first_key_of_an_instance_is_believed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """The first heartbeat of an instance binds the instance to a key, and later heartbeats need this key. A restarted
    worker and the next leader know the key. Heartbeats with other keys are counted and logged once."""
    rig.submit(job(tasks=1))
    (instance,) = rig.instances(1, "Pending")
    registry = rig.manager.registry
    own = beat_of(instance, key="own", number=1)
    take(rig, events_message(Events(beats=(own,))))
    rig.until(lambda: instance in registry.workers, "the first beat")
    for changes in ({}, {"gone": True}, {"worker": "w-evil"}):
        for key in ("", "other"):
            take(rig, events_message(Events(beats=(beat_of(instance, key=key, **changes),))))
            assert registry.workers[instance].beat == own
    assert rig.manager.counts.unreadable[BEAT] == 6
    assert caplog.text.count("dropped a heartbeat") == 1
    again = replace(own, worker="w-fresh")
    take(rig, events_message(Events(beats=(again,))))
    assert registry.workers[instance].beat == again
    assert b"own" not in rig.run(rig.objects.get(object_keys.INSTANCES))
    refused: list[tuple[str, str]] = []
    later = InstanceKeys(rig.manager.ports, lambda *one: refused.append(one))
    rig.run(later.load())
    later.update_instances({one.id: one for view in rig.manager.groups.values() for one in view.instances})
    assert later.admits(own)
    assert not later.admits(beat_of(instance, key="other"))
    assert [one for one, _ in refused] == [instance]


def test_a_first_beat_counts_once_its_key_is_stored(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager may die between a first heartbeat and the store of its key. The dead manager has not acted on the
    heartbeat, so the next heartbeat may bind the instance to the same key, to another key, or to none."""
    rig.submit(job(tasks=1))
    (instance,) = rig.instances(1, "Pending")
    registry = rig.manager.registry
    kept = registry.instances._document
    out = Unreachable("The bucket cannot be reached.")
    with monkeypatch.context() as patched:
        patched.setattr(kept, "write", AsyncMock(side_effect=out))
        own = beat_of(instance, key="own", number=1)
        take(rig, events_message(Events(beats=(own,))))
        take(rig, events_message(Events(beats=(replace(own, gone=True, key="other"),))))
        assert instance not in registry.workers
        assert not registry.has_left(instance)
    rig.until(lambda: instance in registry.workers, "the first beat")
    assert registry.workers[instance].beat == own


def test_bundles_and_receipts_of_a_heartbeat_count_only_for_its_worker(rig: Rig) -> None:
    """A heartbeat does not stop the search for bundles of other jobs, and its receipts are not used on other queues."""
    name = JobId(rig.submit(job(tasks=2)))
    one, two = rig.outstanding(name, 2)
    (instance,) = rig.instances(1, "Pending")
    rig.beat(instance)
    tasks = object_keys.tasks_queue("default")

    def held(queue: str, number: int) -> HeldBundle:
        bundle = (one, two)[number].bundle
        return HeldBundle(queue, "r", bundle.job, bundle.stage, bundle.id, True)

    events = Events(beats=(beat_of(instance, held=(held(tasks, 0), held(object_keys.EVENTS, 1))),))
    take(rig, events_message(events))
    assert rig.manager.registry.workers[instance].beat.held == ()
    key = rig.run(rig.manager.ports.keys.stored(name))
    later = replace(events, beats=(replace(events.beats[0], number=10**9 + 1),))
    take(rig, with_proofs(events_message(later), {name}, lambda _: key))
    assert rig.manager.registry.workers[instance].beat.held == (held(tasks, 0),)
    heard_s = two.heard_s
    take(rig, with_proofs(events_message(later), {name}, lambda _: OTHER_KEY))
    assert two.heard_s == heard_s


def test_a_fact_of_two_jobs_is_a_fact_of_neither(rig: Rig) -> None:
    """A follow-up of a bundle must belong to the job of this bundle."""
    mine, other = JobId(rig.submit(job(token="a"))), JobId(rig.submit(job(token="b")))
    (bundle, *_) = (one.bundle for one in rig.outstanding(mine, 4))
    follow = replace(rig.outstanding(other, 4)[0].bundle, attempt=7)
    done = Completion(
        bundle=bundle,
        worker="w",
        started_s=1.0,
        ended_s=2.0,
        succeeded=TaskSet(),
        failed=TaskSet(),
        cancelled=TaskSet(),
        run_s=0.1,
        follows=(json_format._follow_from_json({"b": json_format.bundle_to_json(follow), "d": 0.0}),),
    )
    key = rig.run(rig.manager.ports.keys.stored(mine))
    text = events_message(Events(completions=(done,)))
    take(rig, with_proofs(text, {mine}, lambda _: key))
    assert len(rig.manager.lives[mine].all_outstanding()) == 4
    assert rig.manager.counts.unreadable["event"] == 1


def test_events_that_a_worker_repeats_count_once(rig: Rig) -> None:
    """A worker sends its own proven event again, also after the user has retried the job. The repeated event belongs to
    the previous round."""
    name = JobId(rig.submit(job(tasks=1)))
    (bundle,) = (one.bundle for one in rig.outstanding(name, 1))
    key = rig.run(rig.manager.ports.keys.stored(name))
    failed = Outcome(bundle, "evil-1", "evil", 1.0, 2.0, failed=(Failure(0, FailureKind.EXCEPTION, "no"),))
    text = events_message(Events(completions=(settlement.completion(failed),)))
    old = with_proofs(text, {name}, lambda _: key)
    rig.run(commit(rig.objects, failed, rig.manager.ports.patience, key))
    take(rig, old, old)
    take(rig, old)
    assert rig.ended(name)["stages"][0]["failed"] == 1
    rig.client.retry(name)
    rig.outstanding(name, 1)
    take(rig, old)
    (stage,) = rig.client.job(name)["stages"]
    assert (stage["failed"], stage["planned"]) == (0, 1)
    assert len(rig.manager.lives[name].all_outstanding()) == 1


@pytest.mark.parametrize("tasks", [2, 12])
def test_job_with_counted_but_uncommitted_outcomes_restarts_from_the_bucket(rig: Rig, tasks: int) -> None:
    """A worker with the commit key sends completions without outcome objects. The job restarts from the bucket, and
    ends with the committed outcomes."""
    name = JobId(rig.submit(job(tasks=tasks)))
    bundles = [one.bundle for one in rig.outstanding(name, tasks)]
    key = rig.run(rig.manager.ports.keys.stored(name))
    forgeries = tuple(settlement.completion(forged(bundle)) for bundle in bundles)
    text = events_message(Events(completions=forgeries))
    before = rig.manager.lives[name]
    take(rig, with_proofs(text, {name}, lambda _: key))
    rig.until(lambda: rig.manager.lives.get(name) not in (before, None), "the restored job")
    assert rig.client.job(name)["stages"][0]["succeeded"] == 0
    rig.work(name, tasks)
    view = rig.ended(name)
    assert (view["state"], view["stages"][0]["succeeded"]) == ("SUCCEEDED", tasks)


def test_a_definition_below_the_markers_of_a_job_is_not_restored(rig: Rig, worker: WorkerRights) -> None:
    """An event with the id `job/stage/running/x` does not create a job from a worker's object at this key. A restored
    job must pass admission."""
    name = rig.submit(job(tasks=1))
    sealed = json_format.loads(worker.get(object_keys.spec(JobId(name))))
    plain = {key: one for key, one in sealed.items() if key not in ("commit_hash", "needs")}
    for folder, number in product(("running", "starts"), range(3)):
        forged_id = f"{name}/map/{folder}/x{number}"
        says, spec = ((forged_id, sealed), (forged_id, plain), (name, plain))[number]
        doc = {**spec, "id": says, "priority": 1000}
        worker.put(object_keys.spec(JobId(forged_id)), json.dumps(doc), if_absent=True)
        bundle = Bundle(JobId(forged_id), MAP, TaskSet.from_indices([0]))
        take(rig, events_message(Events(completions=(settlement.completion(forged(bundle)),))))
    assert [one["id"] for one in rig.client.jobs()] == [name]


def test_a_restored_job_passes_admission(rig: Rig) -> None:
    """An event does not restore a job that the grid would not accept."""
    made = job("wrong", pool="nowhere")
    rig.run(rig.objects.put(object_keys.spec(made.id), commit_keys.to_bytes(made)))
    bundle = Bundle(made.id, MAP, TaskSet.from_indices([0]))
    take(rig, events_message(Events(completions=(settlement.completion(forged(bundle)),))))
    assert rig.client.jobs() == []
