"""Faults of a grid whose manager and instances are processes of this machine, and slow disks.

A process is hit only while it is the one in the launcher's record. A disk is slowed by programs
that write and fsync without a pause. They need only the standard library, use unnamed files, and
end with this process.
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

from batchlab.adapters.local.processes import end_of, living, start_ticks, stat
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.text import first_of
from batchlab.scenarios.faults import proxy, services
from batchlab.scenarios.faults.target_grid import (
    NO_INSTANCE,
    NOTHING_HIT,
    EffectNotSeen,
    FaultAction,
    FaultResult,
    Rollback,
    TargetGrid,
    in_thread,
    wait_for,
)
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.worker.child_process import family

if TYPE_CHECKING:
    from batchlab.scenarios.faults.proxy import FaultProxy

WRITER_COUNTS = (4, 8, 16)
"""Numbers of programs. More of them start if the slowdown is too small."""
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


async def slow_disk(scene: TargetGrid, fault: Fault) -> FaultResult:
    """Keep the disk of the workers' folders busy.

    Raise BackendError if the disk is full or no process can start, and EffectNotSeen if the
    slowdown is too small.
    """
    folder = scene.home.scratch
    try:
        return await _slow(scene, fault, folder)
    except OSError as error:
        raise BackendError(
            f"The disk of {folder} could not be kept busy: {error.strerror or error}.",
            remedy=f"Is there room for {_NEEDED_MIB} MiB on it, and for {WRITER_COUNTS[-1]} processes?",
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
        end_of = [hog.returncode for hog in hogs if hog.poll() is not None]
    if end_of:
        raise UsageError(
            f"A program that writes to the disk of {folder} ended with exit code {end_of[0]}.",
            remedy=f"Is there room for {_NEEDED_MIB} MiB on it?",
        )
    evidence = (
        f"an fsync of 4 KiB took {before_s * 1e3:.2f} ms before and {during_s * 1e3:.2f} ms "
        f"during (medians of {_PROBES}), with {len(hogs)} programs that write and fsync"
    )
    if not felt:
        raise EffectNotSeen(f"The disk of {folder} was not {MIN_SLOWDOWN:g} times as slow: {evidence}.")
    return FaultResult((str(folder),), evidence)


def _end(hogs: Sequence[subprocess.Popen[bytes]]) -> None:
    for hog in hogs:
        hog.kill()
    for hog in hogs:
        hog.wait()


def _start_writer(folder: Path) -> subprocess.Popen[bytes]:
    # The writer has its own session, so Ctrl-C does not reach it.
    return subprocess.Popen(
        [sys.executable, "-I", "-c", WRITER_PROGRAM, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


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
_STOPPED = (b"T", b"t")


class ProcessFaults:
    """Faults of the grid's instances, which the launcher's records list."""

    def __init__(self, scene: TargetGrid) -> None:
        self._scene = scene
        self._root = scene.home.fleet

    async def hit(self, fault: Fault) -> dict[str, int]:
        """Return the process ids of the targets by instance."""
        there = await asyncio.to_thread(living, self._root)
        return {name: there[name] for name in await self._scene.hit(fault, there)}

    async def _gone(self, instances: Collection[str]) -> Mapping[str, str]:
        """Wait until all have ended, and return how, by the launcher's records."""

        async def look() -> Mapping[str, str]:
            said = {instance: end_of(self._root, instance) for instance in instances}
            return said if all(said.values()) else {}

        return await wait_for(look, "the end of the instances")

    async def kill(self, fault: Fault) -> FaultResult:
        hit = await self.hit(fault)
        if not hit:
            return FaultResult(impossible=NO_INSTANCE)
        await asyncio.to_thread(self._kill, hit)
        said = await self._gone(hit)
        return FaultResult(tuple(hit), first_of([f"{one} (pid {hit[one]}): {said[one]}" for one in hit]))

    def _kill(self, hit: Mapping[str, int]) -> None:
        for pid in hit.values():
            members = family(pid)
            # The worker is killed first, so that it cannot report the deaths of its tasks.
            _send(signal.SIGKILL, [pid, *sorted(members - {pid})])

    async def pause(self, fault: Fault) -> FaultResult:
        hit = await self.hit(fault)
        if not hit:
            return FaultResult(impossible=NO_INSTANCE)
        halted: dict[int, int] = {}
        async with Rollback(self._scene.over) as undoing:
            await undoing.breaking(
                f"the pause of {first_of(list(hit))}",
                partial(in_thread, _go_on, halted),
                partial(in_thread, _halt, hit.values(), halted),
            )
            stood = await self._still(halted)
            held_s = await self._scene.hold(fault.for_s)
            still = sum(_is_in(pid, _STOPPED) for pid in halted)
        evidence = (
            f"{stood} of {len(halted)} processes of {first_of(list(hit))} stood still, {still} of "
            f"them still did after {held_s:.1f} s; then {await self._moving(halted)} went on"
        )
        return FaultResult(tuple(hit), evidence)

    async def _still(self, halted: Mapping[int, int]) -> int:
        """Wait until all living processes are stopped, and count them. A signal needs some time."""

        async def look() -> int:
            here = [pid for pid, ticks in halted.items() if start_ticks(pid) == ticks]
            still = sum(_is_in(pid, _STOPPED) for pid in here)
            return still + 1 if still == len(here) else 0

        return await wait_for(look, "the beginning of the pause", within_s=_SETTLES_S) - 1

    async def _moving(self, halted: Mapping[int, int]) -> int:
        """Wait until all living processes run again, and count them."""

        async def look() -> int:
            here = [pid for pid, ticks in halted.items() if start_ticks(pid) == ticks]
            moving = sum(not _is_in(pid, _STOPPED) for pid in here)
            return moving + 1 if moving == len(here) else 0

        return await wait_for(look, "the end of the pause", within_s=_SETTLES_S) - 1

    async def spot_wave(self, fault: Fault) -> FaultResult:
        hit = await self.hit(fault)
        if not hit:
            return FaultResult(impossible=NO_INSTANCE)
        _send(signal.SIGTERM, hit.values())
        ticks = {one: start_ticks(pid) for one, pid in hit.items()}

        async def look() -> bool:
            return not any(ticks[one] and start_ticks(hit[one]) == ticks[one] for one in hit)

        waited_s = 0.0
        while waited_s < fault.notice_s and not await look() and not self._scene.over.is_set():
            waited_s += await self._scene.hold(_GRACE_S)
        late = {one: pid for one, pid in hit.items() if ticks[one] and start_ticks(pid) == ticks[one]}
        await asyncio.to_thread(self._kill, late)
        said = await self._gone(hit)
        left = [f"{one}: {how}" for one, how in said.items()]
        return FaultResult(
            tuple(hit),
            f"{len(hit) - len(late)} of {len(hit)} left by themselves, the last after "
            f"{waited_s:.1f} s of {fault.notice_s:g} s, {len(late)} were killed ({first_of(left)})",
        )

    async def partition(self, front: FaultProxy | None, fault: Fault) -> FaultResult:
        if front is None:
            return FaultResult(
                impossible="The grid was started without a proxy before its endpoint, so its "
                "instances cannot be cut off from it."
            )
        hit = await self.hit(fault)
        if not hit:
            return FaultResult(impossible=NO_INSTANCE)
        before = front.counts.kept_waiting

        async def answer() -> None:
            front.cut(None)

        async with Rollback(self._scene.over) as undoing:
            undoing.owe(f"the partition of {first_of(list(hit))}", answer)
            front.cut(partial(proxy.is_port_of, frozenset(hit.values())))
            held_s = await self._scene.hold(fault.for_s)
        waiting = front.counts.kept_waiting - before
        if not waiting:
            return FaultResult(impossible=NOTHING_HIT.format(one="request of theirs"))
        return FaultResult(
            tuple(hit), f"{waiting} requests of {first_of(list(hit))} were left without an answer in {held_s:.1f} s"
        )


async def s3_errors(scene: TargetGrid, front: FaultProxy | None, fault: Fault) -> FaultResult:
    if front is None:
        return FaultResult(
            impossible="The grid was started without a proxy before its endpoint, so no "
            "request can be answered with 503."
        )
    before = front.counts.asked, front.counts.refused

    async def pass_on() -> None:
        front.rate = 0.0

    async with Rollback(scene.over) as undoing:
        undoing.owe("the proxy's refusal of requests", pass_on)
        front.rate = fault.rate
        held_s = await scene.hold(fault.for_s)
    asked, refused = (front.counts.asked - before[0], front.counts.refused - before[1])
    if not refused:
        return FaultResult(impossible=NOTHING_HIT.format(one="request"))
    return FaultResult(
        (front.target,), f"{refused} of {asked} requests to S3 were answered 503 SlowDown in {held_s:.1f} s"
    )


def _send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to the processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _halt(leaders: Iterable[int], halted: dict[int, int]) -> None:
    """Stop the processes and their children. `halted` gets the start times."""
    for leader in leaders:
        while new := family(leader) - halted.keys():
            # The worker is stopped first, so that it starts no more children.
            for pid in sorted(new, key=lambda pid: pid != leader):
                if ticks := start_ticks(pid):
                    halted[pid] = ticks
                    _send(signal.SIGSTOP, [pid])
                else:
                    new.discard(pid)
            if not new:
                break


def _go_on(halted: Mapping[int, int]) -> None:
    _send(signal.SIGCONT, [pid for pid, ticks in halted.items() if start_ticks(pid) == ticks])


def _is_in(pid: int, states: Collection[bytes]) -> bool:
    fields = stat(pid)
    return bool(fields) and fields[0] in states


def actions(scene: TargetGrid, front: FaultProxy | None) -> Mapping[FaultName, FaultAction]:
    """Return the faults that the table declares possible."""
    instances, keeper = ProcessFaults(scene), services.ManagerProcess(scene)
    found: dict[FaultName, FaultAction] = {
        FaultName.KILL: instances.kill,
        FaultName.PAUSE: instances.pause,
        FaultName.SPOT_WAVE: instances.spot_wave,
        FaultName.SQS_DUPLICATES: partial(services.duplicates, scene),
        FaultName.SQS_DELAYS: partial(services.delays, scene),
        FaultName.SLOW_DISK: partial(slow_disk, scene),
        FaultName.MANAGER_CRASH: keeper.crash,
        FaultName.DATABASE_LOSS: keeper.lose_ledger,
    }
    if scene.backend.emulator:
        found[FaultName.PARTITION] = partial(instances.partition, front)
        found[FaultName.S3_ERRORS] = partial(s3_errors, scene, front)
    return found
