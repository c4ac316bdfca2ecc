"""Errors that batchlab raises on purpose.

Adapters convert the errors of services to errors of batchlab, and set the original error as the cause.

The command line exits with code 2 for a UsageError, with 3 for a BackendError, and with 1 for a JobFailed. Other
modules define further subclasses, such as `core.protocol.values.NotAValue`, `core.notifications.NotDelivered`,
`client.BrokenGridExecutor`, `deploy.StackFailed`, and `fleet.Fault`.
"""

from __future__ import annotations


class BatchlabError(Exception):
    """Base of every error that batchlab raises on purpose. The text of the error is one sentence for a person."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class UsageError(BatchlabError):
    """Error for a wrong command line or a wrong argument."""

    exit_code = 2


class JobFileError(UsageError):
    """Error in a job file or scenario.

    `file` and `line` give the place of the error, and `remedy` is a sentence about its correction.
    """

    def __init__(self, message: str, *, file: str = "", line: int | None = None, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else (f"{self.file}: " if self.file else "")
        return where + super().__str__()


class Refused(BatchlabError):
    """Error for a well-formed request that the manager refuses, for example because of a wrong state or an unknown
    id.
    """

    exit_code = 2


class Unauthorized(Refused):
    """Error for a request whose token is missing, wrong, expired, or revoked."""


class Forbidden(Refused):
    """Error for a request that the role of its user does not permit."""


class BackendError(BatchlabError):
    """Error for a call of a port that failed."""

    exit_code = 3


class Unreachable(BackendError):
    """The service that a port calls does not respond."""


class Throttled(BackendError):
    """The service asks the client to try again later."""


class Denied(BackendError):
    """The credentials lack a permission, or are not valid."""


class NotFound(BackendError):
    """The requested object, queue, or row does not exist."""


class Deleted(NotFound):
    """A user has deleted the job."""


class AlreadyExists(BackendError):
    """The condition of a conditional put was not met: the object exists, or its ETag is not the expected ETag (HTTP
    412).
    """


class TooLarge(BackendError):
    """The request exceeds a hard limit of the service."""


class TooNew(BackendError):
    """The data was written by a later batchlab and cannot be read by the current version."""


class Malformed(BackendError):
    """A message or an object cannot be read, because its content does not match its queue or its key."""


_STATUSES: tuple[tuple[type[BatchlabError], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Refused, 409),
    (UsageError, 422),
    (BackendError, 503),
)


def status_of(error: BaseException) -> int:
    """Return the HTTP status of the answer to a request that failed with `error`."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


class JobFailed(BatchlabError):
    """Error for a job that ended FAILED or CANCELLED."""

    exit_code = 1


class TaskFailed(JobFailed):
    """Error for one failed task.

    `traceback` is the traceback from the worker, and the message is a sentence for a person.
    """

    def __init__(self, message: str, *, task: int = -1, traceback: str = "") -> None:
        super().__init__(message)
        self.task = task
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.message}\n\n{self.traceback}" if self.traceback else self.message
