"""Duration of a job whose last task hangs or whose last worker is frozen, with and without speculative copies.

    python benchmarks/stragglers.py [--small] [--json FILE] [--only hang|frozen]

A grid on `local` has four workers with one slot each, and sends a copy after 1 s at the earliest. The job has 60 tasks
of 0.2 s. In the part `hang`, the first run of the last task takes 30 s longer, on a worker that is well. In the part
`frozen`, the last task's worker and all of its processes also receive SIGSTOP, until the end of the job.

Targets: with copies, the job with the hanging task takes at most a third of the time, and the job with the frozen
worker does not take longer.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

from measured import Row, run

from batchlab import Grid
from batchlab.adapters.local.processes import living
from batchlab.core.model import Pool
from batchlab.core.operating_system.processes import family
from batchlab.runtime.home import Home

TASKS, SMALL_TASKS = 60, 20
TASK_S = 0.2
HANG_S = 30.0
POOL = Pool("default", 4, 4, 1)


def hang(tasks: int) -> list[Row]:
    return _compared("hanging task", tasks, is_frozen=False, most=1 / 3)


def frozen(tasks: int) -> list[Row]:
    return _compared("frozen worker", tasks, is_frozen=True, most=1.0)


def _compared(what: str, tasks: int, *, is_frozen: bool, most: float) -> list[Row]:
    without_s, _ = _measured(tasks, is_frozen=is_frozen, copies=False)
    with_s, repeated_s = _measured(tasks, is_frozen=is_frozen, copies=True)
    return [
        Row(f"{what}, without copies", without_s, "s"),
        Row(f"{what}, with copies", with_s, "s"),
        Row(f"{what}, ratio", with_s / without_s, "", most, at_most=True),
        Row(f"{what}, slot time of the run that lost", repeated_s, "s"),
    ]


def _measured(tasks: int, *, is_frozen: bool, copies: bool) -> tuple[float, float]:
    """Return the duration of the job, and the slot time of the runs that lost against a copy."""

    def task(number: int) -> int:
        if number == tasks - 1:
            try:
                with note.open("x") as file:
                    file.write(f"{os.getpid()}\n")
                time.sleep(HANG_S)
            except FileExistsError:
                pass
        time.sleep(TASK_S)
        return number

    with tempfile.TemporaryDirectory(prefix="batchlab-stragglers-") as name:
        home, note = Home(Path(name) / "grid"), Path(name) / "note"
        home.path.mkdir()
        (home.path / "settings.toml").write_text("[manager]\ncopy_after_s = 1.0\n")
        with Grid("local", home=home.path, pools=[POOL], warm=True) as grid:
            list(grid.map(abs, range(4 * POOL.max_size)))
            stopped: list[int] = []
            if is_frozen:
                threading.Thread(target=_freeze, args=(home, note, stopped), daemon=True).start()
            begun_s = time.perf_counter()
            # A task with side effects is never copied.
            results = list(grid.map(task, range(tasks), bundle=1, side_effects=not copies))
            took_s = time.perf_counter() - begun_s
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            if results != list(range(tasks)):
                raise SystemExit("The results are wrong.")
            time.sleep(2.0)  # the account of a job is closed at a tick after its end
            account = grid.client.job_use(grid.client.jobs()[0]["id"])["account"]
            return took_s, sum((account or {}).get("repeated_s", {}).values())


def _freeze(home: Home, note: Path, stopped: list[int]) -> None:
    """Freeze the worker that runs the last task, with all of its processes."""
    while not (note.exists() and (text := note.read_text()).endswith("\n")):
        time.sleep(0.01)
    task = int(text)
    members = next(found for pid in living(home.fleet).values() if task in (found := family(pid)))
    for pid in members:
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)


if __name__ == "__main__":
    run(
        __doc__,
        {"hang": hang, "frozen": frozen},
        lambda is_small: [(part, [SMALL_TASKS if is_small else TASKS]) for part in ("hang", "frozen")],
    )
