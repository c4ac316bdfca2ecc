"""Planted bugs of the audit log.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.audit_log import AuditLog, Entry
from tests.sim.mutants.kit import Plant, planted


@planted("audit", weather="audited")
def change_before_its_record(plant: Plant) -> None:
    """A manager makes a change while the record of the change still waits for its write. A change of a manager that is
    killed has no record (audit).
    """

    @plant.method(AuditLog, "store")
    async def store(self: AuditLog, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._note(entry)


@planted("audit", weather="audited")
def outcome_not_recorded(plant: Plant) -> None:
    """A manager does not store the outcome of a change, so the log does not show whether the change was made
    (audit).
    """

    @plant.method(AuditLog, "correct")
    def correct(self: AuditLog, stored: Entry, outcome: str, reason: str = "") -> None:
        pass


@planted("audit", weather="audited")
def record_overwritten(plant: Plant) -> None:
    """A manager writes the outcome of a change over the object with its record. The object loses the records of other
    changes (audit).
    """

    @plant.method(AuditLog, "_put")
    async def _put(self: AuditLog, entries: Sequence[Entry]) -> None:
        documents = [json_format.fields(entry.record) for entry in entries]
        data = json_format.to_bytes({"v": json_format.VERSION, "records": documents})
        name = entries[0].corrects or entries[0].name
        await self._patience(lambda: self._objects.put(f"{object_keys.AUDIT}{name}", data))
        for entry in entries:
            entry.is_stored = True
