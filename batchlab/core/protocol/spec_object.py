"""Object `jobs/<job>/spec.json`: the definition of a job, and an optional opening.

Invariant: one PUT commits the whole content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import Malformed
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Json
from batchlab.core.ports import Cut
from batchlab.core.protocol import json_format
from batchlab.core.protocol.field_checks import UNREADABLE, listed


@dataclass(frozen=True, slots=True)
class Opening:
    """Additional content of the object with a job's definition, committed with the same PUT.

    It has the encoded items of the root stage, if there are few, and that stage's first cut.
    """

    items: Sequence[Json]
    cut: Cut | None = None


def to_bytes(job: JobDef, opening: Opening | None = None) -> bytes:
    """Return the content of a job's spec object."""
    doc = json_format.job_to_json(job)
    if opening:
        cut = json_format.cut_to_json(opening.cut) if opening.cut else None
        doc["opening"] = {"items": opening.items, "cut": cut}
    return json_format.to_bytes(doc)


def from_json(doc: dict[str, Any]) -> tuple[JobDef, Opening | None]:
    """Return the job and the opening in a spec object.

    Raise TooNew if a later batchlab wrote it, and Malformed if it cannot be read.
    """
    return json_format.job_from_json(doc), opening_in(doc)


def opening_in(doc: dict[str, Any]) -> Opening | None:
    """Return the opening in a spec object, or None if it does not have one.

    Raise Malformed if the opening cannot be read.
    """
    found = doc.get("opening")
    if found is None:
        return None
    try:
        items = listed(found["items"])
        cut = json_format.cut_from_json(found["cut"]) if found["cut"] else None
        if cut and (cut.job, cut.round, cut.seq) != (doc["id"], 0, 0):
            raise ValueError("its cut is not the first cut of the job")
        return Opening(items, cut)
    except UNREADABLE as error:
        raise Malformed(f"A job's opening cannot be read: {json_format.brief(error)}.") from error
