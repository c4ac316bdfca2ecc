"""The schedules in the bucket, as the leader keeps them in memory.

Invariant: what is in memory has been in the bucket, and is put back only over what was read: of two
who decide on the same due time one is refused, and reads what the other has decided.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from dataclasses import replace
from functools import partial

from batchlab.core.errors import AlreadyExists, BackendError, NotFound, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.schedules import model
from batchlab.core.schedules.model import Schedule
from batchlab.manager.state import Ports

log = logging.getLogger(__name__)

_TEMPLATES_KEPT = 200


class Shelf:
    """Schedules by name, the removed ones among them, and the jobs that they run."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self.schedules: dict[str, Schedule] = {}
        self.unreadable: set[str] = set()
        """Those whose format or time zone we do not know; they are left alone."""
        self._etags: dict[str, str] = {}
        self._templates: dict[str, JobDef] = {}

    async def load(self) -> None:
        """Read all of them."""
        self.schedules, self._etags, self.unreadable = {}, {}, set()
        async for page in self._ports.objects.list(object_keys.SCHEDULES):
            for info in page:
                await self.read(info.key.removeprefix(object_keys.SCHEDULES).removesuffix(".json"))

    async def read(self, name: str) -> None:
        """Read one of them anew."""
        objects, key = self._ports.objects, object_keys.schedule(name)
        try:
            found = await self._ports.patience(partial(objects.get_if_changed, key, None))
        except NotFound:
            found = None
        self.schedules.pop(name, None)
        self._etags.pop(name, None)
        self.unreadable.discard(name)
        if found:
            try:
                schedule = model.from_bytes(found[0])
                schedule.next_s()
                self.schedules[name] = schedule
                self._etags[name] = found[1]
            except (BackendError, UsageError, KeyError, TypeError, ValueError) as error:
                # One that a later release has written, or nobody, or whose time zone is not known
                # here, must not hold up the others.
                log.error("schedule %s cannot be read and is left alone: %r", name, error)
                self.unreadable.add(name)

    async def put(self, schedule: Schedule) -> bool:
        """Write the schedule over what was read; False where it is another one by now, which has
        then been read."""
        name, objects = schedule.name, self._ports.objects
        etag, before = self._etags.get(name), self.schedules.get(name)
        schedule = replace(schedule, number=before.number + 1 if before else 0)
        put = partial(
            objects.put,
            object_keys.schedule(name),
            model.to_bytes(schedule),
            if_absent=etag is None,
            if_match=etag,
        )
        try:
            self._etags[name] = await self._ports.patience(put)
        except (AlreadyExists, NotFound):
            # Or it is ours, whose answer was lost.
            await self.read(name)
            return self.schedules.get(name) == schedule
        self.schedules[name] = schedule
        return True

    async def keep_template(self, job: JobDef) -> str:
        """Put a schedule's job down; its key, which is the same for the same job."""
        data = json_format.to_bytes(json_format.job_to_json(job))
        key = object_keys.template(hashlib.sha256(data).hexdigest())
        with suppress(AlreadyExists):
            put = partial(self._ports.objects.put, key, data, if_absent=True)
            await self._ports.patience(put)
        return key

    async def template(self, key: str) -> JobDef:
        """The job of that key; NotFound where somebody has removed it."""
        if key not in self._templates:
            data = await self._ports.patience(partial(self._ports.objects.get, key))
            while len(self._templates) >= _TEMPLATES_KEPT:
                del self._templates[next(iter(self._templates))]
            self._templates[key] = json_format.job_from_json(json_format.loads(data))
        return self._templates[key]

    def known_template(self, key: str) -> JobDef | None:
        """The same where it is at hand."""
        return self._templates.get(key)

    async def is_empty(self, job: JobDef) -> bool:
        """Whether the job's input is nothing but prefixes, with no object below any of them."""
        keys = job.input.keys if job.input else ()
        if not keys or not all(key.endswith("/") for key in keys):
            return False
        for key in keys:
            async for page in self._ports.objects.list(key):
                # The S3 console marks a folder by an empty object of that name.
                if any(not info.key.endswith("/") for info in page):
                    return False
        return True
