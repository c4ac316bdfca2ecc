"""The one composition root: a backend's descriptor, and the adapters it names.

A backend is a named choice of adapters, written down as data in `backends/<name>/backend.toml`.
Adapters are imported here and nowhere else, each only when it is named.
"""

from __future__ import annotations

import os
import random
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchlab import package_data
from batchlab.errors import UsageError
from batchlab.home import Home
from batchlab.manager.live import ManagerSettings
from batchlab.model import Pool
from batchlab.patience import Patience
from batchlab.ports import Clock, Ids, Ledger, Objects, Queue
from batchlab.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from batchlab.adapters.process import ProcessLauncher
    from batchlab.fleet.group import ManagedFleet


@dataclass(frozen=True, slots=True)
class Backend:
    """A descriptor as read from its file."""

    name: str
    description: str
    objects: str
    queue: str
    ledger: str
    fleet: str
    manager: ManagerSettings
    worker: WorkerSettings
    pools: tuple[Pool, ...]

    def open_clock(self) -> Clock:
        from batchlab.adapters.clock import WallClock

        return WallClock()

    def open_ids(self) -> Ids:
        from batchlab.adapters.clock import RandomIds

        return RandomIds()

    def open_objects(self, home: Home) -> Objects:
        _only("objects", self.objects, "files")
        from batchlab.adapters.objects import open_local

        home.make()
        return open_local(home.objects)

    def open_queue(self, home: Home, clock: Clock) -> Queue:
        _only("queue", self.queue, "sqlite")
        from batchlab.adapters.sqlite_queue import SqliteQueue

        home.make()
        return SqliteQueue(home.queue_file, clock)

    def open_ledger(self, home: Home) -> Ledger:
        _only("ledger", self.ledger, "sqlite")
        from batchlab.adapters.sql import open_sqlite

        home.make()
        return open_sqlite(home.ledger_file)

    def open_launcher(self, home: Home, clock: Clock) -> ProcessLauncher:
        _only("fleet", self.fleet, "process")
        from batchlab.adapters.process import ProcessLauncher

        def argv(pool: Pool, instance: str) -> Sequence[str]:
            return [
                *(sys.executable, "-P", "-m", "batchlab", "worker"),
                *("--home", str(home.path), "--backend", self.name),
                *("--pool", pool.name, "--slots", str(pool.slots), "--instance", instance),
            ]

        return ProcessLauncher(home.fleet, argv, clock, dict(os.environ))

    def open_fleet(self, home: Home, launcher: ProcessLauncher, clock: Clock) -> ManagedFleet:
        from batchlab.adapters.state_file import StateFile
        from batchlab.fleet.group import ManagedFleet

        return ManagedFleet(
            launcher,
            clock,
            self.open_ids(),
            StateFile(home.fleet / "groups.json"),
            drain_s=self.worker.drain_s + 5.0,
        )


def patience() -> Patience:
    """For real backends: jitter that differs from process to process."""
    return Patience(random.Random())  # noqa: S311 - jitter, not a secret


def names() -> list[str]:
    """The backends there are."""
    return sorted(p.parent.name for p in package_data.folder("backends").glob("*/backend.toml"))


def load(name: str) -> Backend:
    """A backend's descriptor; UsageError naming those there are."""
    path = package_data.folder("backends") / name / "backend.toml"
    if name not in names():
        raise UsageError(
            f"There is no backend {name!r}.", remedy=f"There are {', '.join(names())}."
        )
    doc = tomllib.loads(path.read_text())
    return Backend(
        name,
        doc["description"],
        doc["objects"],
        doc["queue"],
        doc["ledger"],
        doc["fleet"],
        ManagerSettings(**doc.get("manager", {})),
        WorkerSettings(**doc.get("worker", {})),
        tuple(_pool(p) for p in doc["pools"]),
    )


def with_pools(backend: Backend, pools: Sequence[Pool]) -> Backend:
    """The backend with the user's own pools in place of its default ones."""
    return replace(backend, pools=tuple(pools)) if pools else backend


def _pool(doc: dict[str, Any]) -> Pool:
    if doc.get("max_size") == "cpus":
        doc = {**doc, "max_size": max(2, os.cpu_count() or 1)}
    return Pool(**doc)


def _only(port: str, named: str, known: str) -> None:
    if named != known:
        raise UsageError(
            f"This backend's {port} adapter {named!r} does not run in a process of its own.",
            remedy="`batchlab run FILE --backend sim` runs a job in it.",
        )
