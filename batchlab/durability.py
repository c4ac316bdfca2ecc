"""The rule for which writes of a local grid wait for the disk.

A power cut on `local` ends the client, the manager, and the workers together. A job outlives them,
so its writes wait for the disk. The result of a single call has a reader only while its client
runs, so the writes of a single call do not wait unless the user asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum

from batchlab.errors import UsageError

VARIABLE = "BATCHLAB_SYNC"

_single_call: ContextVar[bool] = ContextVar("single_call", default=False)
_repeated: ContextVar[bool] = ContextVar("repeated", default=False)


class Sync(StrEnum):
    """The writes that wait for the disk."""

    ALL = "all"
    """Writes of jobs and of single calls."""
    JOBS = "jobs"
    """Writes of jobs."""
    NONE = "none"

    @property
    def waits(self) -> bool:
        """Whether a write in the current context waits for the disk."""
        if _repeated.get():
            return False
        return self is Sync.ALL or (self is Sync.JOBS and not _single_call.get())


def read_sync(environ: Mapping[str, str] = os.environ) -> Sync:
    """Return the choice in BATCHLAB_SYNC, `jobs` by default; UsageError for an unknown value."""
    value = environ.get(VARIABLE) or Sync.JOBS
    try:
        return Sync(value)
    except ValueError as error:
        raise UsageError(
            f"{VARIABLE} is {value!r}, which is not a choice.",
            remedy=f"Use one of {', '.join(Sync)}.",
        ) from error


@contextmanager
def of_single_call(is_call: bool) -> Iterator[None]:
    """Mark the writes inside, also of tasks that start inside, as those of a single call."""
    with _set(_single_call, is_call):
        yield


@contextmanager
def repeated() -> Iterator[None]:
    """Mark the writes inside as writes that the next manager repeats if a power cut undoes them.
    They wait for no disk."""
    with _set(_repeated, True):
        yield


@contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
