"""How every process of a grid logs: readable text, or a JSON object per line, with the same fields.

Invariant: nothing that was hidden here (`hide`) leaves in a line, whoever wrote the text. Fields
are ids; no field ever holds what a user's task was given.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from batchlab.core.errors import UsageError
from batchlab.core.text import visible, visible_json

FORMAT_VARIABLE = "BATCHLAB_LOG_FORMAT"
LEVEL_VARIABLE = "BATCHLAB_LOG"
FORMATS = ("text", "json")

FIELDS = (
    "service",
    "manager",
    "worker",
    "instance",
    "pool",
    "job",
    "stage",
    "bundle",
    "attempt",
    "execution",
    "task",
    "trace",
)
"""What a line may tell beside its text, in the order in which it does."""

HIDDEN = "[hidden]"
LEAST_HIDDEN = 6
"""Characters: what is shorter is no secret, and hiding it would spoil every other line."""
KEPT_JOBS = 1000
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|API_?KEY|ACCESS_KEY|OTLP.*HEADERS|^BATCHLAB_NOTIFY_",
    re.I,
)

_about: ContextVar[Mapping[str, str | int]] = ContextVar("batchlab_log_fields")
_process: dict[str, str | int] = {}
_hidden: list[str] = []


# --- Fields --------------------------------------------------------------------------------------


def note(**fields: str | int) -> None:
    """From here on every line of this asyncio task, and of what it starts, has these fields."""
    _about.set({**_about.get({}), **fields})


def fields_of(record: logging.LogRecord) -> dict[str, str | int]:
    """What a line tells beside its text: of the process, of the task, and its own `extra`."""
    known = {**_process, **_about.get({})}
    own = {name: record.__dict__[name] for name in FIELDS if name in record.__dict__}
    found = {**known, **own}
    return {name: found[name] for name in FIELDS if found.get(name) not in (None, "")}


# --- Secrets -------------------------------------------------------------------------------------


def hide(*secrets: str) -> None:
    """Never show these in a line of this process."""
    for secret in secrets:
        if len(secret) >= LEAST_HIDDEN and secret not in _hidden:
            _hidden.append(secret)
    # A secret that holds another one goes first, or its rest would stay.
    _hidden.sort(key=len, reverse=True)


def secrets_of(environment: Mapping[str, str]) -> Iterable[str]:
    """The values in an environment whose names say that they are secrets."""
    return (value for name, value in environment.items() if is_secret(name))


def is_secret(name: str) -> bool:
    """Whether a variable's name says that it holds a secret."""
    return _SECRET_NAME.search(name) is not None


def shown(text: str) -> str:
    """`text` without what is hidden."""
    for secret in _hidden:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


# --- Formats -------------------------------------------------------------------------------------


class Text(logging.Formatter):
    """A line for a person: time, level, logger, text, and the ids of what it is about."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        # One line, or a text that somebody else has chosen could look like lines of ours; and no
        # control characters, or it could look like anything where the log is read.
        record.message = visible(record.message, layout="")
        line = super().formatMessage(record)
        # Whose file it is every line would repeat.
        own = {n: v for n, v in fields_of(record).items() if n not in _process}
        return f"{line} [{' '.join(f'{n}={v}' for n, v in own.items())}]" if own else line

    def format(self, record: logging.LogRecord) -> str:
        return visible(shown(super().format(record)))


class JsonLines(logging.Formatter):
    """A line for a program: one JSON object, its time in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        doc: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": shown(record.getMessage()),
        }
        # Before JSON has escaped anything in them.
        for name, value in fields_of(record).items():
            doc[name] = value if isinstance(value, int) else shown(str(value))
        if record.exc_info:
            doc["exception"] = shown(self.formatException(record.exc_info))
        if record.stack_info:
            doc["stack"] = shown(self.formatStack(record.stack_info))
        return visible_json(doc)


# --- The process ---------------------------------------------------------------------------------


def set_up(**process: str | int) -> None:
    """Log to stderr as the environment says, each line with the fields of this process.

    UsageError where BATCHLAB_LOG or BATCHLAB_LOG_FORMAT says what there is not.
    """
    level = os.environ.get(LEVEL_VARIABLE) or "INFO"
    if not isinstance(logging.getLevelName(level.upper()), int):
        raise UsageError(
            f"{LEVEL_VARIABLE} is {level!r}, which is no level.",
            remedy="Write DEBUG, INFO, WARNING or ERROR.",
        )
    formatter = JsonLines() if log_format() == "json" else Text()
    _process.clear()
    _process.update(process)
    hide(*secrets_of(os.environ))
    root = logging.getLogger()
    if root.handlers:
        return  # we are a guest in a process of somebody else's, who logs as they like
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)
    # Else a traceback would be printed as it is, with what is in it.
    sys.excepthook = _unexpected


def _unexpected(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    if not issubclass(kind, Exception):
        sys.__excepthook__(kind, error, where)
        return
    message = f"ended by {kind.__name__}: {error}"
    logging.getLogger("batchlab").critical(message, exc_info=(kind, error, where))


def is_from(**process: str | int) -> None:
    """What has become known of the process: its worker's name, its instance."""
    _process.update(process)


def log_format() -> str:
    """What BATCHLAB_LOG_FORMAT says, text unless it says anything; UsageError."""
    return _known(os.environ.get(FORMAT_VARIABLE) or "text", FORMAT_VARIABLE)


def _known(format_: str, where: str) -> str:
    if format_ not in FORMATS:
        raise UsageError(
            f"{where} is {format_!r}, which is no format.", remedy="Write text or json."
        )
    return format_


def choose(format_: str | None) -> None:
    """Have this format here and in every process that is started from here; None leaves it.
    UsageError for what there is not."""
    if format_ is not None:
        _known(format_, "--log-format")
        os.environ[FORMAT_VARIABLE] = format_
    log_format()


def last_words(text: str) -> None:
    """The last line of a process that cannot go on: whoever has started it reads that."""
    if os.environ.get(FORMAT_VARIABLE) == "json":
        record = logging.LogRecord("batchlab", logging.ERROR, "", 0, "%s", (text,), None)
        text = JsonLines().format(record)
    print(shown(text), file=sys.stderr, flush=True)  # noqa: T201 - its log


def text_of(line: str) -> str:
    """What a line of a log says, whichever format it is in."""
    try:
        doc = json.loads(line)
    except ValueError:
        return line
    return str(doc["message"]) if isinstance(doc, dict) and "message" in doc else line


class Recent(logging.Handler):
    """The last warning or error of each job, for who asks why it does not go on. Of so many jobs
    only; the one that was heard of longest ago is forgotten first."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        job = str(fields_of(record).get("job", ""))
        if job:
            self._last[job] = (record.created, shown(record.getMessage()))
            self._last.move_to_end(job)
            while len(self._last) > KEPT_JOBS:
                self._last.popitem(last=False)

    def of(self, job: str) -> tuple[float, str] | None:
        """When (seconds of the epoch) and what; None where there was nothing."""
        return self._last.get(job)
