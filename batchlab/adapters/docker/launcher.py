"""Launcher port over a Docker Engine. Each instance is a Docker container.

Invariant: A new launcher finds every container of a killed launcher, and the removal by label also finds forgotten
containers.

The deadline of a draining instance is in `<folder>/ending/<instance>.json`, because Docker cannot store the deadline.
Invariant: each deadline file is for one container, so the file of an older container is ignored. The file
`<folder>/logs/<instance>.log` contains the output of an ended instance.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from batchlab.adapters.aws.metadata_server import Metadata, Signals
from batchlab.adapters.docker.container import (
    BOOTED,
    INSTANCE,
    LAUNCHED,
    LIVING,
    STOP,
    Template,
    container_environment,
    container_settings,
    create_container,
    end_text,
    instance_labels,
    metadata_of,
    save_end,
    send_signal,
    start_container,
)
from batchlab.adapters.docker.engine import Engine, EventStream, remove_container
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Unreachable, UsageError
from batchlab.core.instance_types import Catalog
from batchlab.core.model import Machine, Pool
from batchlab.core.ports import ANY_MACHINE, KEEP_ENDED_S, Clock
from batchlab.core.text import TERMINATED

log = logging.getLogger(__name__)


class StopDeadlines:
    """Deadlines of draining instances, stored with one file for each instance in `folder`."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock

    def note(self, instance: str, container: str, grace_s: float) -> None:
        """Store the deadline of the instance, which is `grace_s` seconds from now.

        If the disk is full, the deadline is not written to disk, and a later launcher will not know the deadline. The
        current launcher still ends the instance at the deadline.
        """
        note = {"container": container, "by_s": self._clock.now_s() + grace_s}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(instance), json.dumps(note))
        except OSError as error:
            log.warning("the deadline of the instance cannot be stored: %s", error, extra={"instance": instance})

    def left_s(self, instance: str, container: str) -> float | None:
        """Return the seconds until the deadline of the instance, or None if the instance does not have a deadline."""
        try:
            note = json.loads(self._path(instance).read_text())
            if note["container"] != container:
                return None
            return max(0.0, float(note["by_s"]) - self._clock.now_s())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            # A power loss has damaged the deadline file, but the file proves that a deadline exists.
            return 0.0

    def forget(self, instance: str) -> None:
        """Delete the deadline of an ended instance."""
        self._path(instance).unlink(missing_ok=True)

    def _path(self, instance: str) -> Path:
        return self._folder / f"{instance}.json"


_RETRY = "%s The launcher tries again at the next check."

SETTLED_S = 1.0
"""Seconds after the start from which a container reliably receives signals.

Docker may report a container as started shortly before its program runs. A container may lose a signal that is sent in
the first `SETTLED_S` seconds.
"""


@dataclass(slots=True)
class _Container:
    """State of one container. `id` is "" while the container is being created."""

    instance: str
    id: str = ""
    booted_s: float = 0.0
    """Epoch seconds at which the container is to start."""
    boot: asyncio.Task[None] | None = None
    is_waiting: bool = False
    """Whether the container is created, but not started or starting."""
    settled_s: float = 0.0
    """The event loop's time from which the container reliably receives signals."""
    stop: str = "SIGTERM"
    sending_stop: asyncio.Task[None] | None = None
    is_stop_sent: bool = False
    due_s: float | None = None
    """The event loop's time at which the container is killed."""
    kill: asyncio.TimerHandle | None = None
    killing: asyncio.Task[None] | None = None
    ended: str | None = None
    ended_s: float = 0.0
    """Monotonic time at which the container ended."""


class ContainerLauncher:
    """The Launcher port over Docker containers. Only one launcher may use a set of `labels` at a time.

    `labels` are set on every container and name its owner (`batchlab.grid=<grid>`). `template` returns the settings of
    a pool's containers. A container gets the resources of its instance type times `scale`. A container is created at
    once and started `boot_s` seconds later, like the boot of a machine. The launcher sets `changed` when an instance
    ends. The task that waits for `changed` clears `changed`. `signals` returns the announcements of the metadata
    service to an instance.
    """

    def __init__(
        self,
        template: Callable[[Pool], Template],
        catalogue: Catalog,
        clock: Clock,
        folder: Path,
        *,
        grid: str,
        labels: Mapping[str, str],
        engine: Engine | None = None,
        scale: float = 1.0,
        boot_s: float = 0.0,
        signals: Callable[[str], Signals] = lambda _: Signals(),
    ) -> None:
        self.changed = asyncio.Event()
        self.engine = engine or Engine()
        self._template = template
        self._catalogue = catalogue
        self._clock = clock
        self._deadlines = StopDeadlines(folder / "ending", clock)
        self._logs = folder / "logs"
        self._grid = grid
        self._labels = dict(labels)
        self._scale = scale
        self._boot_s = boot_s
        self._signals = signals
        self._containers: dict[str, _Container] = {}
        self._is_refreshed = False
        self._is_closing = False
        self._refreshing = asyncio.Lock()
        self._events: EventStream | None = None
        self._events_seen = 0
        self._addresses: tuple[int, Mapping[str, Metadata]] = (-1, {})

    # --- The port --------------------------------------------------------------------------------

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        await self._adopt_all()
        if instance in self._containers:
            raise AlreadyExists(f"Instance {instance} already exists.")
        booted_s = self._clock.now_s() + self._boot_s
        settings = self._settings(pool, instance, machine, booted_s)
        name = f"batchlab-{self._grid}-{instance}"
        container = _Container(instance, booted_s=booted_s, stop=settings["stop_signal"])
        self._containers[instance] = container
        try:
            container.id = await self.engine.run(f"The container {name}", partial(create_container, name, settings))
        except BaseException:
            del self._containers[instance]
            raise
        self._boot(container)

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        """Ask the instance to stop, and kill the instance after `grace_s` seconds.

        Raise BackendError if Docker cannot send the stop signal. The deadline of the instance also holds if Docker
        cannot send the signal.
        """
        await self._adopt_all()
        container = self._containers.get(instance)
        if container is None or container.ended is not None:
            return
        due_s = asyncio.get_running_loop().time() + grace_s
        if container.due_s is None or due_s < container.due_s:
            # The deadline is stored before the signal is sent. If this process dies between storing the deadline and
            # sending the stop signal, the next launcher sends the signal.
            self._deadlines.note(instance, container.id, grace_s)
            self._set_deadline(container, due_s)
        if container.is_waiting:
            await self._cancel_start(container)
        else:
            await self._send_stop(container)

    async def running(self) -> Mapping[str, str | None]:
        await self._refresh()
        return {name: container.ended for name, container in self._containers.items()}

    async def close(self, *, kill: bool) -> None:
        """Release the resources of all instances without ending them.

        With `kill`, end all instances at once and remove their containers.
        """
        self._is_closing = True
        for container in self._containers.values():
            for handle in (container.kill, container.boot, container.sending_stop, container.killing):
                if handle is not None:
                    handle.cancel()
        try:
            if kill:
                await self._refresh()
                await asyncio.gather(*map(self._remove, list(self._containers.values())))
        finally:
            if self._events is not None:
                await asyncio.to_thread(self._events.close)
            await self.engine.close()

    # --- For the metadata service ----------------------------------------------------------------

    async def metadata(self, address: str) -> Metadata | None:
        """Return the instance that now has `address`, with its announcements, or None if no instance has `address`.

        Raise Unreachable while Docker does not answer.
        """
        metadata = (await self._by_address()).get(address)
        return metadata and replace(metadata, signals=self._signals(metadata.instance))

    async def _by_address(self) -> Mapping[str, Metadata]:
        # An address may pass from one container to the next, so the cached result is valid only until Docker reports an
        # event.
        await self._adopt_all()
        happened, cached = self._addresses
        if happened == self._events_seen and self._events is not None and self._events.is_open:
            return cached
        happened = self._events_seen
        by_address: dict[str, Metadata] = {}
        for row in await self._list(all_=False):
            for network in row["NetworkSettings"]["Networks"].values():
                if address := network["IPAddress"]:
                    by_address[address] = metadata_of(row, address)
        self._addresses = happened, by_address
        return by_address

    # --- Creating and starting -------------------------------------------------------------------

    def _settings(self, pool: Pool, instance: str, machine: Machine, booted_s: float) -> Mapping[str, Any]:
        template = self._template(pool)
        kind = machine.type or template.type
        try:
            share = self._catalogue.share(kind, self._scale) if kind else None
        except UsageError as error:
            # The unknown instance type comes from an Auto Scaling group, so the fleet must see a failed launch and not
            # a UsageError.
            raise BackendError(error.message, remedy=error.remedy) from error
        env = container_environment(template, pool, instance, machine, kind)
        tags = instance_labels(pool, instance, machine, kind, self._clock.now_s(), booted_s)
        return container_settings(template, instance, share, env, {**template.labels, **self._labels, **tags})

    def _boot(self, container: _Container) -> None:
        container.is_waiting = True
        container.boot = asyncio.create_task(self._start(container), name="boot")

    async def _start(self, container: _Container) -> None:
        wait_s = min(self._boot_s, container.booted_s - self._clock.now_s())
        try:
            await asyncio.sleep(max(0.0, wait_s))
            container.is_waiting = False
            container.settled_s = math.inf
            await self._run(container, partial(start_container, container.id))
            container.settled_s = asyncio.get_running_loop().time() + SETTLED_S
            if container.due_s is not None:
                await self._send_stop(container)
        except Unreachable as error:
            container.settled_s = 0.0
            log.warning(_RETRY, error)
        except BackendError as error:
            self._end(container, f"cannot be started: {error}")
        finally:
            container.is_waiting = False
            container.boot = None

    async def _cancel_start(self, container: _Container) -> None:
        """End a container that has not been started."""
        if container.boot is not None:
            container.boot.cancel()
        self._end(container, TERMINATED)
        await self._remove(container)

    # --- Ending ----------------------------------------------------------------------------------

    async def _run(self, container: _Container, call: Callable[[Any], object]) -> Any:
        return await self.engine.run(f"Instance {container.instance}", call)

    async def _signal(self, container: _Container, name: str) -> None:
        await self._run(container, partial(send_signal, container.id, name))

    async def _send_stop(self, container: _Container) -> None:
        """Send the stop signal now, or as soon as the container can receive signals."""
        if container.is_stop_sent or container.sending_stop is not None:
            return
        wait_s = container.settled_s - asyncio.get_running_loop().time()
        if wait_s <= 0.0:
            await self._signal(container, container.stop)
            container.is_stop_sent = True
        elif wait_s <= SETTLED_S:
            container.sending_stop = asyncio.create_task(self._send_stop_later(container, wait_s), name="ask")

    async def _send_stop_later(self, container: _Container, wait_s: float) -> None:
        try:
            await asyncio.sleep(wait_s)
            container.sending_stop = None
            await self._send_stop(container)
        except BackendError as error:
            log.warning(_RETRY, error)

    def _set_deadline(self, container: _Container, due_s: float) -> None:
        container.due_s = due_s
        if container.kill is not None:
            container.kill.cancel()
        container.kill = asyncio.get_running_loop().call_at(due_s, self._kill, container)

    def _kill(self, container: _Container) -> None:
        if container.ended is None and container.killing is None:
            container.killing = asyncio.create_task(self._send_kill(container), name="kill")

    async def _send_kill(self, container: _Container) -> None:
        try:
            await self._signal(container, "SIGKILL")
        except BackendError as error:
            log.warning(_RETRY, error)
        finally:
            container.killing = None

    async def _remove(self, container: _Container) -> None:
        """Save the output of the container and remove the container, even if the container is running."""
        if container.ended is None:
            await self._signal(container, "SIGKILL")
            await self._save_end(container)
        await self._run(container, lambda api: remove_container(api, container.id))
        self._deadlines.forget(container.instance)

    def _end(self, container: _Container, ended: str) -> None:
        container.ended = ended
        container.ended_s = self._clock.monotonic_s()
        if container.kill is not None:
            container.kill.cancel()
        self.changed.set()

    def _is_late(self, container: _Container) -> bool:
        return container.due_s is not None and asyncio.get_running_loop().time() >= container.due_s

    # --- State of containers ---------------------------------------------------------------------

    async def _adopt_all(self) -> None:
        """Adopt the containers of earlier launchers at the first call."""
        if not self._is_refreshed:
            await self._refresh()

    async def _refresh(self) -> None:
        """Update the known containers from Docker's list."""
        if self._events is None:
            self._events = EventStream(self.engine, partial(self._on_event, asyncio.get_running_loop()))
        async with self._refreshing:
            before = [c for c in self._containers.values() if c.id and c.ended is None]
            rows = await self._list(all_=True)
            for row in sorted(rows, key=lambda row: float(row["Labels"].get(LAUNCHED, 0))):
                await self._update(row)
            listed = {row["Id"] for row in rows}
            for container in before:
                if container.id not in listed and container.ended is None:
                    self._end(container, "its container was removed")
            await self._forget()
            self._is_refreshed = True

    async def _list(self, *, all_: bool) -> Sequence[Mapping[str, Any]]:
        wanted = [f"{name}={value}" for name, value in self._labels.items()]
        filters = {"label": [*wanted, INSTANCE]}
        return await self.engine.run("The instances", lambda api: api.containers(all=all_, filters=filters))

    async def _update(self, row: Mapping[str, Any]) -> None:
        container = self._containers.get(row["Labels"][INSTANCE])
        if container is None:
            container = self._adopt(row)
        if container.id != row["Id"] or container.ended is not None:
            return
        if row["State"] == "created":
            if container.boot is not None or self._is_closing:
                return
            if container.due_s is None:
                self._boot(container)
            else:
                await self._cancel_start(container)
        elif row["State"] not in LIVING:
            await self._save_end(container)
        elif self._is_late(container):
            self._kill(container)
        elif container.due_s is not None:
            await self._send_stop(container)

    def _adopt(self, row: Mapping[str, Any]) -> _Container:
        labels = row["Labels"]
        container = _Container(labels[INSTANCE], row["Id"], float(labels.get(BOOTED, 0)))
        container.stop = labels.get(STOP, "SIGTERM")
        self._containers[container.instance] = container
        left_s = self._deadlines.left_s(container.instance, container.id)
        if left_s is not None:
            self._set_deadline(container, asyncio.get_running_loop().time() + left_s)
        return container

    async def _save_end(self, container: _Container) -> None:
        log_file = self._logs / f"{container.instance}.log"
        try:
            state = await self._run(container, partial(save_end, container.id, log_file))
        except NotFound:
            return  # The container was removed a moment ago, and the next check notices the removal.
        if state is None:
            return  # The container is still running, and the next check inspects the container again.
        self._end(container, end_text(state, killed=self._is_late(container)))
        self._deadlines.forget(container.instance)

    async def _forget(self) -> None:
        now_s = self._clock.monotonic_s()
        for name, container in list(self._containers.items()):
            if container.ended is not None and now_s - container.ended_s > KEEP_ENDED_S:
                await self._remove(container)
                del self._containers[name]

    def _on_event(self, loop: asyncio.AbstractEventLoop, event: Mapping[str, Any] | None) -> None:
        # If the event loop is closed, no task waits for Docker's events.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._handle_event, event)

    def _handle_event(self, event: Mapping[str, Any] | None) -> None:
        self._events_seen += 1
        if event is None:
            self.changed.set()
            return
        attributes = event.get("Actor", {}).get("Attributes", {})
        if self._labels.items() <= attributes.items() and event.get("Action") in ("die", "destroy"):
            self.changed.set()
