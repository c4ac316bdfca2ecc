"""A worker with the key of a job commits outcomes that do not account for all of its tasks.

The worker can spoil its own job, but the job ends and the manager continues.
"""

from __future__ import annotations

from dataclasses import replace

from batchlab.core.commit import commit
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Bundle, Follow, JobId, Outcome, StageName, TaskSet
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.commit_keys import with_proofs
from batchlab.core.protocol.messages import Events, events_message
from batchlab.core.retry_rule import RetryRule
from tests.attacks.test_events import forged, take
from tests.support.server.api import MAP, Rig, job


def commit_and_tell(rig: Rig, name: JobId, *outcomes: Outcome) -> None:
    """Act as a worker with the key of the job: commit outcomes, and send their events."""
    key = rig.run(rig.manager.ports.keys.stored(name))
    for outcome in outcomes:
        rig.run(commit(rig.objects, outcome, rig.manager.ports.patience, key))
    done = tuple(settlement.completion(outcome) for outcome in outcomes)
    take(rig, with_proofs(events_message(Events(completions=done)), {name}, lambda _: key))


def test_job_whose_outcomes_lack_follow_ups_fails(rig: Rig) -> None:
    """The outcomes do not contain follow-ups for the next stage. The manager reads the bucket once, and then the job
    fails."""
    rig.manager.coordinator._lost_tasks._wait_s = 0.0
    follower = StageDef(StageName("next"), (MAP,), handler="m:f")
    name = JobId(rig.submit(job(tasks=2, after=[follower])))
    bundles = [one.bundle for one in rig.outstanding(name, 2)]
    before = rig.manager.lives[name]
    commit_and_tell(rig, name, *(forged(bundle) for bundle in bundles))
    view = rig.ended(name)
    assert before.ended.is_set()
    assert (view["state"], view["stages"][1]["cancelled"]) == ("FAILED", 2)
    assert "2 tasks are in no bundle" in view["reason"]


def test_a_job_with_more_results_than_tasks_can_be_cancelled_and_retried(rig: Rig) -> None:
    """Outcomes of bundles without a plan count tasks twice. The number of remaining tasks must not become negative,
    because a negative number could not be read back."""
    name = JobId(rig.submit(job(tasks=2)))
    rig.outstanding(name, 2)
    both = Bundle(name, MAP, TaskSet.from_indices([0, 1]))
    made = replace(forged(both), values=(-1, -1), run_s=(0.1, 0.1))
    commit_and_tell(rig, name, made, replace(made, bundle=replace(both, attempt=2)))
    rig.client.cancel(name)
    assert rig.ended(name)["state"] == "CANCELLED"
    final = rig.run(rig.objects.get(object_keys.final(name, 0)))
    assert json_format.ending_from_json(json_format.loads(final)).state == "CANCELLED"
    rig.client.retry(name)
    assert rig.ended(name)["round"] == 1
    other = rig.submit(job("other", "other", tasks=1))
    rig.work(other, 1)
    assert rig.ended(other)["state"] == "SUCCEEDED"


def test_a_follow_waits_no_longer_than_the_backoff() -> None:
    """Before, a bundle with a due time in 3,000 years was never looked for."""
    rule = RetryRule(attempts=3, backoff_s=10.0, factor=2, max_backoff_s=60.0, jitter=0.0)
    made = job(retry=rule)
    again = Bundle(made.id, MAP, TaskSet.from_indices([0]), attempt=2)
    assert settlement.delay_s(made, Follow(again, 1e11)) == 10.0
    assert settlement.delay_s(made, Follow(again, 5.0)) == 5.0
    assert settlement.delay_s(made, Follow(replace(again, attempt=1 << 50), 1e11)) == 60.0
