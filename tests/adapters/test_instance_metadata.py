"""The instance metadata that an instance requests, and the interruption notices in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from threading import Thread

import pytest

from batchlab.adapters.aws import instance_metadata
from batchlab.adapters.aws.instance_metadata import Imds, ImdsNotices
from batchlab.adapters.aws.metadata_server import Interruption, Signals
from batchlab.core.errors import BackendError, NotFound, Unreachable, UsageError
from tests.support.aws.metadata_service import HERE, SPOT, Service


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        yield made


def tell(service: Service, **signals: object) -> None:
    service.source.known[HERE] = replace(SPOT, signals=Signals(**signals))  # type: ignore[arg-type]


def notice(service: Service) -> object:
    return asyncio.run(ImdsNotices(Imds(service.url)).notice())


def test_instance_reads_its_id_type_and_zone(service: Service) -> None:
    here = Imds(environ={instance_metadata.ENDPOINT: service.url})
    assert here.instance_id() == SPOT.instance
    assert here.get("meta-data/instance-type") == "m7i.large"
    assert here.get("meta-data/placement/availability-zone") == "us-west-2b"
    assert here.get("meta-data/placement/region") == "us-west-2"
    assert here.is_spot()
    assert here.require_tag("team") == "a"
    assert here.get("meta-data/nothing") is None
    with pytest.raises(NotFound, match="does not know meta-data/tags/instance/nothing"):
        here.require_tag("nothing")


def test_token_is_renewed_after_half_of_its_lifetime(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    here = Imds(service.url)
    tokens = []
    ask = here._ask

    def counted(method: str, path: str, headers: object) -> object:
        tokens.extend([now_s] if method == "PUT" else [])
        return ask(method, path, headers)  # type: ignore[arg-type]

    monkeypatch.setattr(here, "_ask", counted)
    for _ in range(3):
        here.instance_id()
    now_s += instance_metadata.TTL_S / 2 - 1.0
    here.instance_id()
    assert tokens == [1_000.0]
    now_s += 1.0
    here.instance_id()
    assert tokens == [1_000.0, now_s]


def test_token_that_the_service_forgot_is_requested_again(service: Service) -> None:
    here = Imds(service.url)
    here.instance_id()
    service.stop()
    service.start()
    assert here.instance_id() == SPOT.instance


def test_several_threads_may_ask(service: Service) -> None:
    here = Imds(service.url)
    found: list[str] = []
    threads = [Thread(target=lambda: found.append(here.instance_id())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [SPOT.instance] * 8


def test_refused_caller_gets_a_clear_error(service: Service) -> None:
    service.source.known.clear()
    with pytest.raises(BackendError, match="answers with HTTP 403") as refused:
        Imds(service.url).instance_id()
    assert not isinstance(refused.value, Unreachable)
    service.source.away = True
    with pytest.raises(Unreachable, match="answers with HTTP 503"):
        Imds(service.url).instance_id()


def test_stopped_service_is_unreachable_until_it_restarts(service: Service) -> None:
    here = Imds(service.url)
    service.stop()
    with pytest.raises(Unreachable, match=r"No metadata service answers at http://127.*hop limit"):
        here.instance_id()
    service.start()
    assert here.instance_id() == SPOT.instance


def test_proxy_variables_are_ignored(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Imds(service.url).instance_id() == SPOT.instance


@pytest.mark.parametrize("url", ["https://x", "x", "http://", "http://x:y", "file:///etc"])
def test_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a metadata service"):
        Imds(url)


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        ({}, "169.254.169.254"),
        ({instance_metadata.MODE: "IPv6"}, "fd00:ec2::254"),
        ({instance_metadata.ENDPOINT: "http://10.0.0.1:80/", instance_metadata.MODE: "IPv6"}, "10.0.0.1"),
    ],
)
def test_endpoint_follows_the_variables_of_the_aws_sdks(environ: dict[str, str], host: str) -> None:
    assert Imds(environ=environ)._host == host


# --- Notices -------------------------------------------------------------------------------------


def test_instance_without_termination_has_no_notice(service: Service) -> None:
    assert notice(service) is None
    tell(service, lifecycle="")
    assert notice(service) is None


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_a_spot_interruption_is_a_notice_with_its_time(service: Service, action: str) -> None:
    tell(service, interruption=Interruption(1_700_000_120.0, action))
    found = asyncio.run(ImdsNotices(Imds(service.url)).notice())
    assert found is not None
    assert found.by_s == 1_700_000_120.0
    assert f"will {action} the instance" in found.why


@pytest.mark.parametrize("state", ["Terminated", "Warmed:Terminated"])
def test_a_group_that_takes_it_out_is_a_notice_without_one(service: Service, state: str) -> None:
    tell(service, lifecycle=state)
    found = asyncio.run(ImdsNotices(Imds(service.url)).notice())
    assert found is not None
    assert found.by_s is None
    assert "out of service" in found.why


@pytest.mark.parametrize("state", ["InService", "Standby", "Warmed:Stopped", "Detached"])
def test_other_lifecycle_states_are_no_notice(service: Service, state: str) -> None:
    tell(service, lifecycle=state)
    assert notice(service) is None


def test_rebalance_recommendation_is_not_a_notice(service: Service) -> None:
    tell(service, rebalance_s=1_700_000_000.0)
    assert notice(service) is None


@pytest.mark.parametrize("content", ["", "x", "[]", "{}", '{"action": "stop", "time": 5}'])
def test_a_notice_that_cannot_be_read_is_one_all_the_same(content: str) -> None:
    found = instance_metadata._interruption(content)
    assert found.by_s is None
    assert "cannot be read" in found.why


def test_unreachable_service_is_an_error_for_the_worker(service: Service) -> None:
    service.stop()
    with pytest.raises(Unreachable):
        notice(service)
    service.start()
