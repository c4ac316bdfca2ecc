"""GNU parallel, which starts one command for each task.

The command of a task without work is `echo`, and the command of other tasks is Python in its fastest mode.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import tasks
from benchmarks.peers.adapters.base import BaseAdapter, Call, OnFirst, ignore
from benchmarks.peers.workloads import Lost

_FOLDER = str(Path(tasks.__file__).parent)
_PROGRAM = f"import sys; sys.path.insert(0, {_FOLDER!r}); import tasks; tasks.main()"


class Adapter(BaseAdapter):
    """Adapter of GNU parallel, whose processes end with each job."""

    def start(self) -> None:
        self._command = ["parallel", "--will-cite", "--keep-order", "--jobs", str(self.config.workers)]
        if self.config.reliable:
            self._command += ["--retries", "5"]

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        if task == "noop":
            command, lines = ["echo $(({}*{}))"], [str(index) for (index,) in calls]
        else:
            # parallel quotes the input, and the shell reads the rest of the command.
            command = [f"{sys.executable} -I -S -c '{_PROGRAM.replace(chr(39), chr(34))}' {task} {{}}"]
            lines = [json.dumps(list(arguments)) for arguments in calls]
        process = subprocess.Popen(
            [*self._command, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PARALLEL_HOME": self.config.work},
            text=True,
            cwd=self.config.work,
        )
        assert process.stdin
        assert process.stdout
        threading.Thread(target=self._feed, args=(process.stdin, lines), daemon=True).start()
        results: list[Any] = []
        for line in process.stdout:
            if not results:
                on_first()
            results.append(json.loads(line))
        process.wait()
        if task == "logged_nap" and len(results) < len(calls):
            results = [index if index in results else Lost("no output") for index, *_ in calls]
        return results

    def _feed(self, pipe: Any, lines: Sequence[str]) -> None:
        pipe.write("\n".join(lines) + "\n")
        pipe.close()

    def stop(self) -> None:
        """Do nothing, because parallel ends with its job."""
