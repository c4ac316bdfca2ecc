"""Functions that every peer runs as tasks.

A call is the name of a task and its arguments. Peers that run commands call `main`, so this module imports only modules
that start fast (`python -I -S`).
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def noop(index: int) -> int:
    """Return the square of `index`, so that a result at a wrong position is found."""
    return index * index


def busy(index: int, ms: float) -> int:
    """Use `ms` of this thread's CPU time. Other load on the machine does not make the task shorter."""
    end = time.thread_time() + ms / 1000
    while time.thread_time() < end:
        pass
    return index


def nap(index: int, ms: float) -> int:
    """Sleep for `ms`."""
    time.sleep(ms / 1000)
    return index


def transform(index: int, source: str, target_folder: str) -> list[int]:
    """Sum the column `paid` of a CSV file of claims, write the sum to a JSON file, and return rows and cents."""
    cents = rows = 0
    with open(source, newline="") as file:
        reader = csv.reader(file)
        column = next(reader).index("paid")
        for row in reader:
            cents += round(float(row[column]) * 100)
            rows += 1
    target = os.path.join(target_folder, f"{index:05}.json")
    partial = f"{target}.{os.getpid()}.tmp"
    with open(partial, "w") as file:
        json.dump([rows, cents], file)
    os.replace(partial, target)
    return [rows, cents]


def logged_nap(index: int, ms: float, log: str) -> int:
    """Sleep for `ms`, and append the start (S) and the end (E) to `log` with the pid and the time."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, b"S %d %d %.6f\n" % (index, os.getpid(), time.monotonic()))
        time.sleep(ms / 1000)
        os.write(descriptor, b"E %d %d %.6f\n" % (index, os.getpid(), time.monotonic()))
    finally:
        os.close(descriptor)
    return index


def bundle(task: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """Run several calls of one task, as a user does who bundles tasks by hand (`--bundle`)."""
    function = TASKS[task]
    return [function(*arguments) for arguments in calls]


TASKS: Mapping[str, Callable[..., Any]] = {
    "noop": noop,
    "busy": busy,
    "nap": nap,
    "transform": transform,
    "logged_nap": logged_nap,
    "bundle": bundle,
}


def call(task: str, arguments: Sequence[Any]) -> Any:
    """Run one task."""
    return TASKS[task](*arguments)


def main() -> None:
    """Run the task that the first argument names, once for each JSON list of arguments, and print JSON results."""
    for arguments in sys.argv[2:]:
        print(json.dumps(call(sys.argv[1], json.loads(arguments))))
