"""MiniStack's server in MiniStack's own environment: ended once nobody owns it any more, and before
it acknowledges an object that it could not write.

Invariant: standard library only, and nothing of batchlab: this file is run by another Python. The
owner holds a lock on a file; the kernel frees it however the owner dies. Not PR_SET_PDEATHSIG: an
owner that was killed is replaced within seconds, and its emulator must live to be taken over.

    python -I ministack_guard.py LISTENING_FD LOCK_FILE ORPHAN_S
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import runpy
import signal
import sys
import threading
import time

LOOK_S = 0.5


def main(listening: str, lock: str, orphan_s: float) -> None:
    """Serve until SIGTERM."""
    threading.Thread(target=_end_when_orphaned, args=(lock, orphan_s), daemon=True).start()
    # What `ministack --detach` runs, but in this process (no workers) and on a socket that the
    # owner has opened: it outlives a killed emulator, so callers wait for the next one.
    logging.getLogger("s3").addHandler(_Honest(logging.WARNING))
    setattr(asyncio.Server, "wait_closed", _at_once)  # noqa: B010 - mypy takes no assignment
    sys.argv = ["hypercorn", "ministack.app:app", "--bind", f"fd://{listening}", "--workers", "0"]
    sys.argv += ["--keep-alive", "75", "--graceful-timeout", "1", "--log-level", "WARNING"]
    runpy.run_module("hypercorn", run_name="__main__")


class _Honest(logging.Handler):
    """Where the disk fails, MiniStack's S3 writes a warning and answers as if nothing had happened:
    an object is then lost at its end, or read as empty. Ended right here it answers nothing, and
    the caller tries again at the next one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Failed to "):
            os.write(2, f"ends without an answer: {record.getMessage()}\n".encode())
            os._exit(os.EX_IOERR)


async def _at_once(_: asyncio.Server) -> None:
    """As it was before Python 3.12. Since then it waits for every connection to be closed, long
    polls too, before the graceful timeout even begins: the end would take 20 s, without state."""


def _end_when_orphaned(lock: str, orphan_s: float) -> None:
    alone_s = 0.0
    while alone_s < orphan_s:
        time.sleep(LOOK_S)
        alone_s = 0.0 if _is_held(lock) else alone_s + LOOK_S
    os.kill(os.getpid(), signal.SIGTERM)


def _is_held(lock: str) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False  # the folder has been removed, and with it all that we could serve
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
