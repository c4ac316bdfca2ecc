"""Client of a fork server, a process that has imported the program of an instance.

Each instance is a fork of the fork server. Invariant: a fork does nothing until the process that requested the fork has
recorded its pid. A fork exits if the requesting process does not confirm the record. If the fork server ends, its forks
continue, and new instances start more slowly.

`batchlab.cli.fork_server_main` is the program of the server. Requests to the fork server and its answers are lines of
JSON over a pair of sockets. The server answers requests in their order.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from batchlab.core.atomic_write import private

MAX_BYTES = 1 << 16
"""Size of the buffer for a read of requests or answers in bytes."""
ANSWER_S = 30.0
"""Timeout of a request to the fork server in seconds.

The fork server answers in milliseconds once its imports are done.
"""


class ForkServerEndedError(OSError):
    """The fork server has ended or did not start."""


@dataclass(slots=True)
class PendingFork:
    """A fork that waits for `begin`."""

    pid: int
    _pipe: int

    def begin(self) -> None:
        """Let the fork run, after its pid has been recorded."""
        os.write(self._pipe, b"!")
        self.close()

    def close(self) -> None:
        """Make the fork exit unless `begin` was called. `close` may be called more than once."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


class ForkServer:
    """A fork server, started with `argv` and the number of its socket's descriptor as the last argument.

    The fork server writes its output to the file `log`. A fork behaves like `program` with further arguments.
    """

    def __init__(self, argv: Sequence[str], program: Sequence[str], log: Path) -> None:
        self._argv = list(argv)
        self._program = list(program)
        self._log = log
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._answers = b""
        """Received part of the next answer."""

    def start(self) -> None:
        """Start the server before the first request, because its imports take longer than a fork.

        Raise OSError if the server cannot start.
        """
        self._open()

    async def fork(self, argv: Sequence[str], env: Mapping[str, str], output: BinaryIO) -> PendingFork:
        """Return a fork that will behave like the process `argv`, in a new session.

        The environment of the fork is the fork server's environment, with the variables of `env`. The fork writes to
        `output`. Raise ForkServerEndedError if the server has ended, and OSError if the server cannot create another
        process.
        """
        read_end, write_end = os.pipe()
        try:
            request = {"arguments": list(argv[len(self._program) :]), "env": dict(env)}
            answer = await self._request(request, (output.fileno(), read_end))
            if error := answer.get("error"):
                raise OSError(error)
            return PendingFork(answer["pid"], write_end)
        except BaseException:
            os.close(write_end)  # A fork that exists in spite of the error exits, because its pipe is closed.
            raise
        finally:
            os.close(read_end)

    async def exit_code(self, pid: int) -> int | None:
        """Return the exit code of an ended fork in the form of `subprocess`, and release its pid.

        Return None if the server that was the parent of the fork has ended.
        """
        if self._socket is None:
            return None
        try:
            code: int | None = (await self._request({"bury": pid}))["code"]
        except ForkServerEndedError:
            return None
        return code

    def close(self) -> None:
        """Kill the fork server. The forks of a killed server continue."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            self._answers = b""
        if self._process is not None:
            self._process.kill()  # Killing the fork server does not lose any state.
            self._process.wait()
            self._process = None
        while self._requests:
            request = self._requests.popleft()
            if not request.done():
                request.set_exception(ForkServerEndedError("The fork server has ended."))

    async def _request(self, question: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        line = json.dumps(question).encode() + b"\n"
        try:
            if socket.send_fds(self._open(), [line], descriptors) < len(line):
                raise BlockingIOError(errno.EAGAIN, "too many requests wait for the fork server")
        except OSError as error:
            self.close()
            raise ForkServerEndedError(str(error)) from error
        self._requests.append(answer)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError as error:
            self.close()
            raise ForkServerEndedError(f"The fork server has not answered for {ANSWER_S:.0f} s.") from error

    def _open(self) -> socket.socket:
        if self._socket is None:
            client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                with server:
                    self._log.parent.mkdir(parents=True, exist_ok=True)
                    with open(self._log, "ab", opener=private) as log:
                        self._process = subprocess.Popen(
                            [*self._argv, str(server.fileno())],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            pass_fds=[server.fileno()],
                            start_new_session=True,
                        )
            except OSError:
                client.close()
                raise
            client.setblocking(False)
            asyncio.get_running_loop().add_reader(client, self._receive)
            self._socket = client
        return self._socket

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        *answers, self._answers = (self._answers + data).split(b"\n")
        for answer in answers:
            request = self._requests.popleft()
            if not request.done():
                request.set_result(json.loads(answer))
