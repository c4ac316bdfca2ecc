"""Faults of a grid whose manager and instances are processes on this machine, including slow disks.

A process gets a signal only while the launcher's record lists the process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.adapters.local.processes import end_of, living
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.operating_system.processes import family, is_stopped, start_mark
from batchlab.core.text import first_of
from batchlab.scenarios.faults import proxy, services
from batchlab.scenarios.faults.target_grid import (
    NOTHING_HIT,
    EffectNotSeen,
    FaultAction,
    FaultResult,
    NothingHit,
    Rollback,
    TargetGrid,
    in_thread,
    wait_for,
)
from batchlab.scenarios.model.values import Fault, FaultName

if TYPE_CHECKING:
    from batchlab.scenarios.faults.proxy import FaultProxy

WRITER_COUNTS = (4, 8, 16)
"""Numbers of writer programs that are tried one after another to slow down the disk.

If the slowdown is too small, the next larger number of writers is started.
"""
MIN_SLOWDOWN = 2.0
"""Minimum factor by which an fsync must slow down."""
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


async def slow_disk(grid: TargetGrid, fault: Fault) -> FaultResult:
    """Keep the disk of the workers' folders busy with programs that write and fsync without a pause.

    The programs that slow down the disk use unnamed files and end with this process. Raise BackendError if the disk is
    full or no process can start, and EffectNotSeen if the slowdown is too small.
    """
    folder = grid.home.scratch
    try:
        return await _slow_disk(grid, fault, folder)
    except OSError as error:
        raise BackendError(
            f"The disk of {folder} could not be kept busy: {error.strerror or error}.",
            remedy=f"Is there room for {_NEEDED_MIB} MiB on it, and for {WRITER_COUNTS[-1]} processes?",
        ) from error


async def _slow_disk(grid: TargetGrid, fault: Fault, folder: Path) -> FaultResult:
    await asyncio.to_thread(partial(folder.mkdir, parents=True, exist_ok=True))
    before_s = await asyncio.to_thread(fsync_s, folder)
    writers: list[subprocess.Popen[bytes]] = []
    began_s = time.monotonic()
    async with Rollback(grid.over) as undoing:
        undoing.owe(f"the load on the disk of {folder}", partial(in_thread, _kill_writers, writers))
        for number in WRITER_COUNTS:
            while len(writers) < number:
                writers.append(_start_writer(folder))
            await grid.hold(min(_WARM_S, fault.for_s))
            during_s = await asyncio.to_thread(fsync_s, folder)
            is_slow = during_s >= MIN_SLOWDOWN * before_s
            if is_slow or grid.over.is_set():
                break
        await grid.hold(fault.for_s - (time.monotonic() - began_s))
        exit_codes = [writer.returncode for writer in writers if writer.poll() is not None]
    if exit_codes:
        raise UsageError(
            f"A program that writes to the disk of {folder} ended with exit code {exit_codes[0]}.",
            remedy=f"Is there room for {_NEEDED_MIB} MiB on it?",
        )
    evidence = (
        f"an fsync of 4 KiB took {before_s * 1e3:.2f} ms before and {during_s * 1e3:.2f} ms during (medians of "
        f"{_PROBES}), with {len(writers)} programs that write and fsync"
    )
    if not is_slow:
        raise EffectNotSeen(f"The disk of {folder} was not {MIN_SLOWDOWN:g} times as slow: {evidence}.")
    return FaultResult((str(folder),), evidence)


def _start_writer(folder: Path) -> subprocess.Popen[bytes]:
    # The writer program has its own session, so Ctrl-C does not reach the writer.
    command = [sys.executable, "-I", "-c", WRITER_PROGRAM, str(folder)]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)


def _kill_writers(writers: Sequence[subprocess.Popen[bytes]]) -> None:
    for writer in writers:
        writer.kill()
    for writer in writers:
        writer.wait()


def fsync_s(folder: Path) -> float:
    """Return the median time in seconds to write and fsync 4 KiB."""
    took_s = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_PROBES):
            begun_s = time.perf_counter()
            os.pwrite(file.fileno(), os.urandom(_PROBED_BYTES), 0)
            os.fsync(file.fileno())
            took_s.append(time.perf_counter() - begun_s)
    return statistics.median(took_s)


_SETTLES_S = 15.0
_GRACE_S = 0.2


class ProcessFaults:
    """Faults of the grid's instances. The launcher's records list the processes of the instances."""

    def __init__(self, grid: TargetGrid) -> None:
        self._grid = grid
        self._root = grid.home.fleet

    async def targets(self, fault: Fault) -> dict[str, int]:
        """Return the process ids of the fault's target instances, by instance."""
        pids = await asyncio.to_thread(living, self._root)
        return {name: pids[name] for name in await self._grid.targets(fault, pids)}

    async def _wait_for_end(self, instances: Collection[str]) -> Mapping[str, str]:
        """Wait until all killed processes have ended, and return how the processes ended according to the launcher's
        records.
        """

        async def look() -> Mapping[str, str]:
            ends = {instance: end_of(self._root, instance) for instance in instances}
            return ends if all(ends.values()) else {}

        return await wait_for(look, "the end of the instances")

    async def kill(self, fault: Fault) -> FaultResult:
        targets = await self.targets(fault)
        await asyncio.to_thread(self._kill, targets)
        ends = await self._wait_for_end(targets)
        return FaultResult(
            tuple(targets), first_of([f"{name} (pid {pid}): {ends[name]}" for name, pid in targets.items()])
        )

    def _kill(self, targets: Mapping[str, int]) -> None:
        for pid in targets.values():
            members = family(pid)
            # The worker is killed before its tasks, so that the worker cannot report the deaths of its tasks.
            _send(signal.SIGKILL, [pid, *sorted(members - {pid})])

    async def pause(self, fault: Fault) -> FaultResult:
        targets = await self.targets(fault)
        halted: dict[int, int] = {}
        names = first_of(list(targets))
        async with Rollback(self._grid.over) as undoing:
            await undoing.breaking(
                f"the pause of {names}",
                partial(in_thread, _resume, halted),
                partial(in_thread, _halt, targets.values(), halted),
            )
            stopped = await self._wait_for_state(halted, "the beginning of the pause", stopped=True)
            held_s = await self._grid.hold(fault.for_s)
            still = sum(is_stopped(pid) for pid in halted)
        resumed = await self._wait_for_state(halted, "the end of the pause", stopped=False)
        return FaultResult(
            tuple(targets),
            f"{stopped} of {len(halted)} processes of {names} were stopped, {still} of them for {held_s:.1f} s; then "
            f"{resumed} resumed",
        )

    async def _wait_for_state(self, halted: Mapping[int, int], what: str, *, stopped: bool) -> int:
        """If `stopped` is True, wait until all living processes are stopped, or else until all living processes run.
        Return the number of living processes.

        A signal takes effect after a short time.
        """

        async def look() -> int:
            alive = [pid for pid, mark in halted.items() if start_mark(pid) == mark]
            number = sum(is_stopped(pid) is stopped for pid in alive)
            return number + 1 if number == len(alive) else 0

        return await wait_for(look, what, within_s=_SETTLES_S) - 1

    async def spot_wave(self, fault: Fault) -> FaultResult:
        targets = await self.targets(fault)
        _send(signal.SIGTERM, targets.values())
        marks = {name: start_mark(pid) for name, pid in targets.items()}

        def alive() -> dict[str, int]:
            return {name: pid for name, pid in targets.items() if marks[name] and start_mark(pid) == marks[name]}

        waited_s = 0.0
        while waited_s < fault.notice_s and alive() and not self._grid.over.is_set():
            waited_s += await self._grid.hold(_GRACE_S)
        late = alive()
        await asyncio.to_thread(self._kill, late)
        ends = [f"{name}: {how}" for name, how in (await self._wait_for_end(targets)).items()]
        return FaultResult(
            tuple(targets),
            f"{len(targets) - len(late)} of {len(targets)} instances ended by themselves within {waited_s:.1f} s of "
            f"{fault.notice_s:g} s, {len(late)} were killed ({first_of(ends)})",
        )

    async def partition(self, front: FaultProxy | None, fault: Fault) -> FaultResult:
        if front is None:
            raise NothingHit(
                "The grid was started without a proxy before its endpoint, so its instances cannot be cut off from it."
            )
        targets = await self.targets(fault)
        before = front.counts.kept_waiting

        async def reconnect() -> None:
            front.cut(None)

        async with Rollback(self._grid.over) as undoing:
            undoing.owe(f"the partition of {first_of(list(targets))}", reconnect)
            front.cut(partial(proxy.is_port_of, frozenset(targets.values())))
            held_s = await self._grid.hold(fault.for_s)
        waiting = front.counts.kept_waiting - before
        if not waiting:
            raise NothingHit(NOTHING_HIT.format(unit="request of these instances"))
        return FaultResult(
            tuple(targets), f"{waiting} requests of {first_of(list(targets))} got no answer in {held_s:.1f} s"
        )


async def s3_errors(grid: TargetGrid, front: FaultProxy | None, fault: Fault) -> FaultResult:
    if front is None:
        raise NothingHit(
            "The grid was started without a proxy before its endpoint, so no request can be answered with 503."
        )
    before = front.counts.asked, front.counts.refused

    async def stop_refusing() -> None:
        front.rate = 0.0

    async with Rollback(grid.over) as undoing:
        undoing.owe("the proxy's refusal of requests", stop_refusing)
        front.rate = fault.rate
        held_s = await grid.hold(fault.for_s)
    asked, refused = front.counts.asked - before[0], front.counts.refused - before[1]
    if not refused:
        raise NothingHit(NOTHING_HIT.format(unit="request"))
    return FaultResult(
        (front.target,), f"{refused} of {asked} requests to S3 were answered 503 SlowDown in {held_s:.1f} s"
    )


def _send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to the processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _halt(leaders: Iterable[int], halted: dict[int, int]) -> None:
    """Stop the processes and their children. The function adds the start mark of each stopped process to `halted`."""
    for leader in leaders:
        while new := family(leader) - halted.keys():
            # The worker is stopped before its children, so that the worker cannot start more children.
            for pid in sorted(new, key=lambda pid: pid != leader):
                if mark := start_mark(pid):
                    halted[pid] = mark
                    _send(signal.SIGSTOP, [pid])
                else:
                    new.discard(pid)
            if not new:
                break


def _resume(halted: Mapping[int, int]) -> None:
    _send(signal.SIGCONT, [pid for pid, mark in halted.items() if start_mark(pid) == mark])


def actions(grid: TargetGrid, front: FaultProxy | None) -> Mapping[FaultName, FaultAction]:
    """Return the action of each fault that a grid of local processes supports according to the table of faults."""
    instances = ProcessFaults(grid)
    possible: dict[FaultName, FaultAction] = {
        FaultName.KILL: instances.kill,
        FaultName.PAUSE: instances.pause,
        FaultName.SPOT_WAVE: instances.spot_wave,
        FaultName.SQS_DUPLICATES: partial(services.duplicates, grid),
        FaultName.SQS_DELAYS: partial(services.delays, grid),
        FaultName.SLOW_DISK: partial(slow_disk, grid),
        FaultName.MANAGER_CRASH: partial(services.crash_manager, grid),
        FaultName.DATABASE_LOSS: partial(services.lose_ledger, grid),
    }
    if grid.backend.emulator:
        possible[FaultName.PARTITION] = partial(instances.partition, front)
        possible[FaultName.S3_ERRORS] = partial(s3_errors, grid, front)
    return possible
