"""Output of tasks and progress of a map, shown in the program that waits for the results.

Invariant: the output of a task is untrusted, so unprintable characters are escaped, and the shown size is limited.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TextIO

from batchlab.client.grid_link import Link
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.job_definition import task_name
from batchlab.core.model import Outcome
from batchlab.core.text import visible
from batchlab.worker import task_log

log = logging.getLogger(__name__)

MAX_SHOWN_BYTES = 256 * 1024
"""Maximum number of bytes of the output of a bundle that are shown. Only the beginning of longer output is shown."""


def show(link: Link, outcome: Outcome, stream: TextIO | None = None, *, progress: Progress | None = None) -> None:
    """Print the output of all tasks in an outcome. Each line begins with the name of its task.

    The line of `progress` is removed before the output is printed, and the next update shows it again.
    """
    try:
        _show(link, outcome, stream or sys.stdout, progress)
    except (OSError, ValueError) as error:
        # The stream is closed, or cannot encode a character. The results of the tasks do not depend on it.
        log.warning("the output of tasks cannot be shown: %s", error)


def _show(link: Link, outcome: Outcome, stream: TextIO | None, progress: Progress | None) -> None:
    spans = sorted((start, stop, task) for task, start, stop in outcome.log_spans)
    if not spans or stream is None:
        return
    if progress:
        progress.clear()
    first, last = spans[0][0], min(spans[-1][1], spans[0][0] + MAX_SHOWN_BYTES)
    try:
        data = link.run(link.patience(partial(link.objects.get_range, outcome.log, first, last)))
    except (BackendError, UsageError) as error:
        print(f"The output of bundle {outcome.bundle.id} cannot be read: {error}", file=stream, flush=True)
        return
    for start, stop, task in spans:
        name = task_name(outcome.bundle.stage, task)
        for line in task_log.text(data[start - first : stop - first]).splitlines():
            print(f"[{name}] {visible(line)}", file=stream)
    if last < spans[-1][1]:
        print(f"[...] Further output is in the log of job {outcome.bundle.job}.", file=stream)
    stream.flush()


class Progress:
    """Line of text on the standard error that counts the ended tasks of a map."""

    def __init__(self, name: str, count: int, stream: TextIO | None = None) -> None:
        self._name = name
        self._count = count
        self._stream = stream or sys.stderr
        self._ended = 0
        self._line = ""
        """The text that the line shows."""

    def update(self, ended: int) -> None:
        """Show the number of ended tasks, if the line does not show it."""
        self._ended = ended
        line = f"{self._name}: {ended} of {self._count} tasks"
        if line != self._line:
            self._line = line
            self._stream.write(f"\r{line}")
            self._stream.flush()

    def clear(self) -> None:
        """Remove the line, so that other output can be printed in its place."""
        if self._line:
            self._stream.write(f"\r{' ' * len(self._line)}\r")
            self._stream.flush()
            self._line = ""

    def close(self) -> None:
        """Show and end the line."""
        self.update(self._ended)
        self._stream.write("\n")
        self._stream.flush()
