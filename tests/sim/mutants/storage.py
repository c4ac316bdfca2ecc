"""Planted bugs in the handling of damaged objects, found by a store that damages objects.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from batchlab.core.ports import ChangeResult, Cut, JobRecord
from batchlab.manager import ledger_rebuild
from batchlab.manager.adoption import Adoption
from batchlab.manager.ledger_rebuild import RebuildResult, restore
from batchlab.manager.quarantine import UnreadableObject
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.retry_rounds import cuts_of_round
from batchlab.manager.state import LiveJob, Ports, pages_of_jobs
from tests.sim.mutants.kit import Plant, planted


@planted("I7", "UnreadableObject", "I3", weather="storage")
def rebuild_stops_at_the_first_bad_object(plant: Plant) -> None:
    """A rebuild of the ledger raises an error at an object that it cannot read. The jobs after the unreadable object
    are not restored (I3), and the rebuild never ends (I7).
    """

    @plant.everywhere(ledger_rebuild.rebuild)
    async def rebuild(ports: Ports) -> RebuildResult:
        known = await ledger_rebuild._in_ledger(ports)
        found = await ledger_rebuild._in_bucket(ports)
        if gone := sorted(known - found):
            await ports.ledger.forget(gone)
        rebuilt = RebuildResult(0)
        for job in sorted(found):
            rebuilt.unreadable |= await restore(ports, job)
            rebuilt.jobs += 1
        return rebuilt


@planted("I7", weather="storage")
def definition_taken_for_granted(plant: Plant) -> None:
    """The reconciler sends a silent bundle again without checking that the definition of its job exists. Workers drop
    the messages of a job without a definition, so the job never ends (I7).
    """

    @plant.method(Reconciler, "_is_defined")
    async def _is_defined(self: Reconciler, live: LiveJob) -> bool:
        return True


@planted("I7", "Crashed", weather="storage")
def adoption_ends_at_a_lost_retry(plant: Plant) -> None:
    """A leader that takes over a job reads the retry object of the job, and ends with an error if the object is
    missing. Each later leader also ends with this error, so all jobs of the grid stop (I7).
    """

    @plant.method(Adoption, "_cuts")
    async def _cuts(self: Adoption, record: JobRecord) -> tuple[tuple[Cut, ...], UnreadableObject | None]:
        return await cuts_of_round(self._ports, record), None

    @plant.method(Adoption, "adopt_active")
    async def adopt_active(self: Adoption) -> None:
        self._searched_s = self._ports.clock.monotonic_s()
        async for page in pages_of_jobs(self._ports, active=True):
            for rows in page:
                if rows.id not in self._lives:
                    await self.adopt(ChangeResult(rows, is_new=False))
