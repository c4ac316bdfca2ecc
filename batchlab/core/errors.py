"""Errors that batchlab raises on purpose. Adapters translate other errors and chain the cause.

A subclass of UsageError is exit code 2, of BackendError 3, and of JobFailed 1. Other modules define further subclasses,
such as `core.protocol.values.NotAValue`, `core.notifications.NotDelivered`, `client.BrokenGridExecutor`,
`deploy.StackFailed`, and `fleet.Fault`.
"""

from __future__ import annotations


class BatchlabError(Exception):
    """Base of every error that batchlab raises on purpose. Its text is one sentence for a person."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class UsageError(BatchlabError):
    """The command line or an argument is wrong."""

    exit_code = 2


class JobFileError(UsageError):
    """A job file or scenario is wrong. `file` and `line` give the place, and `remedy` the correction."""

    def __init__(self, message: str, *, file: str = "", line: int | None = None, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else (f"{self.file}: " if self.file else "")
        return where + super().__str__()


class Refused(BatchlabError):
    """The manager declines a request that is well formed (wrong state, unknown id)."""

    exit_code = 2


class BackendError(BatchlabError):
    """A port could not do its work."""

    exit_code = 3


class Unreachable(BackendError):
    """The service behind a port does not answer."""


class Throttled(BackendError):
    """The service asks the client to try again later."""


class NotFound(BackendError):
    """The object, queue, or row does not exist."""


class AlreadyExists(BackendError):
    """A conditional put found an existing object, or an object other than the expected one (HTTP 412)."""


class TooLarge(BackendError):
    """The request exceeds a hard limit of the service."""


class TooNew(BackendError):
    """A later batchlab wrote the data, and this version cannot read it."""


class Malformed(BackendError):
    """A message or an object cannot be read. Its bytes do not match its name or its queue."""


class JobFailed(BatchlabError):
    """The job ended FAILED or CANCELLED."""

    exit_code = 1


class TaskFailed(JobFailed):
    """One task failed. `traceback` is from the worker, and the message is a sentence for a person."""

    def __init__(self, message: str, *, task: int = -1, traceback: str = "") -> None:
        super().__init__(message)
        self.task = task
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.message}\n\n{self.traceback}" if self.traceback else self.message
