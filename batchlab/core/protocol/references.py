"""The objects that references in a job's items and results may name.

Invariant: manager, worker and client read an object for a reference only after a check here. An
outcome is written by a worker, and whoever reads it may have more rights than the worker has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, Json
from batchlab.core.protocol import values


class ForeignReference(UsageError):
    """A reference names an object that its job may not name, or another object than it says."""


class Own:
    """The objects of one job. A job of the Python API may also name files and raw data of other
    jobs: its user passes them on as File objects."""

    def __init__(self, job: JobId, inputs: Iterable[str] = (), *, is_python: bool) -> None:
        self._job = job
        named = list(inputs)
        self._keys = frozenset(one for one in named if not one.endswith("/"))
        plans = f"jobs/{job}/"
        folders = [one for one in named if one.endswith("/")]
        others = ("files/", "raw/") if is_python else (f"files/{job}/", f"raw/{job}/")
        self._prefixes = (*others, plans, *folders)
        self.is_python = is_python

    @classmethod
    def of(cls, job: JobDef) -> Own:
        """Return the objects of a job as its definition names them."""
        keys = job.input.keys if job.input else ()
        return cls(job.id, keys, is_python=is_python(job))

    def key(self, reference: Json) -> str:
        """Return the key that a reference names; ForeignReference if the job may not name it."""
        name = reference.get(values.kind(reference) or "")
        if not isinstance(name, str) or not self._has(name):
            raise ForeignReference(
                f"A reference names {str(name)[:200]!r}, which is not an object of job "
                f"{self._job}.",
                remedy="No task writes such a reference by itself; see who may write the bucket.",
            )
        return name

    def value(self, reference: Json, data: bytes) -> Json:
        """Return the encoded value in the object of a `$value` reference. ForeignReference if it
        is not the object that the reference was made for."""
        said = reference.get("sha256")
        if said is not None and hashlib.sha256(data).hexdigest() != said:
            raise ForeignReference(
                f"The object {reference['$value']!r} is not the one that a task stored there.",
                remedy="Somebody has written over it; run the job again.",
            )
        return json.loads(data)

    def _has(self, key: str) -> bool:
        if key in self._keys:
            return True
        return key.startswith(self._prefixes) and not any(
            part in ("", ".", "..") for part in key.split("/")
        )


def is_python(job: JobDef) -> bool:
    """Whether the job comes from the Python API, so that its items and results may be pickled."""
    return any((stage.handler or "").startswith("pickle:") for stage in job.stages)
