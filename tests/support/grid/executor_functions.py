"""Functions that the tests of executors send to workers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any


def capture(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


class Gate:
    """A gate that blocks calls until it is opened."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self.path = folder / name

    def open(self) -> None:
        self.path.touch()

    def wait(self, value: Any = None) -> Any:
        """Wait until the gate is open. Workers call this method."""
        while not self.path.exists():
            time.sleep(0.01)
        return value


class Counting:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


class HeldUp:
    """An int that cannot be pickled before it is released."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def __reduce__(self) -> Any:
        assert self.let_go.wait(20)
        return int, ()
