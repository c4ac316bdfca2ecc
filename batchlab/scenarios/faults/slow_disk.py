"""A slow disk: programs that write and fsync without a pause, and what an fsync takes meanwhile.

The programs need the standard library alone. Invariant: their files have no name, and they end by
themselves with whoever has started them.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from batchlab.core.errors import BackendError, UsageError
from batchlab.scenarios.faults.fault_injection import EffectNotSeen, FaultResult, TargetGrid
from batchlab.scenarios.faults.rollback import Rollback, in_thread
from batchlab.scenarios.model.values import Fault

WRITER_COUNTS = (4, 8, 16)
"""So many programs at first, and more where they are not felt enough."""
MIN_SLOWDOWN = 2.0
"""An fsync should take so many times as long as before."""
_PROBES = 25
_PROBED_BYTES = 4096
_WARM_S = 0.5
_NEEDED_MIB = 32 * WRITER_COUNTS[-1]
WRITER_PROGRAM = """\
import os, random, sys, tempfile
parent, block, blocks = os.getppid(), os.urandom(8 << 20), 4
with tempfile.TemporaryFile(dir=sys.argv[1]) as file:
    while os.getppid() == parent:
        os.pwrite(file.fileno(), block, random.randrange(blocks) * len(block))
        os.fsync(file.fileno())
"""


async def slow_disk(scene: TargetGrid, fault: Fault) -> FaultResult:
    """Keep the disk busy that all workers of this machine have their folders on. BackendError
    where it is full or nothing can be started; EffectNotSeen where nobody can have felt it."""
    folder = scene.home.scratch
    try:
        return await _slow(scene, fault, folder)
    except OSError as error:
        raise BackendError(
            f"The disk of {folder} could not be kept busy: {error.strerror or error}.",
            remedy=f"Is there room for {_NEEDED_MIB} MiB on it, and for "
            f"{WRITER_COUNTS[-1]} processes?",
        ) from error


async def _slow(scene: TargetGrid, fault: Fault, folder: Path) -> FaultResult:
    await asyncio.to_thread(partial(folder.mkdir, parents=True, exist_ok=True))
    before_s = await asyncio.to_thread(fsync_s, folder)
    hogs: list[subprocess.Popen[bytes]] = []
    began_s = time.monotonic()
    async with Rollback(scene.over) as undoing:
        undoing.owe(f"what keeps the disk of {folder} busy", partial(in_thread, _end, hogs))
        for number in WRITER_COUNTS:
            while len(hogs) < number:
                hogs.append(_start_writer(folder))
            await scene.hold(min(_WARM_S, fault.for_s))
            during_s = await asyncio.to_thread(fsync_s, folder)
            felt = during_s >= MIN_SLOWDOWN * before_s
            if felt or scene.over.is_set():
                break
        await scene.hold(fault.for_s - (time.monotonic() - began_s))
        ended = [hog.returncode for hog in hogs if hog.poll() is not None]
    if ended:
        raise UsageError(
            f"What was to keep the disk of {folder} busy ended with exit code {ended[0]}.",
            remedy=f"Is there room for {_NEEDED_MIB} MiB on it?",
        )
    evidence = (
        f"an fsync of 4 KiB took {before_s * 1e3:.2f} ms before and {during_s * 1e3:.2f} ms "
        f"during (medians of {_PROBES}), with {len(hogs)} programs that write and fsync"
    )
    if not felt:
        raise EffectNotSeen(
            f"The disk of {folder} was not {MIN_SLOWDOWN:g} times as slow: {evidence}."
        )
    return FaultResult((str(folder),), evidence)


def _end(hogs: Sequence[subprocess.Popen[bytes]]) -> None:
    for hog in hogs:
        hog.kill()
    for hog in hogs:
        hog.wait()


def _start_writer(folder: Path) -> subprocess.Popen[bytes]:
    # Its own session: Ctrl-C is for whoever undoes it.
    return subprocess.Popen(
        [sys.executable, "-I", "-c", WRITER_PROGRAM, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def fsync_s(folder: Path) -> float:
    """What it takes to write 4 KiB and have them on the disk: the median, in seconds."""
    took_s = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_PROBES):
            begun_s = time.perf_counter()
            os.pwrite(file.fileno(), os.urandom(_PROBED_BYTES), 0)
            os.fsync(file.fileno())
            took_s.append(time.perf_counter() - begun_s)
    return statistics.median(took_s)
