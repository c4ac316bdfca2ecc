"""Tests of batchlab in an environment without the features that macOS lacks (tests.support.bare_posix)."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.bare_posix import LINUX_NAMES, command, name_collisions, system_calls

MAC = sys.platform == "darwin"


def check(done: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a command that must succeed."""
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


SELECTIONS = {
    "parts": (
        "tests/core/test_operating_system.py tests/contract/test_launcher.py tests/adapters/test_process_launcher.py "
        "-k portable or (process and not linux and not files)",
        "tests/contract/test_objects.py tests/contract/test_objects_files.py "
        "-k files and not (sim or gcs or moto or ministack or localstack)",
        "tests/contract/test_queue.py tests/contract/test_queue_waiting.py tests/contract/test_queue_sqlite.py "
        "-k sqlite and not faulty",
        "tests/contract/test_ledger.py tests/contract/test_ledger_file.py tests/contract/test_ledger_processes.py "
        "-k file and not (postgres or simpledb)",
        "tests/worker/test_crashes.py tests/worker/test_task_files.py tests/adapters/test_replies.py -k not fork",
    ),
    "grids": (
        "tests/system/test_command_line.py -k interrupted_run_resumes or death",
        "tests/system/test_python_api.py tests/system/test_python_api_lifecycle.py "
        "-k not fork and (lifecycle or any_object or files_travel or too_long or two_threads or closing_the_iterator)",
        "tests/system/test_replay_task.py -k (reproduced and local) or ctrl_c",
    ),
}
"""Paths of tests, and expressions that select some of them. The tests of a selection share one run of pytest, because
each run takes seconds to start."""


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_passes(name: str) -> None:
    paths: list[str] = []
    expressions: list[str] = []
    for selection in SELECTIONS[name]:
        files, _, expression = selection.partition(" -k ")
        paths += files.split()
        of_files = " or ".join(Path(file).name for file in files.split())
        expressions.append(f"(({of_files}) and ({expression}))")
    options = ["--all", "-n", "0", "-p", "no:cacheprovider", "-p", name_collisions.__name__]
    output = check(command.run(sys.executable, "-m", "pytest", *options, "-k", " or ".join(expressions), *paths))
    assert re.search(r"\b[1-9]\d* passed", output), output[-2000:]


# --- The first commands of the README -------------------------------------------------------------

QUICK_START = """\
set -euo pipefail
export PATH={bin}:$PATH BATCHLAB_HOME="$TMPDIR/home"
mkdir "$TMPDIR/Project" && cd "$TMPDIR/Project"
batchlab doctor
batchlab demo --files 20 --out demo
batchlab init myjob
batchlab run myjob/job.yaml --out results
batchlab run myjob/job.yaml --backend sim --seed 7
batchlab report html last
cat > squares.py <<'END'
{squares}
END
python squares.py
cat > limit.py <<'END'
from batchlab import Grid

def limit(_):
    import resource
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

with Grid("local", workers=1) as grid:
    print("open files:", *grid.map(limit, [0]))
END
python limit.py
batchlab grid up
trap 'batchlab grid down' EXIT
batchlab job submit myjob/job.yaml
batchlab job watch last
batchlab job why last
batchlab grid status
"""


def test_quick_start_runs_in_the_temporary_folder() -> None:
    """The folder of the grid has a long path with a symbolic link."""
    squares = (
        (ROOT / "README.md").read_text().partition("<!-- file: squares.py -->\n```python\n")[2].partition("```")[0]
    )
    script = QUICK_START.format(bin=Path(sys.executable).parent, squares=squares)
    printed = check(command.run("bash", "-c", script))
    assert "[0, 1, 4, 9, 16]" in printed
    assert "open files: 1024" in printed, "a worker raises the limit of macOS"
    assert "totals agree with the generator: yes" in printed
    assert printed.count("SUCCEEDED") >= 3


# --- The environment itself -----------------------------------------------------------------------

PROBE = """\
import ctypes, errno, fcntl, json, multiprocessing, os, resource, select, selectors, signal, socket, tempfile, time

libc = ctypes.CDLL(None, use_errno=True)

def failure(call):
    try:
        result = call()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result if isinstance(result, str) else ""

def system_call(*arguments):
    return failure(lambda: libc.syscall(*map(ctypes.c_long, arguments)))

def unix(address):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        unix.bind(address)

def group_of_zombies():
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit"], {}, setpgroup=0)
    time.sleep(0.5)
    os.killpg(pid, signal.SIGKILL)

print(json.dumps({
    "folders": [os.listdir(folder) for folder in ("/proc", "/sys")],
    "shm": os.path.exists("/dev/shm"),
    "descriptors": os.path.exists("/dev/fd/0"),
    "temporary": [len(tempfile.gettempdir()), os.path.realpath(tempfile.gettempdir()) != tempfile.gettempdir()],
    "absent": {name: system_call(number, 0, 0, 0, 0, 0) for name, number in NUMBERS.items()},
    "prctl": [failure(lambda: libc.prctl(option, 9, 0, 0, 0)) for option in (1, 36, 3)],
    "sockets": [failure(lambda: libc.socket(*pair)) for pair in ((1, 5), (16, 3))],
    "addresses": [failure(lambda: unix(one)) for one in ("\\0name", "x" * 104)],
    "fcntl": failure(lambda: libc.fcntl(0, 10, 9)),
    "temporary file": failure(lambda: libc.open(b"/tmp", 0o20200002, 0o600)),
    "another process": failure(lambda: libc.prlimit(os.getppid(), 7, None, None)),
    "fork": failure(os.fork),
    "group": failure(group_of_zombies),
    "start": multiprocessing.get_start_method(),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "names": [name for module in (os, select, signal, socket, time, fcntl) for name in NAMES if hasattr(module, name)],
    "selector": selectors.DefaultSelector.__name__,
}))
"""


@pytest.mark.skipif(MAC, reason="a Mac has no filter")
def test_what_macos_lacks_is_absent(tmp_path: Path) -> None:
    *_, column = system_calls.MACHINES[platform.machine()]
    numbers = {name: each[column] for name, each in system_calls.ABSENT.items() if each[column] is not None}
    values = f"NUMBERS, NAMES = {numbers!r}, {sorted(LINUX_NAMES)!r}\n"
    found = json.loads(check(command.run(sys.executable, "-c", values + PROBE)))
    assert found == {
        "folders": [[], []],
        "shm": False,
        "descriptors": True,
        "temporary": [48, True],
        "absent": dict.fromkeys(numbers, "ENOSYS"),
        "prctl": ["EINVAL", "EINVAL", ""],
        "sockets": ["EPROTONOSUPPORT", "EAFNOSUPPORT"],
        "addresses": ["ENOENT", "AF_UNIX path too long"],
        "fcntl": "EINVAL",
        "temporary file": "EINVAL",
        "another process": "ENOSYS",
        "fork": "ENOSYS",
        "group": "EPERM",
        "start": "spawn",
        "files": 256,
        "names": [],
        "selector": "PollSelector",
    }


def test_filter_is_short_enough_for_the_kernel() -> None:
    for machine in system_calls.MACHINES:
        assert len(system_calls.program(machine)) // 8 < 4096


def test_names_that_macos_does_not_distinguish_are_found(tmp_path: Path) -> None:
    for name in ("a/Report", "a/report", "b/caf\u00e9", "b/cafe\u0301", "c/report"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = sorted(name_collisions.collisions(tmp_path))
    assert [one.partition(": ")[0] for one in found] == [str(tmp_path / "a"), str(tmp_path / "b")]
