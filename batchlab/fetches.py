"""What has been fetched from a grid's bucket to a home: `fetched.jsonl`, a line for each fetch.

Invariant: lines are only ever added, each by one write, so fetches at the same time lose none.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

from batchlab.home import Home
from batchlab.whole import private

log = logging.getLogger(__name__)


def note(home: Home, job: str, read_bytes: int) -> None:
    """Remember that so many bytes were read for the job's results; a line that cannot be written is
    logged, since the results are there all the same."""
    line = json.dumps({"job": job, "read_bytes": read_bytes}) + "\n"
    try:
        with open(home.fetched_file, "a", encoding="utf-8", opener=private) as file:
            file.write(line)
    except OSError as error:
        log.warning("%s cannot be written: %s", home.fetched_file, error.strerror)


def total_bytes(home: Home, job: str) -> int:
    """What was read for a job's results so far, however often."""
    return sum(size for name, size in _lines(home) if name == job)


def last_of(home: Home, name: str) -> tuple[str, int] | None:
    """The job of that name whose results were fetched last, and what was read for them then."""
    mine = re.compile(rf"{re.escape(name)}-[0-9a-f]{{10}}")
    found = None
    for job, size in _lines(home):
        if mine.fullmatch(job):
            found = job, size
    return found


def _lines(home: Home) -> Iterator[tuple[str, int]]:
    try:
        with home.fetched_file.open(encoding="utf-8") as file:
            for line in file:
                try:
                    fields = json.loads(line)
                    yield str(fields["job"]), int(fields["read_bytes"])
                except (ValueError, KeyError, TypeError):
                    log.warning("%s has a line that is none: %r", home.fetched_file, line[:80])
    except FileNotFoundError:
        return
