"""One process that has imported what an instance's program needs, and whose copies are instances.

Invariant: a copy does nothing until whoever asked for it has written down that it is there: it ends
if that never comes. A nursery that is gone costs nothing but time: what it has started goes on, and
others are started without it.

`batchlab.cli.fork_server_main` is the program of the server. Requests and answers are JSON messages
over a pair of sockets. Answers come in the order of the requests.
"""

from __future__ import annotations

import asyncio
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

MOST_BYTES = 1 << 16
"""Of a message."""
PATIENCE_S = 30.0
"""Of who asks; it answers in milliseconds once it has imported everything."""


class Gone(OSError):
    """The nursery has ended, or never began."""


@dataclass(slots=True)
class Born:
    """A copy that waits for `begin`."""

    pid: int
    _word: int

    def begin(self) -> None:
        """It may: its pid is known wherever it must be."""
        os.write(self._word, b"!")
        self.forget()

    def forget(self) -> None:
        """It ends, unless it has begun; safe to call again."""
        if self._word >= 0:
            os.close(self._word)
            self._word = -1


class Nursery:
    """`argv` starts it; the number of its descriptor comes last. What it has to say of itself goes
    to the file `log`. Its copies are what `program` with further arguments would be."""

    def __init__(self, argv: Sequence[str], program: Sequence[str], log: Path) -> None:
        self._argv = list(argv)
        self._program = list(program)
        self._log = log
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: deque[asyncio.Future[dict[str, Any]]] = deque()

    async def bear(self, argv: Sequence[str], env: Mapping[str, str], output: BinaryIO) -> Born:
        """A copy that will be what `argv` would be, in a session of its own, its environment that
        of the nursery and `env`, what it prints in `output`. Gone; OSError where there cannot be
        one more process."""
        theirs, ours = os.pipe()
        try:
            arguments = list(argv[len(self._program) :])
            asked = {"arguments": arguments, "env": dict(env)}
            answer = await self._ask(asked, (output.fileno(), theirs))
            if error := answer.get("error"):
                raise OSError(error)
            return Born(answer["pid"], ours)
        except BaseException:
            os.close(ours)  # one that has been born nevertheless ends
            raise
        finally:
            os.close(theirs)

    async def end_of(self, pid: int) -> int | None:
        """The exit code of a copy that has ended, as subprocess gives it; its number is free then.
        None where nobody knows any more."""
        if self._socket is None:
            return None  # whose copy it was has ended
        try:
            code: int | None = (await self._ask({"bury": pid}))["code"]
        except Gone:
            return None
        return code

    def close(self) -> None:
        """End it; what it has started goes on."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()  # it has nothing to lose
            self._process.wait()
            self._process = None
        while self._asked:
            waiting = self._asked.popleft()
            if not waiting.done():
                waiting.set_exception(Gone("The nursery has ended."))

    async def _ask(
        self, question: dict[str, Any], descriptors: Sequence[int] = ()
    ) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        try:
            here = self._open()
            socket.send_fds(here, [json.dumps(question).encode()], descriptors)
        except OSError as error:
            self.close()
            raise Gone(str(error)) from error
        self._asked.append(answer)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await answer
        except TimeoutError as error:
            self.close()
            raise Gone(f"The nursery has not answered for {PATIENCE_S:.0f} s.") from error

    def _open(self) -> socket.socket:
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                with theirs:
                    self._process = self._begun(theirs)
            except OSError:
                ours.close()
                raise
            ours.setblocking(False)
            asyncio.get_running_loop().add_reader(ours, self._hear)
            self._socket = ours
        return self._socket

    def _begun(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab", opener=private) as log:
            return subprocess.Popen(
                [*self._argv, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def _hear(self) -> None:
        assert self._socket is not None
        try:
            told = self._socket.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if not told:
            self.close()
            return
        waiting = self._asked.popleft()
        if not waiting.done():
            waiting.set_result(json.loads(told))
