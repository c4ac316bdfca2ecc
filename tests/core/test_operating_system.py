"""Contract of both implementations of the package `operating_system`, which Linux can run."""

from __future__ import annotations

import inspect
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest

from batchlab.core.operating_system import PORTABLE_VARIABLE, portable, portable_processes, processes
from tests.support.processes import open_files

WITHIN_S = 30.0
THIS: list[ModuleType] = [portable]
OTHERS: list[ModuleType] = [portable_processes]
if sys.platform == "linux":
    from batchlab.core.operating_system import linux, linux_processes

    THIS.append(linux)
    OTHERS.append(linux_processes)


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


@pytest.fixture(params=THIS, ids=name_of)
def this(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture(params=OTHERS, ids=name_of)
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One implementation, which the functions of `processes` also call."""
    module: ModuleType = request.param
    for name in ("boot_id", "open_watch", "start_mark", "table"):
        monkeypatch.setattr(processes, name, getattr(module, name))
    return module


@contextmanager
def program(code: str = "input()", *, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a session of its own, and wait until the code prints a line."""
    source = "print('up', flush=True)\n" + textwrap.dedent(code)
    environment = {**os.environ, **(env or {})}
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", source]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, start_new_session=True, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never became true"
        time.sleep(0.005)


def readable(watch: processes.ProcessWatch, within_s: float) -> bool:
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def line_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    return int(process.stdout.readline())


# --- Both implementations -------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [THIS, OTHERS], ids=["this", "others"])
def test_both_implementations_offer_the_same_functions(pair: list[ModuleType]) -> None:
    offered = [
        {name: inspect.signature(each) for name, each in inspect.getmembers(module, inspect.isfunction)}
        for module in pair
    ]
    public = {name: signature for name, signature in offered[0].items() if not name.startswith("_")}
    assert len(public) > 5
    for other in offered:
        assert public == {name: other.get(name) for name in public}


@pytest.mark.parametrize(("value", "implementation"), [("", "linux"), ("1", "portable")])
def test_variable_selects_the_portable_implementation(value: str, implementation: str) -> None:
    code = (
        "from batchlab.core import operating_system as room; from batchlab.core.operating_system import processes;"
        "print(room.cpu_count.__module__, processes.table.__module__)"
    )
    env = {**os.environ, PORTABLE_VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    names = [name.rpartition(".")[2] for name in done.stdout.split()]
    assert names == [implementation, f"{implementation}_processes"]


@pytest.mark.parametrize("value", ["", "1"])
def test_child_process_of_a_task_does_not_import_psutil(value: str) -> None:
    code = "import sys, batchlab.worker.child; print('psutil' in sys.modules)"
    env = {**os.environ, PORTABLE_VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- This process ---------------------------------------------------------------------------------


def test_cpus_memory_and_clock_are_plausible(this: ModuleType) -> None:
    assert 1 <= this.cpu_count() <= (os.cpu_count() or 1)
    assert 1 << 20 < this.resident_bytes() < 1 << 40
    before_s = this.since_boot_s()
    time.sleep(0.01)
    assert 0.01 <= this.since_boot_s() - before_s < WITHIN_S


def test_peak_contains_released_memory(this: ModuleType) -> None:
    code = f"""
        from {this.__name__} import peak_bytes
        peak_bytes()
        held = bytearray(64 << 20)
        del held
        print(peak_bytes(), flush=True)
        print(peak_bytes(), flush=True)
        input()
    """
    with program(code) as process:
        assert 64 << 20 < line_of(process) < 4 << 30
        after = line_of(process)
        assert after < 64 << 20 if name_of(this) == "linux" else after > 64 << 20, "only Linux resets the peak"


@pytest.mark.parametrize(("soft", "hard", "raised"), [(256, 4096, 1024), (256, 512, 512), (2048, 4096, 2048)])
def test_limit_of_open_files_is_raised(soft: int, hard: int, raised: int) -> None:
    code = f"""
        import resource
        from batchlab.core.operating_system import raise_file_limit
        resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
        raise_file_limit()
        print(*resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(raised), str(hard)]


def test_data_is_flushed_to_a_file(this: ModuleType, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"data")
    this.flush_data(descriptor)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        this.flush_data(descriptor)


def test_end_of_a_pipe_kills_the_process_group(this: ModuleType) -> None:
    """The program of a task must not outlive the worker."""
    life, ours = os.pipe()
    code = f"""
        import os, subprocess, sys, time
        from {this.__name__} import end_with_pipe
        end_with_pipe(int(sys.stdin.readline()))
        print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
        time.sleep(100)
    """
    source = "print('up', flush=True)\n" + textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        pass_fds=[life],
    ) as process:
        os.close(life)
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        process.stdin.write(f"{life}\n")
        process.stdin.flush()
        task = line_of(process)
        assert process.poll() is None
        os.close(ours)
        assert process.wait(WITHIN_S) == -signal.SIGKILL
        until(lambda: processes.start_mark(task) is None)


def test_pipe_that_has_already_ended_ends_the_process(this: ModuleType) -> None:
    code = f"""
        import os, time
        from {this.__name__} import end_with_pipe
        life, ours = os.pipe()
        os.close(ours)
        end_with_pipe(life)
        time.sleep(100)
    """
    with program(code) as process:
        assert process.wait(WITHIN_S) in (0, -signal.SIGKILL)


def test_process_ends_with_its_parent(this: ModuleType) -> None:
    inner = f"from {this.__name__} import end_with_parent; import time; end_with_parent(); print(1); time.sleep(100)"
    code = f"""
        import subprocess, sys
        inner = subprocess.Popen([sys.executable, "-u", "-c", {inner!r}], stdout=subprocess.PIPE)
        inner.stdout.readline()
        print(inner.pid, flush=True)
        input()
    """
    with program(code) as process:
        child = line_of(process)
        assert processes.start_mark(child) is not None
        process.kill()
        process.wait(WITHIN_S)
        until(lambda: processes.start_mark(child) is None)


# --- Other processes ------------------------------------------------------------------------------


def test_start_mark_identifies_a_process_until_it_ends(other: ModuleType) -> None:
    with program() as process:
        mark = other.start_mark(process.pid)
        assert isinstance(mark, int)
        assert mark == other.start_mark(process.pid)
        assert mark != other.start_mark(os.getpid())
        assert processes.is_alive(process.pid, mark, other.boot_id())
        assert not processes.is_alive(process.pid, mark + 1, other.boot_id())
        assert not processes.is_alive(process.pid, mark, "another boot")
        assert other.parent_of(process.pid) == os.getpid()
        process.kill()
        until(lambda: bool(other.child_has_exited(process.pid)))
        assert other.start_mark(process.pid) is None, "a zombie has ended"
        assert other.parent_of(process.pid) == os.getpid()
        process.wait()
        assert other.start_mark(process.pid) is None
        assert other.parent_of(process.pid) is None


def test_start_mark_is_the_same_for_every_process(other: ModuleType) -> None:
    """A record of a process outlives the process that wrote it."""
    code = f"from {other.__name__} import start_mark; print(start_mark({os.getpid()}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == other.start_mark(os.getpid())


def test_no_process_has_the_pid_0(other: ModuleType) -> None:
    """A record without a pid has the pid 0."""
    assert processes.watch(0, 0, other.boot_id()) is None


def test_watch_reports_the_end_and_sends_signals(other: ModuleType) -> None:
    with program("import signal; signal.sigwait([signal.SIGTERM]); input()") as process:
        mark = other.start_mark(process.pid)
        watch = processes.watch(process.pid, mark, other.boot_id())
        assert watch
        assert not readable(watch, 0.2)
        watch.send_signal(signal.SIGKILL)
        assert readable(watch, WITHIN_S)
        assert readable(watch, 0.0), "the descriptor stays readable"
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            watch.send_signal(signal.SIGTERM)
        watch.close()
        watch.close()
        assert processes.watch(process.pid, mark, other.boot_id()) is None
        with pytest.raises(ProcessLookupError):
            other.open_watch(process.pid)


def test_watch_of_a_zombie_is_readable_at_once(other: ModuleType) -> None:
    """A launch may end before it is watched."""
    with program("") as process:
        until(lambda: bool(other.child_has_exited(process.pid)))
        watch = other.open_watch(process.pid)
        assert readable(watch, WITHIN_S)
        watch.close()


def test_watch_is_not_fooled_by_a_reused_pid(other: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets the pid between the check and the watch."""
    with program() as process:
        mark = other.start_mark(process.pid)
        marks = iter([mark, mark + 1])
        monkeypatch.setattr(processes, "start_mark", lambda _: next(marks))
        before = open_files()
        assert processes.watch(process.pid, mark, other.boot_id()) is None
        assert open_files() == before


def test_portable_watch_does_not_signal_a_reused_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    with program() as process:
        watch = portable_processes.open_watch(process.pid)
        monkeypatch.setattr(portable_processes, "start_mark", lambda _: 7)
        with pytest.raises(ProcessLookupError):
            watch.send_signal(signal.SIGKILL)
        assert readable(watch, WITHIN_S), "the watched process has ended"
        watch.close()
        assert process.poll() is None


def test_child_is_seen_to_exit_and_is_not_reaped(other: ModuleType) -> None:
    with program() as process:
        assert not other.child_has_exited(process.pid)
        process.kill()
        until(lambda: bool(other.child_has_exited(process.pid)))
        assert other.child_has_exited(process.pid)
        assert processes.exit_code(process.pid) == -signal.SIGKILL
        process.returncode = -signal.SIGKILL
        with pytest.raises(ChildProcessError):
            other.child_has_exited(process.pid)
    with pytest.raises(ChildProcessError):
        other.child_has_exited(os.getppid())
    assert processes.exit_code(os.getppid()) is None


def test_table_has_parents_groups_and_memory(other: ModuleType) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '100'], process_group=0).pid, flush=True); input()"
    with program(code + "\nheld = bytearray(64 << 20)") as process:
        child = line_of(process)
        rows = {row.pid: row for row in other.table()}
        assert rows[process.pid][:3] == (process.pid, os.getpid(), process.pid)
        assert rows[child][:3] == (child, process.pid, child)
        assert 1 << 20 < rows[process.pid].resident_bytes < 1 << 30
        assert processes.family(process.pid) == {process.pid, child}
        processes.kill_family(process.pid)
        assert process.wait() == -signal.SIGKILL
        until(lambda: other.start_mark(child) is None)


def test_processes_of_other_users_do_not_end_the_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess\nfor _ in range(3):\n"
        "    print(subprocess.Popen(['sleep', '100'], start_new_session=True).pid, flush=True)\ninput()"
    )
    with program(code) as process:
        children = [line_of(process) for _ in range(3)]
        foreign = [pid for pid in processes.family(process.pid) if pid != process.pid][:2]
        kill = os.kill

        def kill_own(pid: int, number: int) -> None:
            if pid in foreign:
                raise PermissionError(pid)
            kill(pid, number)

        def refuse(group: int, _: int) -> None:
            raise PermissionError(group)

        monkeypatch.setattr(os, "kill", kill_own)
        monkeypatch.setattr(os, "killpg", refuse)
        try:
            processes.kill_family(process.pid)
            (own,) = set(children) - set(foreign)
            until(lambda: processes.start_mark(own) is None)
        finally:
            for pid in foreign:
                kill(pid, signal.SIGKILL)


def test_group_without_a_running_process_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a group whose processes have exited and are not reaped, macOS raises PermissionError."""
    with subprocess.Popen(["true"], process_group=0) as process:
        until(lambda: processes.start_mark(process.pid) is None)
        processes.kill_group(process.pid)
        process.wait()
        processes.kill_group(process.pid)
    refused = Mock(side_effect=PermissionError)
    monkeypatch.setattr(os, "killpg", refused)
    processes.kill_group(process.pid)
    refused.assert_called_once_with(process.pid, signal.SIGKILL)


def test_stopped_process_is_seen(other: ModuleType) -> None:
    with program() as process:
        assert not other.is_stopped(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: bool(other.is_stopped(process.pid)))
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: not other.is_stopped(process.pid))
    assert not other.is_stopped(process.pid)


def test_session_leader_is_found_by_its_environment(other: ModuleType) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, flush=True); input()"
    value = f"leader-{os.getpid()}"
    with program(code, env={"BATCHLAB_TEST": value}) as process:
        child = line_of(process)
        # A child has no environment for a moment after its start.
        until(
            lambda: sorted(other.with_variable("BATCHLAB_TEST")) == sorted((pid, value) for pid in (process.pid, child))
        )
        assert other.is_session_leader(process.pid)
        assert not other.is_session_leader(child)
        assert processes.session_leader("BATCHLAB_TEST", value) == process.pid
        assert processes.session_leader("BATCHLAB_TEST", value + "-other") is None
        processes.kill_family(process.pid)


def test_owner_of_a_connection_is_found(other: ModuleType) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        program() as process,
    ):
        port = client.getsockname()[1]
        assert other.owns_port([process.pid, os.getpid()], port)
        assert not other.owns_port([process.pid], port)
    assert not other.owns_port([os.getpid(), process.pid], port)


def test_this_process_is_not_in_a_container_without_its_name(other: ModuleType) -> None:
    assert not other.is_in_container(os.getpid(), "0123456789abcdef" * 4)
