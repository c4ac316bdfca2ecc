"""The metadata service answers as version 2 of EC2's does. The rules are from AWS's pages "Instance metadata
categories" and "Use the Instance Metadata Service"."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from botocore.utils import InstanceMetadataFetcher, InstanceMetadataRegionFetcher

from batchlab.adapters.aws.metadata_server import (
    Interruption,
    Metadata,
    MetadataServer,
    Signals,
    content_at,
    metadata_tree,
)
from batchlab.core.errors import UsageError
from batchlab.core.model import Machine
from tests.support.aws.metadata_service import HERE, SPOT, TOKEN, TTL, Service, Source
from tests.support.fleet import ManualClock

ROOT = "/latest/meta-data"


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        yield made


# --- Tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", ["1", "21600"])
def test_a_token_is_given_for_up_to_six_hours(service: Service, ttl: str) -> None:
    status, token, headers = service.ask("PUT", "/latest/api/token", {TTL: ttl})
    assert (status, headers[TTL.title()]) == (200, ttl)
    assert service.ask("GET", f"{ROOT}/instance-id", {TOKEN: token})[0] == 200


@pytest.mark.parametrize("ttl", [None, "", "0", "-1", "21601", "1e3", "60 s", "9" * 5000])
def test_invalid_time_to_live_is_a_bad_request(service: Service, ttl: str | None) -> None:
    headers = {} if ttl is None else {TTL: ttl}
    assert service.ask("PUT", "/latest/api/token", headers)[0] == 400


def test_no_token_is_given_through_a_proxy(service: Service) -> None:
    headers = {TTL: "60", "X-Forwarded-For": "10.0.0.1"}
    assert service.ask("PUT", "/latest/api/token", headers)[0] == 403


@pytest.mark.parametrize("token", [None, "", "x", "99999999999.000-ab", "é", "inf-", "nan-0"])
def test_request_without_a_token_is_refused(service: Service, token: str | None) -> None:
    headers = {} if token is None else {TOKEN: token}
    for path in (f"{ROOT}/instance-id", f"{ROOT}/", "/latest/", "/", "/nothing"):
        assert service.ask("GET", path, headers)[:2] == (401, "")


def test_a_token_ends_with_its_time(service: Service) -> None:
    token = service.token(ttl_s=60)
    service.clock.time_s += 59.0
    assert service.ask("GET", f"{ROOT}/instance-id", {TOKEN: token})[0] == 200
    service.clock.time_s += 1.0
    assert service.ask("GET", f"{ROOT}/instance-id", {TOKEN: token})[0] == 401


def test_a_tokens_time_cannot_be_changed(service: Service) -> None:
    until, _, signature = service.token().partition("-")
    later = f"{float(until) + 100:.3f}-{signature}"
    assert service.ask("GET", f"{ROOT}/instance-id", {TOKEN: later})[0] == 401


def test_a_token_is_good_for_its_instance_only(service: Service) -> None:
    """A new container may get the address of an ended one."""
    token = service.token()
    service.source.known[HERE] = replace(SPOT, instance="i-another")
    assert service.ask("GET", f"{ROOT}/instance-id", {TOKEN: token})[0] == 401
    assert service.get(f"{ROOT}/instance-id") == (200, "i-another")


def test_unknown_caller_is_refused(service: Service) -> None:
    token = service.token()
    service.source.known.clear()
    assert service.ask("PUT", "/latest/api/token", {TTL: "60"})[0] == 403
    assert service.ask("GET", f"{ROOT}/instance-id", {TOKEN: token})[0] == 403


def test_request_during_an_outage_of_the_source_may_be_retried(service: Service) -> None:
    service.source.away = True
    assert service.ask("PUT", "/latest/api/token", {TTL: "60"})[0] == 503
    service.source.away = False
    assert service.get(f"{ROOT}/instance-id")[0] == 200


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/latest/api/token"), ("DELETE", f"{ROOT}/"), ("PUT", f"{ROOT}/instance-id")]
)
def test_other_methods_are_not_allowed(service: Service, method: str, path: str) -> None:
    assert service.ask(method, path, {TTL: "60", TOKEN: service.token()})[0] == 405


# --- Paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("ami-id", "ami-1"),
        ("autoscaling/target-lifecycle-state", "InService"),
        ("instance-id", "i-0123456789abcdef0"),
        ("instance-life-cycle", "spot"),
        ("instance-type", "m7i.large"),
        ("local-ipv4", HERE),
        ("placement/availability-zone", "us-west-2b"),
        ("placement/region", "us-west-2"),
        ("tags/instance/team", "a"),
        ("tags/instance/", "Name\nteam"),
        ("tags/instance", "Name\nteam"),
        ("placement/", "availability-zone\nregion"),
        ("placement/availability-zone/", "us-west-2b"),
    ],
)
def test_content_of_each_path(service: Service, path: str, content: str) -> None:
    assert service.get(f"{ROOT}/{path}") == (200, content)


def test_listing_names_the_existing_paths(service: Service) -> None:
    assert service.get("/") == (200, "latest")
    assert service.get("/latest") == (200, "dynamic/\nmeta-data/")
    names = service.get(f"{ROOT}/")[1].split("\n")
    assert {"instance-id", "placement/", "tags/", "autoscaling/"} <= set(names)
    assert not {"spot/", "events/", "iam/"} & set(names)


@pytest.mark.parametrize(
    "path",
    [
        "spot/instance-action",
        "spot/termination-time",
        "spot/",
        "events/recommendations/rebalance",
        "iam/security-credentials/",
        "tags/instance/not one",
        "instance-id/more",
        "instance",
        "../instance-id",
    ],
)
def test_missing_path_is_not_found(service: Service, path: str) -> None:
    assert service.get(f"{ROOT}/{path.replace(' ', '%20')}")[0] == 404


@pytest.mark.parametrize("path", ["/late", "/latest/user-data", "/2021-07-15/meta-data/"])
def test_path_outside_of_the_service_is_not_found(service: Service, path: str) -> None:
    assert service.get(path)[0] == 404


def test_spot_interruption_is_shown_under_both_paths(service: Service) -> None:
    notice = Signals(interruption=Interruption(1_700_000_120.9))
    service.source.known[HERE] = replace(SPOT, signals=notice)
    status, content = service.get(f"{ROOT}/spot/instance-action")
    assert status == 200
    assert json.loads(content) == {"action": "terminate", "time": "2023-11-14T22:15:20Z"}
    assert service.get(f"{ROOT}/spot/termination-time") == (200, "2023-11-14T22:15:20Z")


def test_an_instance_that_is_stopped_has_no_time_of_termination() -> None:
    notice = Signals(interruption=Interruption(1_700_000_120.0, "stop"))
    paths = metadata_tree(replace(SPOT, signals=notice))
    assert json.loads(paths["meta-data/spot/instance-action"])["action"] == "stop"
    assert content_at(paths, "meta-data/spot/termination-time") is None


def test_rebalance_recommendation_and_lifecycle_state_are_shown(service: Service) -> None:
    service.source.known[HERE] = replace(SPOT, signals=Signals("Terminated", rebalance_s=1_700_000_000.0))
    _, content = service.get(f"{ROOT}/events/recommendations/rebalance")
    assert json.loads(content) == {"noticeTime": "2023-11-14T22:13:20Z"}
    assert service.get(f"{ROOT}/autoscaling/target-lifecycle-state") == (200, "Terminated")


def test_an_instance_without_a_group_has_no_lifecycle_state() -> None:
    paths = metadata_tree(replace(SPOT, signals=Signals("")))
    assert content_at(paths, "meta-data/autoscaling/target-lifecycle-state") is None


def test_user_data_is_returned_unchanged(service: Service) -> None:
    assert service.get("/latest/user-data")[0] == 404
    text = "#!/bin/sh\necho 'grüße'\n"
    service.source.known[HERE] = replace(SPOT, user_data=text)
    assert service.get("/latest/user-data") == (200, text)
    assert "user-data" in service.get("/latest/")[1].split()


def test_the_identity_document(service: Service) -> None:
    status, content = service.get("/latest/dynamic/instance-identity/document")
    told = json.loads(content)
    assert status == 200
    assert (told["instanceId"], told["region"]) == (SPOT.instance, "us-west-2")
    assert (told["instanceType"], told["privateIp"]) == ("m7i.large", HERE)
    assert told["pendingTime"] == "2023-11-14T22:13:20Z"


@pytest.mark.parametrize(
    ("zone", "region"),
    [
        ("us-east-1a", "us-east-1"),
        ("us-gov-west-1b", "us-gov-west-1"),
        ("us-west-2-lax-1a", "us-west-2"),
        ("ap-southeast-10c", "ap-southeast-10"),
        ("", ""),
        ("here", ""),
    ],
)
def test_the_region_of_a_zone(zone: str, region: str) -> None:
    assert Metadata("i", HERE, Machine(zone=zone)).region == region


# --- AWS's own clients ---------------------------------------------------------------------------


def config_of(service: Service) -> dict[str, object]:
    return {"ec2_metadata_service_endpoint": f"{service.url}/", "ec2_metadata_v1_disabled": True}


@pytest.fixture
def as_on_ec2(service: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    return service


def test_boto3_finds_its_region(as_on_ec2: Service) -> None:
    config = config_of(as_on_ec2)
    assert InstanceMetadataRegionFetcher(config=config).retrieve_region() == "us-west-2"


def test_boto3_finds_its_credentials(as_on_ec2: Service) -> None:
    document = {
        "Code": "Success",
        "LastUpdated": "2026-01-01T00:00:00Z",
        "Type": "AWS-HMAC",
        "AccessKeyId": "ASIAEXAMPLE",
        "SecretAccessKey": "secret",
        "Token": "token",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    config = config_of(as_on_ec2)
    assert InstanceMetadataFetcher(config=config).retrieve_iam_role_credentials() == {}
    as_on_ec2.source.known[HERE] = replace(SPOT, credentials={"worker-role": document})
    found = InstanceMetadataFetcher(config=config).retrieve_iam_role_credentials()
    assert found["role_name"] == "worker-role"
    assert (found["access_key"], found["token"]) == ("ASIAEXAMPLE", "token")


# --- HTTP ----------------------------------------------------------------------------------------


def raw(service: Service, *parts: bytes) -> bytes:
    """Send bytes to the service, and return everything that it sends until it closes the connection."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        for part in parts:
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(65536):
            received += data
        return received


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 10\r\n\r\nshort",
        b"GET //[ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"b" * 20_000 + b"\r\n\r\n",
    ],
)
def test_malformed_request_is_refused_and_its_connection_closed(service: Service, request_: bytes) -> None:
    received = raw(service, request_)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"Connection: close" in received
    assert service.get(f"{ROOT}/instance-id")[0] == 200


def test_a_connection_carries_several_requests_and_a_body_is_not_the_next_one(service: Service) -> None:
    head = f"PUT /latest/api/token HTTP/1.1\r\n{TTL}: 60\r\nContent-Length: 4\r\n\r\n"
    put = head.encode() + b"GET "
    last = b"PUT / HTTP/1.1\r\nConnection: close\r\n\r\n"
    got = raw(service, put[:10], put[10:] + put, last + last)
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"200", b"405"]


def test_client_that_disconnects_early_harms_no_other(service: Service) -> None:
    assert raw(service, b"GET / HT") == b""
    assert service.get(f"{ROOT}/instance-id")[0] == 200


def test_address_that_cannot_be_bound_is_a_clear_error() -> None:
    async def main() -> None:
        server = MetadataServer(Source(), ManualClock())
        with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.1:0"):
            await server.start("203.0.113.1")
        await server.close()

    asyncio.run(main())


@pytest.mark.parametrize("iterations", range(7))
def test_close_while_a_connection_is_accepted_leaves_no_open_socket(iterations: int) -> None:
    """A transport without an end is a ResourceWarning, which is an error in tests."""

    async def main() -> None:
        server = MetadataServer(Source(), ManualClock())
        at = urlsplit(await server.start(HERE))
        assert at.hostname is not None
        assert at.port is not None
        with socket.create_connection((at.hostname, at.port)) as client:
            for _ in range(iterations):
                await asyncio.sleep(0)
            async with asyncio.timeout(2.0):
                await server.close()
            client.settimeout(2.0)
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""

    asyncio.run(main())
    gc.collect()
