"""Bugs at the trust boundary, shown by workers that lie.

Each docstring says what somebody would have written, and then which promise that breaks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from batchlab.commit import read_outcome
from batchlab.errors import Malformed, NotFound, TooNew
from batchlab.manager.collector import Collector
from batchlab.manager.instances import Instances
from batchlab.manager.trust import Trust
from batchlab.model import Completion, JobId
from batchlab.protocol import messages, settle
from batchlab.protocol.messages import Beat
from tests.sim.mutants.kit import Plant, planted


@planted("I8", weather="lies")
def heartbeats_without_a_key(plant: Plant) -> None:
    """A heartbeat counts for the instance that it names. Any worker can report that another one
    leaves, or what it holds (I8)."""

    @plant.method(Instances, "admits")
    def admits(self: Instances, beat: Beat, trusted: Collection[JobId] = ()) -> bool:
        return True


@planted("I1", "I2", "I3", "I7", "I8", weather="lies")
def completions_without_a_proof(plant: Plant) -> None:
    """An event counts for every job that it names. Any worker can end the tasks of any job (I2)."""

    @plant.method(Trust, "_proven")
    async def _proven(
        self: Trust, jobs: set[JobId], text: str, proofs: Mapping[str, str]
    ) -> set[JobId]:
        return jobs


@planted("I8", weather="lies")
def keys_of_events_unchecked(plant: Plant) -> None:
    """A manager reads each object that an event names. Any worker can make it read any object of
    the bucket (I8)."""

    @plant.everywhere(messages._key_from_json)
    def _key_from_json(value: Any) -> str:
        return str(value)

    @plant.method(Trust, "_is_genuine")
    async def _is_genuine(self: Trust, name: str, trusted: set[JobId], proven: set[JobId]) -> bool:
        return True

    @plant.method(Collector, "_fetched")
    async def _fetched(self: Collector, name: str) -> list[Completion]:
        try:
            outcome = await read_outcome(self._ports.objects, name, self._ports.patience)
        except (Malformed, NotFound, TooNew):
            return []
        return [settle.completion(outcome)]
