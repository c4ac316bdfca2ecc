"""Main program of the fork server, which forks each worker process of a local grid.

Invariant: the fork server has one thread and does not open files, so that a forked process is like a new process. The
module `batchlab.adapters.local.fork_server` starts the fork server, and documents the messages of the fork server.

    python -P -m batchlab.cli.fork_server_main --home HOME --backend BACKEND DESCRIPTOR
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchlab.adapters.local.fork_server import MAX_BYTES
from batchlab.cli.services import serve
from batchlab.core.operating_system import set_process_name
from batchlab.core.operating_system.processes import exit_code
from batchlab.runtime import factory
from batchlab.server import worker_service  # noqa: F401 - imported before the forks, so that forks share the module
from batchlab.worker import environment  # noqa: F401

MAX_DESCRIPTORS = 2
NAME = "batchlab-worker"
"""Process name of a forked worker. The command lines of all forks are the same."""


def main() -> None:
    """Serve the requests of the process that started the fork server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, help="folder of the grid, shown in lists of processes")
    parser.add_argument("--backend")
    parser.add_argument("descriptor", type=int)
    options = parser.parse_args()
    factory.load(options.backend).import_for_worker()
    platform.platform()  # Python caches the result, so that the workers do not start the program `uname`.
    # After `gc.freeze`, garbage collection in a forked process does not write to existing objects, so the processes
    # share the memory of existing objects.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=options.descriptor) as connection:
        arguments = serve_forks(connection)
    if arguments is not None:
        sys.argv[1:] = arguments
        serve(arguments)


def serve_forks(connection: socket.socket) -> Sequence[str] | None:
    """Respond to requests until the client closes the connection, and then return None.

    In a forked process, return the command-line arguments of the worker.
    """
    unread, descriptors = b"", []
    while True:
        # A read ends behind a request with descriptors, so a forked process has no descriptors of another request.
        data, received, _, _ = socket.recv_fds(connection, MAX_BYTES, MAX_DESCRIPTORS)
        if not data:
            return None
        descriptors += received
        *requests, unread = (unread + data).split(b"\n")
        for line in requests:
            request = json.loads(line)
            if "bury" in request:
                answer: dict[str, Any] = {"code": exit_code(request["bury"])}
            else:
                output, start = descriptors.pop(0), descriptors.pop(0)
                try:
                    pid = _fork()
                except OSError as error:
                    answer = {"error": str(error)}
                else:
                    if not pid:
                        connection.close()
                        _prepare_fork(request["env"], output, start)
                        arguments: list[str] = request["arguments"]
                        return arguments
                    answer = {"pid": pid}
                finally:
                    os.close(output)
                    os.close(start)
            try:
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except BrokenPipeError:
                return None


def _fork() -> int:
    """Fork this process, and return the process id of the fork.

    In the forked process, return 0. The forked process is the leader of a new session of the operating system.
    """
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


def _prepare_fork(env: dict[str, str], output: int, start: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    if not os.read(start, 1):
        os._exit(0)  # The client ended before it recorded the forked process.
    set_process_name(NAME)
    os.environ.update(env)
    time.tzset()


if __name__ == "__main__":
    main()
