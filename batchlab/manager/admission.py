"""Validation of a job before the grid accepts the job, and storage of the job's webhook addresses.

Invariants: an admitted job names only pools that exist and have enough slots for its tasks. A webhook address often
contains a secret, and workers may read `jobs/*`. The job's spec object contains a reference in place of each webhook
address, and an object below `grid/` contains the addresses. A spec object of release 0.1.0 contains the webhook
addresses themselves, and stays readable.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from batchlab.core import fair_share, notifications
from batchlab.core.atomic_write import check_key
from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import MAX_DEPENDENCIES, JobDef, StageDef
from batchlab.core.model import Pool
from batchlab.core.notifications import NotificationSettings
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import MAX_S, handler
from batchlab.core.text import count
from batchlab.manager.state import Ports

MAX_NAME_LENGTH = 200
MAX_TAG_LENGTH = 1000
MAX_NUMBER = 2**31 - 1
"""Upper limit of counts and priorities. The ledger's columns cannot store a larger number."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def is_name(text: str) -> bool:
    """Return whether the text is a valid name of a job or a stage. A valid name can be part of an object key."""
    return _NAME.fullmatch(text) is not None


def admit(
    job: JobDef,
    pools: Mapping[str, int],
    directory: NotificationSettings | None = None,
    gpus: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Raise UsageError if a grid with `pools` (slots by name) and `gpus` (by the pool's name) can never run the job, or
    if `directory` refuses a notification target of the job."""
    if not job.stages:
        raise UsageError(f"Job {job.name} does not have stages.", remedy="Give it at least one stage.")
    for text in (job.id, *(stage.name for stage in job.stages)):
        if not is_name(text):
            raise UsageError(
                f"{text!r} cannot name a job or a stage.",
                remedy="Use letters, digits, - and _, beginning with a letter or digit.",
            )
    _admit_texts(job)
    _admit_share(job)
    _admit_numbers(job)
    _admit_dependencies(job)
    for key in job.input.keys if job.input else ():
        _admit_key(key)
    earlier: set[str] = set()
    for stage in job.stages:
        _admit_stage(stage, earlier)
        admit_to_pool(stage, pools, gpus)
        earlier.add(stage.name)
    if len(job.notify) > notifications.MAX_TARGETS:
        raise UsageError(
            f"Job {job.name} notifies {len(job.notify)} targets.", remedy=f"It may name {notifications.MAX_TARGETS}."
        )
    for notify_def in job.notify:
        if wrong := notifications.problem(notify_def):
            raise UsageError(wrong, remedy="Mend `notify` of the job.")
        if directory and (wrong := directory.refusal(notify_def)):
            raise UsageError(wrong, remedy="Ask who runs the grid, or leave it out of `notify`.")


def _admit_texts(job: JobDef) -> None:
    """Raise UsageError if the job's name or a tag is too long or has control characters, which could disguise the text
    in listings and logs."""
    for what, text, most in (
        ("The job's name", job.name, MAX_NAME_LENGTH),
        *(("A tag", text, MAX_TAG_LENGTH) for pair in job.tags for text in pair),
    ):
        if not text.isprintable():
            raise UsageError(
                f"{what} holds characters that cannot be printed: {text[:200]!r}.",
                remedy="Leave out line breaks, escape sequences and the like.",
            )
        if len(text) > most:
            raise UsageError(f"{what} has {len(text):,} characters.", remedy=f"Write {most} at the most.")


def _admit_share(job: JobDef) -> None:
    if job.share:
        fair_share.check_identifier(job.share)


def _admit_numbers(job: JobDef) -> None:
    for what, number, least, most in _numbers(job):
        if number is not None and not least <= number <= most:  # the comparison also rejects NaN
            raise UsageError(f"{what} is {number!r:.40}.", remedy=f"Write {least:g} to {most:g}, or leave it out.")


def _admit_dependencies(job: JobDef) -> None:
    if len(job.after) > MAX_DEPENDENCIES:
        raise UsageError(
            f"Job {job.name} depends on {len(job.after)} jobs.", remedy=f"It may depend on {MAX_DEPENDENCIES}."
        )
    jobs = [dependency.job for dependency in job.after]
    for other in jobs:
        if not is_name(other) or other == job.id:
            raise UsageError(f"{other!r:.200} cannot be a dependency of job {job.id}.", remedy="Name an earlier job.")
        if jobs.count(other) > 1:
            raise UsageError(f"Job {job.name} names job {other} twice as a dependency.", remedy="Name it once.")


def _numbers(job: JobDef) -> Iterator[tuple[str, float | None, float, float]]:
    yield "The time of submission", job.submitted_s, 0, MAX_S
    yield "The time of the start", job.start_at_s, 0, MAX_S
    yield "`max_failures`", job.max_failures, 0, MAX_NUMBER
    yield "The priority", job.priority, -MAX_NUMBER, MAX_NUMBER
    yield "`items`", job.items, 0, MAX_NUMBER
    yield "`max_cost_usd`", job.max_cost_usd, 0, MAX_S
    if job.input:
        yield "The size of a part of the input", job.input.size, 1, 2**53
    for stage in job.stages:
        of = f"of stage {stage.name}"
        yield f"The timeout {of}", stage.timeout_s, 0, MAX_S
        yield f"The memory {of}", stage.memory_bytes, 0, 2**53
        yield f"The bundle size {of}", stage.bundle, 1, MAX_NUMBER
        for what, number, most in stage.retry.limits():
            yield f"The {what} {of}", number, 0, most


def _admit_key(key: str) -> None:
    """Raise UsageError for an input key that no object can have, and for a key of the manager's objects. A task must
    not read the manager's objects."""
    try:
        check_key(key.removesuffix("/"))
    except ValueError as error:
        raise UsageError(f"The input names no object: {error}.", remedy="Correct the key.") from error
    if key.startswith(object_keys.GRID):
        raise UsageError(f"The input names {key!r}, which is the grid's own.", remedy="Let the job read its own data.")


def _admit_stage(stage: StageDef, earlier: set[str]) -> None:
    # The stage "Map" conflicts with the stage "map", because stages are folders and some file systems ignore case.
    if stage.name.casefold() in {name.casefold() for name in earlier}:
        raise UsageError(
            f"Two stages are named {stage.name!r}.", remedy="Give each a name of its own, upper and lower case apart."
        )
    if stage.name.casefold() in object_keys.NO_STAGES:
        raise UsageError(
            f"{stage.name!r} cannot name a stage: the grid stores something of the job there.",
            remedy="Give it another name.",
        )
    for upstream in stage.after:
        if upstream not in earlier:
            raise UsageError(
                f"Stage {stage.name} comes after {upstream!r}, which is not an earlier stage.",
                remedy="List the stages in an order in which they can run.",
            )
    if (stage.handler is None) != bool(stage.command):
        raise UsageError(
            f"Stage {stage.name} must have either a handler or a command.", remedy="Give it exactly one of the two."
        )
    if stage.handler is not None:
        try:
            handler(stage.handler)
        except ValueError as error:
            raise UsageError(
                f"Stage {stage.name} names the handler {stage.handler[:80]!r}: {error}.",
                remedy="Write module:function.",
            ) from None


def admit_to_pool(stage: StageDef, pools: Mapping[str, int], gpus: Mapping[str, int] = MappingProxyType({})) -> None:
    """Raise UsageError unless the instances of the stage's pool can run the stage's tasks.

    `pools` maps the names of the pools to the slots of their instances, and `gpus` to the GPUs of their instances.
    """
    if stage.pool not in pools:
        raise UsageError(
            f"Stage {stage.name} names the pool {stage.pool!r}, which this grid does not have.",
            remedy=f"Its pools are {', '.join(sorted(pools))}.",
        )
    if not 1 <= stage.slots <= pools[stage.pool]:
        raise UsageError(
            f"Stage {stage.name} asks for {stage.slots} slots per task, but an instance of pool "
            f"{stage.pool!r} has {pools[stage.pool]}.",
            remedy="Ask for as many at the most, or name a pool with larger instances.",
        )
    if not 0 <= stage.gpus <= gpus.get(stage.pool, 0):
        enough = sorted(pool for pool, number in gpus.items() if number >= stage.gpus > 0)
        raise UsageError(
            f"Stage {stage.name} asks for {count(stage.gpus, 'GPU')} per task, but an instance of pool {stage.pool!r} "
            f"has {gpus.get(stage.pool, 0)}.",
            remedy=f"Name a pool with enough GPUs: {', '.join(enough)}."
            if enough
            else "Start a grid whose pool has the GPUs, such as `batchlab grid up --pool default:0-1x8,gpus=1`.",
        )


_KIND = "webhook"
_REFERENCE = re.compile(r"grid:([0-9a-f]{64})#(\d{1,3})")


def hide_addresses(job: JobDef) -> JobDef:
    """Return the job with a reference in place of each webhook address."""
    digest = hashlib.sha256(_address_document(job)).hexdigest()
    return replace(
        job,
        notify=tuple(
            replace(notify_def, to=f"grid:{digest}#{number}")
            if notify_def.kind == _KIND and not _REFERENCE.fullmatch(notify_def.to)
            else notify_def
            for number, notify_def in enumerate(job.notify)
        ),
    )


async def store_addresses(ports: Ports, job: JobDef) -> None:
    """Store the webhook addresses that `hide_addresses` removed. The object key is a hash of the addresses, so two
    managers write the same object."""
    if hide_addresses(job).notify != job.notify:
        content = _address_document(job)
        key = object_keys.addresses(job.id, hashlib.sha256(content).hexdigest())
        await ports.patience(partial(ports.objects.put, key, content))


async def restore_addresses(ports: Ports, job: JobDef) -> JobDef:
    """Return the job with its webhook addresses in place of the references. If the object of a reference is missing,
    the reference stays in the job, and the manager does not notify the target."""
    targets = []
    for notify_def in job.notify:
        if notify_def.kind == _KIND and (reference := _REFERENCE.fullmatch(notify_def.to)):
            key = object_keys.addresses(job.id, reference[1])
            try:
                to = json_format.loads(await ports.patience(partial(ports.objects.get, key)))["to"]
                notify_def = replace(notify_def, to=str(to[int(reference[2])]))
            except (NotFound, LookupError):
                pass  # `address_problem` later refuses the unresolved reference
        targets.append(notify_def)
    return replace(job, notify=tuple(targets))


def _address_document(job: JobDef) -> bytes:
    return json_format.to_bytes(
        {"v": json_format.VERSION, "job": job.id, "to": [notify_def.to for notify_def in job.notify]}
    )


def check_shared_gpus(pools: Sequence[Pool]) -> None:
    """Raise UsageError if several instances of one machine would use the same GPUs."""
    with_gpus = [pool for pool in pools if pool.gpus]
    if sum(pool.max_size for pool in with_gpus) > 1:
        total = max(pool.gpus for pool in with_gpus)
        raise UsageError(
            "The instances of the grid share one machine, so several instances would use the same GPUs.",
            remedy=f"Use one instance with all GPUs, such as --pool {with_gpus[0].name}:0-1x8,gpus={total}.",
        )
