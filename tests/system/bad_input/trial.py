"""One running grid for all tests of bad input, on which every job and every question runs once.

The results are plain data, so the test processes of a run share them.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.grid.local_grid import processes_of
from tests.system.bad_input import acts, asked, jobs, tampered
from tests.system.bad_input.shell import SECRET, Shell, Told

USER_CODE = Path(__file__).parent / "user_code"
AT_ONCE = 3
"""The number of commands that run at the same time. More commands would only delay each other."""

LEAVES_S = 30.0

Evidence = dict[str, Any]


def shared(folder: Path, name: str, find_out: Callable[[Path], Evidence]) -> Evidence:
    """Return the result of `find_out`. The first process that asks in `folder` computes the result, and the others read
    it."""
    folder.mkdir(exist_ok=True)
    known = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.exists():
            world = folder / name
            try:
                known.write_text(json.dumps(find_out(world)))
            finally:
                # The grid's folder has a gigabyte, and only the evidence is needed.
                shutil.rmtree(world)
    found: Evidence = json.loads(known.read_text())
    return found


def hold(world: Path) -> Evidence:
    """Start a grid, run all trials, and stop the grid."""
    world.mkdir()
    grid = Shell(world, world)
    found: Evidence = {"up": grid("grid", "up", "--pool", "default:0-2x2").to_json()}
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            tried = pool.map(lambda one: _try(world, grid, *one), _all())
            found |= dict(tried)
        found["asked"] = asked.ask(world, grid)
        found["twice"] = _try(world, grid, "twice", jobs.sound, tampered.twice)[1]
    finally:
        found["down"] = grid("grid", "down").to_json()
    found["left"] = _left(grid)
    found["leaks"] = _leaks(grid.home)
    return found


def _left(grid: Shell) -> list[list[str]]:
    """Return the command lines of processes that do not end. The manager releases its lock just before it ends."""
    deadline_s = time.monotonic() + LEAVES_S
    while (left := processes_of(grid.home)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return list(left.values())


def _leaks(home: Path) -> list[str]:
    """Return files of the grid's folder that contain the user's secret, or the API's token in a wrong place."""
    token = home / "token"
    secrets = (SECRET.encode(), token.read_bytes())
    return [
        str(path)
        for path in home.rglob("*")
        if path.is_file()
        and path != token
        and path.stat().st_size < 1 << 20
        and any(secret in path.read_bytes() for secret in secrets)
    ]


def _all() -> list[tuple[str, Callable[[Path], None], Callable[[Shell], Evidence]]]:
    """Return (name, scene, trial) of every job, the longest first."""
    first = [("acts", _acts, _run_acts)]
    rest = [(f"job {job.name}", job.scene, _run) for job in jobs.JOBS]
    tampering = [(f"tampered {one.name}", one.scene, one.run) for one in tampered.TAMPERED]
    return [*first, *rest, *tampering]


def _try(
    world: Path, grid: Shell, name: str, scene: Callable[[Path], None], trial: Callable[..., Any]
) -> tuple[str, Evidence]:
    place = world / name
    place.mkdir()
    scene(place / "job")
    return name, trial(Shell(place, place / "job", BATCHLAB_HOME=str(grid.home)))


def _run(shell: Shell) -> Evidence:
    """Run the job in the folder, and return its output and its results."""
    told = shell("run", "job.yaml", "--out", "out")
    return {"told": told.to_json(), "kept": fetched(shell.folder / "out")}


def fetched(out: Path) -> dict[str, list[Any]]:
    """Return the results by stage, in the order of their tasks."""
    return {file.stem: [line["value"] for line in lines(file)] for file in out.glob("*.jsonl")}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file."""
    with path.open() as file:  # splitlines would also split at U+2028
        return [json.loads(line) for line in file]


# --- The acts ------------------------------------------------------------------------------------


def _acts(folder: Path) -> None:
    shutil.copytree(USER_CODE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "broken_syntax.py").write_text("def broken(:\n")
    (folder / "job.yaml").write_text(acts.JOB)
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in acts.ITEMS))


def _run_acts(shell: Shell) -> Evidence:
    found = _run(shell)
    job = Told.of(found["told"]).out.split()[0]
    failures = shell("job", "failures", job, "--each", "--limit", "500", "--json")
    values = {line["task"]: line["value"] for line in lines(shell.folder / "out/act.jsonl")}
    return {
        "told": found["told"],
        "failures": {str(load["task"]): load for load in json.loads(failures.out)},
        "values": {str(task): value for task, value in values.items()},
    }
