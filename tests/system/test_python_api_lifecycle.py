"""The start and the end of a grid of the Python API, whatever happens to the program that uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab import Grid
from batchlab.core.errors import UsageError
from batchlab.core.operating_system import CAN_FORK
from batchlab.runtime.home import Home
from tests.support.grid.local_grid import processes_of
from tests.support.processes import children, is_running
from tests.support.waiting import until


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def grid(home: Path) -> Iterator[Grid]:
    with Grid("local", home=home, workers=1) as grid:
        yield grid


def start(folder: Path, script: str) -> subprocess.Popen[str]:
    """Run a script in `folder`. The caller reads the script's output line by line."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, path.name],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(folder: Path, script: str) -> str:
    """Return the output of a script. Fail if the script fails, or writes to stderr."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    # A process that the script leaves running would keep pipes open, so files are used.
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        command = [sys.executable, path.name]
        code = subprocess.run(command, cwd=folder, stdout=out, stderr=err, timeout=60, check=False).returncode
    assert (code, (folder / "err").read_text()) == (0, "")
    return (folder / "out").read_text()


def ended(home: Path) -> list[str]:
    """Return the ends of jobs as committed in the bucket."""
    finals = sorted((home / "objects" / "jobs").glob("*/final/*.json"))
    return [json.loads(final.read_text())["state"] for final in finals]


# --- With its own grid ---------------------------------------------------------------------------


def test_a_with_block_leaves_no_process_and_can_be_closed_again(tmp_path: Path) -> None:
    """The end of a `with` block must not leave orphans."""
    with Grid("local", home=tmp_path, workers=1) as grid:
        assert repr(grid) == f"<Grid on local in {tmp_path}>"
        assert list(grid.map(lambda x: x, [1])) == [1]
        kept = grid.map(lambda x: x, [1])
        record = Home(tmp_path).record()
        assert record is not None
        pids = set(processes_of(tmp_path))
        assert len(pids) == 2 + CAN_FORK, "the manager, the worker, and the fork server if the system has one"
        pids |= {pid for parent in pids for pid in children(parent)}
        assert len(pids) >= 3 + CAN_FORK
    with pytest.raises(ProcessLookupError):
        os.kill(record.pid, 0)  # the process is not even a zombie
    until(lambda: not any(is_running(pid) for pid in pids), 5)
    grid.close()
    with pytest.raises(UsageError, match="closed"):
        grid.map(lambda x: x, [1])
    with pytest.raises(UsageError, match="closed"):
        next(kept)
    with pytest.raises(UsageError, match="closed"):
        grid.client.health()


def test_a_grid_left_open_is_closed_when_python_ends(tmp_path: Path) -> None:
    script = """
        from batchlab import Grid
        from time import sleep
        grid = Grid("local", home="home", workers=1)
        print(list(grid.map(len, ["a", "bb"])))
        unfinished = grid.map(lambda _: sleep(0.1), range(100))
        next(unfinished)
    """
    assert output(tmp_path, script) == "[1, 2]\n"
    until(lambda: not processes_of(tmp_path / "home"), 5)
    assert sorted(ended(tmp_path / "home")) == ["CANCELLED", "SUCCEEDED"]


def test_failing_program_cancels_the_rest_quietly(tmp_path: Path) -> None:
    """At that point, Python cannot start a thread any more, and the failed map needs one."""
    script = """
        import sys
        from batchlab import Grid
        from batchlab.core.errors import TaskFailed
        from time import sleep
        grid = Grid("local", home="home", workers=1)
        try:
            for _ in grid.map(lambda x: sleep(1 / x), [0, *[9] * 99], bundle=1):
                pass
        except TaskFailed:
            sys.exit()
    """
    assert output(tmp_path, script) == ""
    until(lambda: not processes_of(tmp_path / "home"), 5)
    assert ended(tmp_path / "home") == ["CANCELLED"]


def test_unreferenced_grid_is_closed_after_its_last_result(tmp_path: Path) -> None:
    results = Grid("local", home=tmp_path, workers=1).map(lambda x: x, range(50))
    assert list(results) == list(range(50))
    del results
    assert not processes_of(tmp_path)


def test_a_forked_process_does_not_end_its_parents_grid(tmp_path: Path) -> None:
    script = """
        import os, warnings
        warnings.simplefilter("ignore")  # of forking with threads
        from batchlab import Grid
        with Grid("local", home="home", workers=1) as grid:
            child = os.fork()
            if not child:
                try:
                    grid.map(len, ["a"])
                except Exception as error:
                    print(error)
                raise SystemExit
            os.waitpid(child, 0)
            print(list(grid.map(len, ["a", "bb"])))
    """
    printed = output(tmp_path, script).splitlines()
    assert "closed in this process" in printed[0]
    assert printed[1:] == ["[1, 2]"]


def test_a_killed_program_leaves_no_grid(tmp_path: Path) -> None:
    """The jobs of a killed program must not continue."""
    script = """
        from batchlab import Grid
        from time import sleep
        grid = Grid("local", home="home", workers=1)
        for _ in grid.map(lambda _: sleep(0.05), range(1000)):
            print("going")
    """
    with start(tmp_path, script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.kill()
    until(lambda: not processes_of(tmp_path / "home"))


def test_map_continues_when_its_manager_is_killed(tmp_path: Path) -> None:
    def nap(i: int) -> int:
        time.sleep(0.05)
        return i

    with Grid("local", home=tmp_path, workers=1) as grid:
        results = grid.map(nap, range(20), bundle=5)
        # All messages are sent by then. An unsent message would wait some seconds for the reconciler.
        assert next(results) == 0
        record = Home(tmp_path).record()
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        assert list(results) == list(range(1, 20))
    until(lambda: not processes_of(tmp_path), 5)


# --- With a running grid -------------------------------------------------------------------------


def test_connecting_to_a_grid_leaves_it_up(grid: Grid, home: Path) -> None:
    before = Home(home).record()
    with Grid("local", home=home) as other:
        assert list(other.map(lambda x: x, range(3))) == [0, 1, 2]
    assert Home(home).record() == before
    assert list(grid.map(lambda x: x, range(3))) == [0, 1, 2]
    with pytest.raises(UsageError, match="cannot be set"):
        Grid("local", home=home, workers=2)
    with pytest.raises(UsageError, match="Unknown backend 'moon'"):
        Grid("moon", home=home)


def test_grid_started_by_another_program_stays_up(grid: Grid, home: Path, tmp_path: Path) -> None:
    assert grid.client.health()["leader"]
    script = f"""
        from batchlab import Grid
        from batchlab.runtime.home import Home
        record, asked = Home.record, []
        def late(home):
            asked.append(1)
            return record(home) if len(asked) > 1 else None
        Home.record = late
        with Grid("local", home={str(home)!r}) as grid:
            print(list(grid.map(len, ["a"])))
    """
    before = Home(home).record()
    assert output(tmp_path, script) == "[1]\n"
    assert Home(home).record() == before


def test_a_script_maps_its_own_functions_and_those_of_modules_beside_it(grid: Grid, home: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "__init__.py").write_text("from shapes.square import Square\n")
    (tmp_path / "shapes" / "square.py").write_text(
        textwrap.dedent("""
            from dataclasses import dataclass
            UNIT = "m2"
            def tell(area):
                return f"{area} {UNIT}"
            @dataclass
            class Square:
                side: int
                def area(self):
                    return self.side ** 2
        """)
    )
    script = f"""
        from dataclasses import dataclass
        from batchlab import Grid
        import shapes
        from shapes.square import Square, tell

        @dataclass
        class Pair:
            a: Square
            b: Square

        def bigger(pair):
            assert isinstance(pair, Pair)
            return Pair(Square(pair.a.side + 1), pair.b)

        def area(square):
            return shapes.square.tell(square.area())

        with Grid("local", home={str(home)!r}) as grid:
            results = list(grid.map(bigger, [Pair(Square(1), Square(2))]))
            print(results, type(results[0]) is Pair, type(results[0].a) is Square)
            print(list(grid.map(area, [Square(3)])), list(grid.map(tell, [1])))
            print(list(grid.map(Square, [4])), list(grid.map(Square.area, [Square(5)])))
    """
    assert output(tmp_path, script).splitlines() == [
        "[Pair(a=Square(side=2), b=Square(side=2))] True True",
        "['9 m2'] ['1 m2']",
        "[Square(side=4)] [25]",
    ]


def test_ctrl_c_cancels_the_job(grid: Grid, home: Path, tmp_path: Path) -> None:
    """An interrupted program must not leave its job running."""
    script = f"""
        from batchlab import Grid
        from time import sleep
        with Grid("local", home={str(home)!r}) as grid:
            for _ in grid.map(lambda _: sleep(0.05), range(1000), name="interrupted"):
                print("going")
    """
    with start(tmp_path, script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    (job,) = (one for one in grid.client.jobs() if one["name"] == "interrupted")
    assert grid.wait(job["id"]).state == "CANCELLED"


def test_commands_that_start_a_grid_at_once_share_one_manager(tmp_path: Path) -> None:
    """Before, the second command failed: its manager found the lock taken before the record of the first manager
    existed."""
    home = Home(tmp_path / "home")
    batchlab = [sys.executable, "-P", "-m", "batchlab", "grid"]
    up = [*batchlab, "up", "--home", str(home.path)]  # Without pools, a command may find a grid that is up.
    begun = [subprocess.Popen(up, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    try:
        said = [one.communicate(timeout=60)[0] for one in begun]
        assert [one.returncode for one in begun] == [0] * 3, said
        record = home.record()
        assert record
        assert [pid for pid, words in processes_of(home.path).items() if "manager" in words] == [record.pid]
    finally:
        subprocess.run([*batchlab, "down", "--home", str(home.path)], check=True, timeout=60)
