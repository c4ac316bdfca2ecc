"""Logging of every process of a grid: readable text or JSON lines, with the same fields.

Invariant: a log line never contains a secret that was passed to `hide`, even if the text of the line comes from a
library. The fields of a log line are ids. A field of a log line never contains the input of a user's task.
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
"""Fields that a log line may have in addition to its text, in the order in which they are written."""

HIDDEN = "[hidden]"
MIN_SECRET_CHARACTERS = 6
"""Minimum length of a secret in characters.

A shorter secret is not hidden, because many log lines may contain its text and would become unreadable.
"""
MAX_JOBS = 1000
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|API_?KEY|ACCESS_KEY|OTLP.*HEADERS|^BATCHLAB_NOTIFY_", re.I
)

_about: ContextVar[Mapping[str, str | int]] = ContextVar("batchlab_log_fields")
_process: dict[str, str | int] = {}
_hidden: list[str] = []


# --- Fields --------------------------------------------------------------------------------------


def add_fields(**fields: str | int) -> None:
    """Add fields to all later log lines of the current asyncio task and of the asyncio tasks that it starts."""
    _about.set({**_about.get({}), **fields})


def fields_of(record: logging.LogRecord) -> dict[str, str | int]:
    """Return the fields of a log line: the fields of the process, of the asyncio task, and of the record's `extra`."""
    shared = {**_process, **_about.get({})}
    own = {name: record.__dict__[name] for name in FIELDS if name in record.__dict__}
    fields = {**shared, **own}
    return {name: fields[name] for name in FIELDS if fields.get(name) not in (None, "")}


# --- Secrets -------------------------------------------------------------------------------------


def hide(*secrets: str) -> None:
    """Replace the given secrets in all later log lines of the process."""
    for secret in secrets:
        if len(secret) >= MIN_SECRET_CHARACTERS and secret not in _hidden:
            _hidden.append(secret)
    # Replace longer secrets first, because a part of a secret that contains another secret would otherwise stay
    # visible.
    _hidden.sort(key=len, reverse=True)


def secrets_of(environment: Mapping[str, str]) -> Iterable[str]:
    """Return the values of the variables whose names denote a secret."""
    return (value for name, value in environment.items() if is_secret(name))


def is_secret(name: str) -> bool:
    """Return whether the name of a variable denotes a secret."""
    return _SECRET_NAME.search(name) is not None


def format_value(text: str) -> str:
    """Return `text` with each hidden secret replaced."""
    for secret in _hidden:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


# --- Formats -------------------------------------------------------------------------------------


class Text(logging.Formatter):
    """Formatter for people: time, level, logger, text, and fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        # Escape line breaks, so that text from a user cannot imitate other log lines. Escape control characters,
        # because they could change the output of a terminal.
        record.message = visible(record.message, layout="")
        line = super().formatMessage(record)
        # Omit the fields of the process, because these fields are the same in every log line.
        own = {n: v for n, v in fields_of(record).items() if n not in _process}
        return f"{line} [{' '.join(f'{n}={v}' for n, v in own.items())}]" if own else line

    def format(self, record: logging.LogRecord) -> str:
        return visible(format_value(super().format(record)))


class JsonLines(logging.Formatter):
    """Formatter for programs: one JSON object per line, with the time in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        doc: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": format_value(record.getMessage()),
        }
        # Replace secrets before JSON escapes characters of the secrets.
        for name, value in fields_of(record).items():
            doc[name] = value if isinstance(value, int) else format_value(str(value))
        if record.exc_info:
            doc["exception"] = format_value(self.formatException(record.exc_info))
        if record.stack_info:
            doc["stack"] = format_value(self.formatStack(record.stack_info))
        return visible_json(doc)


# --- Configuration of the process -----------------------------------------------------------------


def set_up(**process: str | int) -> None:
    """Log to stderr with the fields of this process, as configured by the environment.

    Raise UsageError if BATCHLAB_LOG or BATCHLAB_LOG_FORMAT has an unknown value.
    """
    level = os.environ.get(LEVEL_VARIABLE) or "INFO"
    if not isinstance(logging.getLevelName(level.upper()), int):
        raise UsageError(
            f"{LEVEL_VARIABLE} is {level!r}, which is not a level.", remedy="Write DEBUG, INFO, WARNING or ERROR."
        )
    formatter = JsonLines() if log_format() == "json" else Text()
    _process.clear()
    _process.update(process)
    hide(*secrets_of(os.environ))
    root = logging.getLogger()
    if root.handlers:
        return  # the program of the process has configured its own logging
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)
    # Replace Python's hook for uncaught exceptions, which would print secrets in a traceback.
    sys.excepthook = _log_unexpected


def _log_unexpected(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if not issubclass(kind, Exception):
        sys.__excepthook__(kind, error, where)
        return
    message = f"ended by {kind.__name__}: {error}"
    logging.getLogger("batchlab").critical(message, exc_info=(kind, error, where))


def add_process_fields(**process: str | int) -> None:
    """Add fields to all later log lines of the process, such as its worker's name."""
    _process.update(process)


def log_format() -> str:
    """Return the format in BATCHLAB_LOG_FORMAT, by default text. Raise UsageError if the value is unknown."""
    return _check_known(os.environ.get(FORMAT_VARIABLE) or "text", FORMAT_VARIABLE)


def _check_known(format_: str, where: str) -> str:
    if format_ not in FORMATS:
        raise UsageError(f"{where} is {format_!r}, which is not a format.", remedy="Write text or json.")
    return format_


def set_format(format_: str | None) -> None:
    """Set the log format of the process and of all processes that it starts. None does not change the format.

    Raise UsageError if the format is unknown.
    """
    if format_ is not None:
        _check_known(format_, "--log-format")
        os.environ[FORMAT_VARIABLE] = format_
    log_format()


def print_last_line(text: str) -> None:
    """Print the last log line of a process that cannot continue. The parent process reads the last log line."""
    if os.environ.get(FORMAT_VARIABLE) == "json":
        record = logging.LogRecord("batchlab", logging.ERROR, "", 0, "%s", (text,), None)
        text = JsonLines().format(record)
    print(format_value(text), file=sys.stderr, flush=True)  # noqa: T201 - stderr is the log of the process


def text_of(line: str) -> str:
    """Return the text of a log line, which is in the text format or a JSON object."""
    try:
        doc = json.loads(line)
    except ValueError:
        return line
    return str(doc["message"]) if isinstance(doc, dict) and "message" in doc else line


class Recent(logging.Handler):
    """Most recent warning or error of each job, which may explain why a job does not make progress.

    Only the `MAX_JOBS` jobs with the most recent warnings are stored.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        job = str(fields_of(record).get("job", ""))
        if job:
            self._last[job] = (record.created, format_value(record.getMessage()))
            self._last.move_to_end(job)
            while len(self._last) > MAX_JOBS:
                self._last.popitem(last=False)

    def last(self, job: str) -> tuple[float, str] | None:
        """Return the time (epoch seconds) and the text of a job's last warning, or None if the job does not have a
        warning.
        """
        return self._last.get(job)
