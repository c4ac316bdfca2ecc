"""Webhook addresses of jobs, stored where workers may not read.

Invariant: an address often contains a secret, and workers may read `jobs/*`. So the spec object of
a job has a reference in place of each address, and the addresses are in one object below `grid/`. A
spec of release 0.1.0 has the addresses themselves, and is read as before.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from functools import partial

from batchlab.errors import NotFound
from batchlab.jobdef import JobDef
from batchlab.manager.live import Ports
from batchlab.protocol import naming, wire

_KIND = "webhook"
_REFERENCE = re.compile(r"grid:([0-9a-f]{64})#(\d{1,3})")


def hidden(job: JobDef) -> JobDef:
    """Return the job with a reference in place of each webhook address."""
    digest = hashlib.sha256(_content(job)).hexdigest()
    return replace(
        job,
        notify=tuple(
            replace(one, to=f"grid:{digest}#{number}")
            if one.kind == _KIND and not _REFERENCE.fullmatch(one.to)
            else one
            for number, one in enumerate(job.notify)
        ),
    )


async def store(ports: Ports, job: JobDef) -> None:
    """Store the addresses that `hidden` refers to. The key names the content, so a second manager
    writes the same object."""
    if hidden(job).notify != job.notify:
        content = _content(job)
        key = naming.addresses(job.id, hashlib.sha256(content).hexdigest())
        await ports.patience(partial(ports.objects.put, key, content))


async def restored(ports: Ports, job: JobDef) -> JobDef:
    """Return the job with its webhook addresses. A reference stays if its object does not exist:
    nothing is sent to it."""
    found = []
    for one in job.notify:
        if one.kind == _KIND and (reference := _REFERENCE.fullmatch(one.to)):
            key = naming.addresses(job.id, reference[1])
            try:
                to = wire.loads(await ports.patience(partial(ports.objects.get, key)))["to"]
                one = replace(one, to=str(to[int(reference[2])]))
            except (NotFound, LookupError):
                pass  # `address_problem` refuses the reference when it is called
        found.append(one)
    return replace(job, notify=tuple(found))


def _content(job: JobDef) -> bytes:
    return wire.to_bytes({"v": wire.VERSION, "job": job.id, "to": [one.to for one in job.notify]})
