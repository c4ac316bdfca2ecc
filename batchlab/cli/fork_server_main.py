"""The process that copies itself for each worker of a grid whose instances are processes.

Invariant: one thread, and nothing opened but what it was started with: a copy finds itself as a
process finds itself that has just begun. `batchlab.adapters.local.fork_server` asks, and says how.

    python -P -m batchlab.cli.fork_server_main --home HOME --backend BACKEND DESCRIPTOR
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchlab.adapters.local.fork_server import MOST_BYTES
from batchlab.adapters.local.processes import exit_code
from batchlab.cli.services import serve
from batchlab.runtime import factory
from batchlab.server import worker_service  # noqa: F401 - what copies would import
from batchlab.worker import environment  # noqa: F401

MOST_DESCRIPTORS = 2
NAME = "batchlab-worker"
"""Of a copy, for who looks at processes: their command lines are all the same."""


def main() -> None:
    """Started by adapters.nursery.Nursery only."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, help="whose it is, for who looks at processes")
    parser.add_argument("--backend")
    parser.add_argument("descriptor", type=int)
    asked = parser.parse_args()
    factory.load(asked.backend).import_for_worker()
    # Copies share what is there now for as long as nobody writes to it.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=asked.descriptor) as here:
        arguments = copied(here)
    if arguments is not None:
        sys.argv[1:] = arguments
        serve(arguments)


def copied(here: socket.socket) -> Sequence[str] | None:
    """Answers until nobody asks any more, then None; in a copy, what it is to be."""
    while True:
        told, descriptors, _, _ = socket.recv_fds(here, MOST_BYTES, MOST_DESCRIPTORS)
        if not told:
            return None
        asked = json.loads(told)
        if "bury" in asked:
            answer: dict[str, Any] = {"code": exit_code(asked["bury"])}
        else:
            output, word = descriptors
            try:
                pid = _copy()
            except OSError as error:
                answer = {"error": str(error)}
            else:
                if not pid:
                    here.close()
                    _settle(asked["env"], output, word)
                    arguments: list[str] = asked["arguments"]
                    return arguments
                answer = {"pid": pid}
            finally:
                os.close(output)
                os.close(word)
        try:
            here.send(json.dumps(answer).encode())
        except BrokenPipeError:
            return None


def _copy() -> int:
    """A copy's pid, once it leads a session; in the copy 0."""
    ready, led = os.pipe()
    try:
        try:
            pid = os.fork()
            if not pid:
                os.setsid()
        finally:
            os.close(led)
        if pid:
            os.read(ready, 1)
        return pid
    finally:
        os.close(ready)


def _settle(env: dict[str, str], output: int, word: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    if not os.read(word, 1):
        os._exit(0)  # nobody has written down that it is there
    Path("/proc/self/comm").write_text(NAME)
    os.environ.update(env)
    time.tzset()


if __name__ == "__main__":
    main()
