"""Every error batchlab raises on purpose; an adapter translates at its edge and chains the cause.

BatchlabError
├── UsageError              exit 2: the command, the job file or the scenario is wrong
│   ├── JobFileError        names file, line and remedy
│   │   └── JobFileErrors   spec: all that is wrong with a file
│   └── NotAValue           protocol.values: a value that cannot travel
├── BackendError            exit 3: a port could not do its work
│   ├── Unreachable         the service behind the port does not answer
│   ├── Throttled           try again later (S3 503, SQS throttling)
│   ├── NotFound            no such object, queue or row
│   ├── AlreadyExists       a conditional create lost (HTTP 412)
│   ├── TooLarge            over a limit of the service
│   ├── TooNew              a later batchlab has written what this one is to read
│   ├── Malformed           bytes of a message or an object that cannot be read
│   ├── BrokenGridExecutor  grid: an executor that can run nothing any more
│   └── StackFailed         deploy: CloudFormation could not do it
├── JobFailed               exit 1: the job ended FAILED or CANCELLED
│   └── TaskFailed          one task's failure, with the remote traceback
│       └── WorkerDied      grid: an executor's call has ended its process
├── NotDelivered            notification: it did not reach its target
├── Refused                 exit 2: the manager declines (state, duplicate token, unknown id)
│   └── Fault               fleet.faults: what AWS's Auto Scaling answers with 400
└── SimulationError         sim.actors: a promise is broken, or the world is set up wrongly

Subclasses that only their own part of the code knows are not shown.
"""

from __future__ import annotations


class BatchlabError(Exception):
    """Base of every error batchlab raises on purpose; its text is one sentence for a person."""

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
    """A job file or scenario is wrong: `file` and `line` say where, `remedy` what to write."""

    def __init__(
        self, message: str, *, file: str = "", line: int | None = None, remedy: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = (
            f"{self.file}:{self.line}: " if self.line else (f"{self.file}: " if self.file else "")
        )
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
    """The service asks to come back later."""


class NotFound(BackendError):
    """No such object, queue or row."""


class AlreadyExists(BackendError):
    """A conditional put found the object there, or not the one it was to overwrite (HTTP 412)."""


class TooLarge(BackendError):
    """Over a hard limit of the service."""


class TooNew(BackendError):
    """A later batchlab has written it, and says or shows that this one does not know enough."""


class Malformed(BackendError):
    """A message or an object cannot be read: its bytes are not what its name or queue promises."""


class JobFailed(BatchlabError):
    """The job ended FAILED or CANCELLED."""

    exit_code = 1


class TaskFailed(JobFailed):
    """One task failed; `traceback` is the remote one, `reason` the sentence for a person."""

    def __init__(self, message: str, *, task: int = -1, traceback: str = "") -> None:
        super().__init__(message)
        self.task = task
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.message}\n\n{self.traceback}" if self.traceback else self.message
