"""Check of the objects to which references in a job's items and results refer.

Invariant: the manager, workers, and clients read a referenced object only after this check. A
worker writes an outcome, and a reader of the outcome may have more rights than the worker.
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
    """A reference names an object that its job may not use, or the object's content has changed."""


class Own:
    """Objects that one job may use.

    A job of the Python API may also use files and raw data of other jobs, because its user passes
    them on as File objects.
    """

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
        """Return the objects that a job may use according to its definition."""
        keys = job.input.keys if job.input else ()
        return cls(job.id, keys, is_python=is_python(job))

    def key(self, reference: Json) -> str:
        """Return the key in a reference. Raise ForeignReference if the job may not use it."""
        name = reference.get(values.kind(reference) or "")
        if not isinstance(name, str) or not self._has(name):
            raise ForeignReference(
                f"A reference names {str(name)[:200]!r}, which is not an object of job "
                f"{self._job}.",
                remedy="No task writes such a reference by itself; see who may write the bucket.",
            )
        return name

    def value(self, reference: Json, data: bytes) -> Json:
        """Return the encoded value in the object of a `$value` reference.

        Raise ForeignReference if the object has another content than the reference was made for.
        """
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
    """Return whether the job comes from the Python API. Its items and results may be pickled."""
    return any((stage.handler or "").startswith("pickle:") for stage in job.stages)
