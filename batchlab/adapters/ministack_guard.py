"""MiniStack's server in MiniStack's own environment: ended once nobody owns it any more, and before
it acknowledges an object that it could not write.

Invariant: nothing of batchlab: this file is run by another Python, which has MiniStack, uvicorn and
httptools. The owner holds a lock on a file; the kernel frees it however the owner dies. Not
PR_SET_PDEATHSIG: an owner that was killed is replaced within seconds, and its emulator must live to
be taken over.

    python -I ministack_guard.py LISTENING_FD LOCK_FILE ORPHAN_S
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time

import uvicorn

LOOK_S = 0.5


def main(listening: str, lock: str, orphan_s: float) -> None:
    """Serve until SIGTERM."""
    threading.Thread(target=_end_when_orphaned, args=(lock, orphan_s), daemon=True).start()
    logging.getLogger("s3").addHandler(_Honest(logging.WARNING))
    # The listener is the owner's: it outlives a killed emulator, so callers wait for the next one.
    listener = socket.socket(fileno=int(listening))
    # MiniStack's own server, Hypercorn, is Python all through: more than half of a call's CPU.
    config = uvicorn.Config(
        "ministack.app:app",
        loop="asyncio",
        http="httptools",
        ws="none",
        lifespan="on",  # with its end come the queues, written down
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # MiniStack has its own
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,  # long polls do not hold up the end
    )
    uvicorn.Server(config).run(sockets=[listener])


class _Honest(logging.Handler):
    """Where the disk fails, MiniStack's S3 writes a warning and answers as if nothing had happened:
    an object is then lost at its end, or read as empty. Ended right here it answers nothing, and
    the caller tries again at the next one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Failed to "):
            os.write(2, f"ends without an answer: {record.getMessage()}\n".encode())
            os._exit(os.EX_IOERR)


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
