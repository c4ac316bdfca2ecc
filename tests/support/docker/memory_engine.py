"""A Docker Engine in memory, for the tests of fault injection."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from batchlab.adapters.docker.container import INSTANCE
from batchlab.adapters.docker.engine import Engine
from batchlab.runtime import compose_deployment, factory
from batchlab.runtime.compose_deployment import Deployment
from batchlab.runtime.compose_project import LABEL
from batchlab.runtime.home import Home
from batchlab.scenarios.faults.containers import SERVICE, ContainerFaults
from batchlab.scenarios.faults.target_grid import TargetGrid
from tests.support.scenarios.cancelled_faults import CALL_S, Manager

T = TypeVar("T")

AT = Deployment("grid-1", "10.213.99", "image", "1:1", "3.12")


@dataclass
class Docker:
    """The Docker SDK calls that fault injection uses, on a table of containers by id. Call number `fails` raises an
    error. If `late` is true, the call has its effect before it raises."""

    containers_: dict[str, dict[str, Any]]
    fails: int = 0
    late: bool = False
    calls: int = 0
    started: int = 0

    def _called(self, effect: Callable[[], T]) -> T:
        from docker.errors import APIError

        self.calls += 1
        fails = self.calls == self.fails
        time.sleep(CALL_S)
        if fails and not self.late:
            raise APIError("it fails")
        found = effect()
        if fails:
            raise APIError("it fails")
        return found

    def _of(self, name: str) -> dict[str, Any]:
        from docker.errors import NotFound

        if name not in self.containers_:
            raise NotFound(f"no container {name}")
        return self.containers_[name]

    def containers(self, *, filters: dict[str, list[str]], all: bool = False) -> list[Any]:  # noqa: A002 - its own word
        wanted = filters["label"]

        def look() -> list[Any]:
            return [
                {"Id": name, "Labels": one["Labels"]}
                for name, one in self.containers_.items()
                if all or one["State"]["Running"]
                if {label.partition("=")[0] for label in wanted} <= one["Labels"].keys()
                if all is False or set(wanted) <= {f"{k}={v}" for k, v in one["Labels"].items()}
            ]

        return self._called(look)

    def inspect_container(self, name: str) -> Any:
        return self._called(lambda: deepcopy(self._of(name)))

    def pause(self, name: str) -> None:
        self._called(lambda: self._of(name)["State"].update(Paused=True, Status="paused"))

    def unpause(self, name: str) -> None:
        def effect() -> None:
            assert self._of(name)["State"]["Paused"]
            self._of(name)["State"].update(Paused=False, Status="running")

        self._called(effect)

    def kill(self, name: str, _: str = "") -> None:
        self._called(lambda: self._of(name)["State"].update(Running=False, ExitCode=137, Pid=0))

    def start(self, name: str) -> None:
        def effect() -> None:
            self.started += 1
            state = {"Running": True, "StartedAt": f"start {self.started}", "Pid": 1}
            self._of(name)["State"].update(state)

        self._called(effect)

    def stop(self, name: str, timeout: int) -> None:
        self._called(lambda: self._of(name)["State"].update(Running=False))

    def logs(self, name: str, tail: int) -> bytes:
        found = b'{"asked": 9, "refused": 4, "kept_waiting": 0}\n'
        return self._called(lambda: found if self._of(name) else b"")

    def remove_container(self, name: str, *, v: bool, force: bool) -> None:
        def effect() -> None:
            self._of(name)
            del self.containers_[name]

        self._called(effect)

    def disconnect_container_from_network(self, name: str, network: str, *, force: bool) -> None:
        def effect() -> None:
            del self._of(name)["NetworkSettings"]["Networks"][network]

        self._called(effect)

    def connect_container_to_network(self, name: str, network: str, ipv4_address: str | None = None) -> None:
        from docker.errors import APIError

        def effect() -> None:
            taken = {
                container["NetworkSettings"]["Networks"].get(network, {}).get("IPAddress")
                for container in self.containers_.values()
            }
            if ipv4_address in taken - {None} or network in self._of(name)["NetworkSettings"]:
                raise APIError("Address already in use")
            there = {network: {"IPAddress": ipv4_address}}
            self._of(name)["NetworkSettings"]["Networks"].update(there)

        self._called(effect)

    def exec_create(self, name: str, _: object) -> Any:
        return self._called(lambda: {"Id": name if self._of(name) else ""})

    def exec_start(self, _: str) -> None:
        return

    def exec_inspect(self, name: str) -> Any:
        on = self._of(name)["NetworkSettings"]["Networks"]
        return {"ExitCode": 0 if on else 1}

    def create_endpoint_config(self, *, ipv4_address: str) -> str:
        return ipv4_address

    def create_networking_config(self, there: dict[str, str]) -> dict[str, Any]:
        return {name: {"IPAddress": address} for name, address in there.items()}

    def create_host_config(self, **_: object) -> None:
        return

    def create_container(self, _: str, *, name: str, networking_config: dict[str, Any], **more: object) -> None:
        def effect() -> None:
            self.containers_[name] = container({}, networks=networking_config)

        self._called(effect)

    def close(self) -> None:
        return


def container(labels: dict[str, str], *, networks: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a running container in the format of Docker."""
    where = {AT.project: {"IPAddress": None}} if networks is None else networks
    state = {"Running": True, "Paused": False, "Status": "running", "StartedAt": "start 0"}
    return {
        "Labels": {LABEL: AT.project, **labels},
        "State": {**state, "Pid": 0, "ExitCode": 0},
        "NetworkSettings": {"Networks": where},
    }


class DockerWorld:
    """A grid in memory with two instances, a manager, PostgreSQL, and LocalStack."""

    def __init__(self, folder: Path, **docker: Any) -> None:
        home = Home(folder)
        compose_deployment.write(home, AT)
        self.manager = Manager("w-1", "w-2")
        services = {
            name: container({SERVICE: name}, networks={AT.project: {"IPAddress": address}})
            for name, address in (
                ("manager", f"{AT.subnet}.13"),
                ("postgres", f"{AT.subnet}.11"),
                ("localstack", f"{AT.subnet}.10"),
            )
        }
        instances = {f"c-{name}": container({INSTANCE: name}) for name in self.manager.names}
        self.docker = Docker({**services, **instances}, **docker)
        self.scene = TargetGrid(factory.load("localstack"), home, self.manager)
        self.there = ContainerFaults(self.scene)
        self.there.engine = cast("Engine", FakeEngine(self.docker))

    def stands(self) -> list[str]:
        """Return the faults that are still present."""
        found = []
        for name, one in self.docker.containers_.items():
            if one["State"]["Paused"]:
                found.append(f"{name} is paused")
            if not one["State"]["Running"]:
                found.append(f"{name} has ended")
            if AT.project not in one["NetworkSettings"]["Networks"]:
                found.append(f"{name} is cut off")
        host = self.docker.containers_["localstack"]["NetworkSettings"]["Networks"]
        if host.get(AT.project, {}).get("IPAddress") != f"{AT.subnet}.10":
            found.append("LocalStack has another address")
        if len(self.docker.containers_) != 5:
            found.append("a front is left")
        return found


class FakeEngine(Engine):
    """The real Engine class, connected to the Docker in memory."""

    def __init__(self, docker: Docker) -> None:
        super().__init__()
        self._client = cast("Any", docker)
