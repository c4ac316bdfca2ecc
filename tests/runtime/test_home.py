"""The record of a manager in a home, and the lock that proves that the record is current."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from batchlab.core.errors import Refused
from batchlab.runtime.home import Home, ManagerRecord


def a_record(pid: int) -> ManagerRecord:
    return ManagerRecord("http://127.0.0.1:1", pid, "manager-1", "local")


def test_a_record_counts_while_its_manager_holds_the_lock(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    assert home.record() is None
    with home.lock():
        assert home.record() is None, "it has not said yet where it listens"
        home.write_record(a_record(os.getpid()))
        assert home.record() == a_record(os.getpid())
    assert home.record() is None
    assert home.last_owner() == "manager-1"


@pytest.mark.parametrize("loss", ["delete", "move", "replace", "delete the parent", "put a file there"])
def test_a_manager_notices_the_loss_of_its_folder(loss: str, tmp_path: Path) -> None:
    home = Home(tmp_path / "parent" / "h")
    with home.lock() as has_folder:
        assert has_folder()
        assert home.is_made
        home.path.rename(tmp_path / "moved")
        match loss:
            case "delete":
                shutil.rmtree(tmp_path / "moved")
            case "replace":
                with Home(home.path).lock() as has_other_folder:
                    assert has_other_folder()
            case "delete the parent":
                home.path.parent.rmdir()
            case "put a file there":
                home.path.touch()
        assert not has_folder()
        assert home.is_made == (loss == "replace")


def test_a_folder_without_the_marker_is_not_the_folder_of_a_grid(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.objects.mkdir()
    assert not home.is_made


def test_the_next_managers_lock_does_not_vouch_for_the_record_before_it(tmp_path: Path) -> None:
    """A command that ends the grid during a manager's start must not signal a process that ended long ago."""
    home = Home(tmp_path / "h")
    home.make()
    home.write_record(a_record(os.getpid() + 1))
    with home.lock():
        assert home.record() is None


def test_a_second_manager_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    with home.lock(), pytest.raises(Refused, match="grid down"), Home(tmp_path / "h").lock():
        pass


def test_readers_do_not_block_the_start_of_a_manager(tmp_path: Path) -> None:
    """A starting command looks for the manager all the time, and each look takes the lock."""
    home = Home(tmp_path / "h")
    with home.lock():
        home.write_record(a_record(os.getpid()))
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            home.record()

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(300):
            with home.lock():
                pass
    finally:
        done.set()
        for looker in lookers:
            looker.join()
