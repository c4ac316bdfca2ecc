"""Planted bugs at the trust boundary, which lying workers show.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from batchlab.core.commit import read_outcome
from batchlab.core.errors import Malformed, NotFound, TooNew
from batchlab.core.job_definition import JobDef
from batchlab.core.model import BundleId, Completion, JobId, Json, Outcome, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import field_checks, json_format, messages, object_keys, settlement, values
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.core.protocol.messages import Beat, Events, HeldBundle
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.manager import admission
from batchlab.manager.collector import Collector, EventVerifier
from batchlab.manager.unresponsive_workers import WorkEvidence
from batchlab.manager.worker_registry import InstanceKeys, WorkerRegistry
from batchlab.worker.job_cache import JobCache
from tests.sim.mutants.kit import Plant, planted


@planted("I8", weather="lies")
def heartbeats_without_a_key(plant: Plant) -> None:
    """The manager accepts a heartbeat for any instance that the heartbeat names. Any worker can report that another
    worker leaves, or which bundles another worker holds (I8).
    """

    @plant.method(InstanceKeys, "admits")
    def admits(self: InstanceKeys, beat: Beat, trusted: Collection[JobId] = ()) -> bool:
        return True


@planted("I1", "I2", "I3", "I7", "I8", weather="lies")
def completions_without_a_proof(plant: Plant) -> None:
    """The manager accepts an event for every job that the event names. Any worker can end the tasks of any job (I2)."""

    @plant.method(EventVerifier, "_proven_jobs")
    async def _proven(self: EventVerifier, jobs: set[JobId], text: str, proofs: Mapping[str, str]) -> set[JobId]:
        return jobs


@planted("I8", weather="lies")
def keys_of_events_unchecked(plant: Plant) -> None:
    """The manager reads each object that an event names. Any worker can make the manager read any object in the bucket
    (I8).
    """

    @plant.everywhere(messages._key_from_json)
    def _key_from_json(value: Any) -> str:
        return str(value)

    @plant.method(EventVerifier, "_is_genuine")
    async def _is_genuine(self: EventVerifier, name: str, trusted: set[JobId], proven: set[JobId]) -> bool:
        return True

    @plant.method(Collector, "_fetch")
    async def _fetched(self: Collector, name: str) -> list[Completion]:
        try:
            outcome = await read_outcome(self._ports.objects, name, self._ports.patience)
        except (Malformed, NotFound, TooNew):
            return []
        return [settlement.completion(outcome)]


@planted("I8", weather="lies")
def references_unchecked(plant: Plant) -> None:
    """A reference in a result may name any object. Any worker can make the manager read any object in the bucket
    (I8).
    """

    @plant.method(JobObjects, "key")
    def key(self: JobObjects, reference: Json) -> str:
        return str(reference.get(values.kind(reference) or ""))


@planted("I1", "I2", "I3", "I7", "I8", "step 3", "ends", weather="lies")
def outcome_names_unsealed(plant: Plant) -> None:
    """The object name of an outcome depends only on the id of its bundle. Any worker can write the outcome of a bundle
    before the worker that runs the bundle commits the outcome (I1).
    """

    @plant.everywhere(object_keys.outcome_of)
    def outcome_of(job: JobId, stage: StageName, bundle: BundleId, key: CommitKey) -> str:
        return f"{object_keys.outcomes(job, stage)}{object_keys._spread(bundle)}/{bundle}.json"


@planted("I8", weather="lies")
def job_names_unchecked(plant: Plant) -> None:
    """The manager accepts any job name in an event. A worker can name a job whose definition would be stored below the
    markers of another job. The worker may write such a definition itself (I8).
    """

    @plant.everywhere(field_checks.name)
    def name(value: Any) -> str:
        return str(value)

    @plant.everywhere(admission.is_name)
    def is_name(text: str) -> bool:
        return True


@planted("I8", weather="lies")
def outcomes_read_whole(plant: Plant) -> None:
    """The manager reads an outcome of any size completely. A worker that names a huge object as an outcome fills the
    memory of the manager (I8).
    """

    @plant.everywhere(read_outcome)
    async def read_whole(objects: Objects, name: str, patience: Patience) -> Outcome:
        return json_format.outcome_from_bytes(await patience(lambda: objects.get(name)), name)


@planted("AttributeError", "ExceptionGroup", "KeyError", "TypeError", "ValueError", weather="lies")
def events_that_cannot_be_read_end_the_manager(plant: Plant) -> None:
    """The manager assumes that all events are valid, because all workers have the same release. An event that cannot be
    read ends the manager (I8).
    """

    @plant.everywhere(messages.read_events_message)
    def read_events_message(body: str) -> Events:
        return messages._events_from_json(json.loads(body))


@planted("I8", weather="lies")
def commit_key_unchecked_by_workers(plant: Plant) -> None:
    """A worker runs the bundle of each message that it receives, and does not check the proof of the commit key. Any
    worker can make another worker run and commit work that no manager has sent (I8).
    """

    @plant.method(JobCache, "_cached")
    def _cached(self: JobCache, job: JobId, key: CommitKey) -> JobDef | None:
        return self._jobs.get(job)

    @plant.everywhere(object_keys.opens)
    def opens(key: CommitKey, job: JobDef) -> bool:
        return True


@planted("I8", weather="lies")
def held_without_a_proof(plant: Plant) -> None:
    """The manager treats a worker as the holder of each bundle that the worker names. If a worker names bundles of
    other workers, the manager does not search for these bundles, and deletes their messages with the worker's instance
    (I8).
    """

    @plant.method(WorkerRegistry, "_credible")
    def _believed(self: WorkerRegistry, beat: Beat, trusted: Collection[JobId]) -> tuple[HeldBundle, ...]:
        return beat.held


@planted("I5", "I7", weather="lies")
def claims_are_evidence(plant: Plant) -> None:
    """The manager believes the claims in a worker's heartbeats. A worker that always claims to be idle or busy blocks
    its pool (I7), or keeps its instance (I5).
    """

    @plant.method(WorkEvidence, "missing")
    def missing(self: WorkEvidence, pools: Mapping[str, str]) -> dict[str, str]:
        return {}
