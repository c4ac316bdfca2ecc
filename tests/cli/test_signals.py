"""Ctrl-C at any point of a command."""

from __future__ import annotations

import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batchlab.cli import output
from tests.support import job_files as jobfiles
from tests.support.cli import runner


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    output.install_signal_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Thing:
    pass


class Interrupting:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def finalized() -> None:
    Interrupting()


def referred() -> None:
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None


@pytest.mark.parametrize("dropping", [finalized, referred])
def test_a_signal_that_python_drops_is_raised_again(dropping: Callable[[], None]) -> None:
    dropping()
    with pytest.raises(output.Stopped):
        time.sleep(10)


@pytest.mark.parametrize("dropping", [finalized, referred])
def test_one_that_is_dropped_in_code_of_users_is_too(dropping: Callable[[], None]) -> None:
    def run() -> None:
        with output.as_keyboard_interrupt():
            dropping()
            time.sleep(10)

    with pytest.raises(output.Stopped):
        run()


def test_other_finalizer_errors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    thing = Thing()
    _kept = weakref.ref(thing, lambda _: 1 / 0)
    del thing
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "    "], ids=["import", "task"])
def test_ctrl_c_ends_a_simulated_run_at_any_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """The command waits for a task process when the signal arrives. An error in the task process fails its task, and
    does not end the command."""
    code = (
        "import os, signal, time\ndef one(item):\n    pass\n"
        f"{place}os.kill(os.getppid(), signal.SIGINT); time.sleep(30); open('{tmp_path}/slept', 'w')\n"
    )
    files = {"job.yaml": jobfiles.MINIMAL, "work.py": code, "data/a": "1"}
    jobfiles.write(tmp_path, files)
    run = runner(monkeypatch, capsys)
    options = ("--backend", "sim", "--out", tmp_path / "out")
    assert run("run", tmp_path / "job.yaml", *options) == (130, "", "")
    assert not (tmp_path / "slept").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_code_of_users_meets_a_keyboard_interrupt(number: signal.Signals) -> None:
    caught = []

    def run() -> None:
        with output.as_keyboard_interrupt():
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt as error:
                caught.append(error)
                raise

    with pytest.raises(output.Stopped) as ended:
        run()
    assert (len(caught), ended.value.code) == (1, output.INTERRUPTED)
    with pytest.raises(output.Stopped):
        signal.raise_signal(number)
