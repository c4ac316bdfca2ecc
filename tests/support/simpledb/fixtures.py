"""Fixtures that start a SimpleDB server for the test run, and create a domain for each test."""

from __future__ import annotations

import itertools
import json
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint, client
from tests.support import ROOT
from tests.support.aws.emulators import Server, free_port

START = "-m", "tests.support.simpledb.server"


@dataclass(frozen=True)
class Sdb:
    """A place for one ledger: a server and a domain that no other test uses."""

    url: str
    domain: str

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url)

    def weather(self, **changes: float) -> None:
        """Set fields of the server's Weather."""
        request = urllib.request.Request(f"{self.url}/_fake", json.dumps(changes).encode())
        urllib.request.urlopen(request, timeout=5).close()

    def asked(self) -> dict[str, int]:
        """Return the number of calls of each action that the whole server has received so far."""
        with urllib.request.urlopen(f"{self.url}/_fake", timeout=5) as answer:
            found: dict[str, int] = json.load(answer)["asked"]
            return found

    def client(self) -> Any:
        """Return a boto3 client without retries."""
        return client(self.endpoint, "sdb", connections=10)

    def items(self) -> dict[str, dict[str, list[str]]]:
        """Return all items of the domain, from a consistent read."""
        sdb = self.client()
        found: dict[str, dict[str, list[str]]] = {}
        more: dict[str, str] = {}
        while True:
            page = sdb.select(SelectExpression=f"select * from `{self.domain}` limit 2500", ConsistentRead=True, **more)
            for item in page.get("Items", ()):
                into = found.setdefault(item["Name"], {})
                for one in item["Attributes"]:
                    into.setdefault(one["Name"], []).append(one["Value"])
            if "NextToken" not in page:
                sdb.close()
                return found
            more = {"NextToken": page["NextToken"]}


FAIR = {
    "throttle": 0.0,
    "lose": 0.0,
    "lag_s": 0.0,
    "short": 0.0,
    "max_attributes": 1_000_000_000,
    "max_bytes": 10 * 1024**3,
    "stop_after": -1,
}
ROUGH = {"throttle": 0.15, "lose": 0.03, "lag_s": 0.5, "short": 0.2}
"""Every fault at once, for the whole test."""


@pytest.fixture(scope="session")
def simpledb_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start one server for all tests of a pytest worker."""
    port = free_port()
    command = [sys.executable, *START, str(port)]
    env = {"PYTHONPATH": str(ROOT)}
    server = Server(command, tmp_path_factory.mktemp("simpledb"), port=port, env=env)
    server.start()
    assert server.endpoint.url
    yield server.endpoint.url
    server.kill()


_numbers = itertools.count(1)


@pytest.fixture
def simpledb(simpledb_url: str) -> Iterator[Sdb]:
    """Create an empty domain without faults."""
    place = Sdb(simpledb_url, f"grid-{next(_numbers)}")
    sdb = place.client()
    sdb.create_domain(DomainName=place.domain)
    yield place
    place.weather(**FAIR)
    sdb.delete_domain(DomainName=place.domain)
    sdb.close()


@pytest.fixture
def rough_simpledb(simpledb: Sdb) -> Sdb:
    """Return a domain with every fault of ROUGH."""
    simpledb.weather(**ROUGH)
    return simpledb
