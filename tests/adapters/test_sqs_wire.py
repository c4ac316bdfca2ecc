"""SQS's protocol without boto3, signed as botocore signs. boto3 is used behind a proxy."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import botocore.auth
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, EndpointConnectionError, HTTPClientError, NoCredentialsError
from botocore.parsers import ResponseParserError
from hypothesis import given
from hypothesis import strategies as st

from batchlab.adapters.aws.endpoint import Endpoint, code_of, session_of
from batchlab.adapters.aws.sqs import SqsQueue
from batchlab.adapters.aws.sqs_wire import SqsWire, authorization, connect
from batchlab.core.errors import BackendError
from batchlab.core.ports import Outgoing
from tests.support.aws.scripted_sqs import scripted

KEYS = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")


# --- Signatures ----------------------------------------------------------------------------------


@given(
    st.binary(max_size=200),
    st.sampled_from(["us-east-1", "eu-central-1"]),
    st.text("abcABC/+=", min_size=1, max_size=40),
    st.one_of(st.none(), st.text("abcABC/+=", min_size=1)),
    st.integers(1_600_000_000, 2_200_000_000),
)
def test_a_request_is_signed_as_botocore_signs_it(
    body: bytes, region: str, secret: str, token: str | None, at_s: int
) -> None:
    at = datetime.fromtimestamp(at_s, UTC)
    url = f"https://sqs.{region}.amazonaws.com/"
    headers = {"Content-Type": "application/x-amz-json-1.0", "X-Amz-Target": "AmazonSQS.SendMessageBatch"}
    request = AWSRequest("POST", url, headers, body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda: at)
        SigV4Auth(Credentials("AKID", secret, token), "sqs", region).add_auth(request)
    ours = headers | {"Host": f"sqs.{region}.amazonaws.com", "X-Amz-Date": at.strftime("%Y%m%dT%H%M%SZ")}
    if token is not None:
        ours["X-Amz-Security-Token"] = token
    assert ours["X-Amz-Date"] == request.headers["X-Amz-Date"]
    signed = authorization(ours, "/", body, region, "AKID", secret)
    assert signed == request.headers["Authorization"]


def test_the_signing_key_follows_the_day_and_the_keys() -> None:
    headers = {"X-Amz-Date": "20260101T000000Z", "Host": "h"}
    other_day = headers | {"X-Amz-Date": "20260102T000000Z"}
    found = {
        authorization(*some).rpartition("=")[2]
        for some in (
            (headers, "/", b"", "r", "a", "s"),
            (other_day, "/", b"", "r", "a", "s"),
            (headers, "/", b"", "r", "a", "t"),
            (headers, "/", b"", "q", "a", "s"),
        )
    }
    assert len(found) == 4


# --- Connections ---------------------------------------------------------------------------------


class Service:
    """A server that returns a scripted answer, counts connections, and can close kept connections."""

    def __init__(self) -> None:
        self.answer: tuple[int, str, dict[str, str]] = (200, "{}", {})
        self.connections: list[socket.socket] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                service.connections.append(self.connection)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                status, body, headers = service.answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def hang_up(self) -> None:
        for connection in self.connections:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


@pytest.fixture
def wire(service: Service) -> Iterator[SqsWire]:
    made = SqsWire(service.url, "us-east-1", KEYS, None)
    yield made
    made.close()


def test_connection_is_reused(service: Service, wire: SqsWire) -> None:
    service.answer = (200, json.dumps({"Messages": []}), {})
    for _ in range(3):
        assert wire.call("ReceiveMessage", {}) == {"Messages": []}
    assert len(service.connections) == 1


def test_one_that_the_service_has_closed_is_not_used_again(service: Service, wire: SqsWire) -> None:
    wire.call("ReceiveMessage", {})
    service.hang_up()
    wire.call("ReceiveMessage", {})
    assert len(service.connections) == 2


def test_connection_marked_for_closing_is_not_reused(service: Service, wire: SqsWire) -> None:
    service.answer = (200, "{}", {"Connection": "close"})
    wire.call("ReceiveMessage", {})
    wire.call("ReceiveMessage", {})
    assert len(service.connections) == 2


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ((400, '{"__type": "com.amazonaws.sqs#OverLimit", "message": "No."}', {}), "OverLimit", "No."),
        ((403, '{"__type": "AccessDenied", "Message": "No."}', {}), "AccessDenied", "No."),
        (
            (
                400,
                '{"__type": "com.amazonaws.sqs#QueueDoesNotExist", "message": "No."}',
                {"x-amzn-query-error": "AWS.SimpleQueueService.NonExistentQueue;Sender"},
            ),
            "NonExistentQueue",
            "No.",
        ),
        ((400, '{"__type": "com.amazonaws.sqs#Throttling:http://internal.amazon.com/"}', {}), "Throttling", ""),
        ((502, "<html>", {}), "502", ""),
        ((500, "[]", {}), "500", ""),
    ],
)
def test_a_refusal_is_botocore_s_error(
    service: Service, wire: SqsWire, answer: tuple[int, str, dict[str, str]], code: str, message: str
) -> None:
    service.answer = answer
    with pytest.raises(ClientError) as caught:
        wire.call("ReceiveMessage", {})
    assert code_of(caught.value) == code
    assert caught.value.response["Error"]["Message"] == message
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == answer[0]
    assert caught.value.operation_name == "ReceiveMessage"


@pytest.mark.parametrize("body", ["<html>", "[]", '"text"'])
def test_answer_of_another_service_is_reported_as_such(service: Service, wire: SqsWire, body: str) -> None:
    service.answer = (200, body, {})
    with pytest.raises(ResponseParserError):
        wire.call("ReceiveMessage", {})


def test_null_fields_are_ignored(service: Service, wire: SqsWire) -> None:
    """boto3 ignores null fields too."""
    service.answer = (200, '{"Messages": null, "Failed": []}', {})
    assert wire.call("ReceiveMessage", {}) == {"Failed": []}


def test_connection_with_a_descriptor_above_1000_is_reused(service: Service, wire: SqsWire) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < 1100:
            held.append(os.dup(0))
        wire.call("ReceiveMessage", {})
        wire.call("ReceiveMessage", {})
        assert len(service.connections) == 1
        assert wire._connections._idle[0][1].sock.fileno() > 1024
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("secret", ["with a line's end\n", "ключ"])
def test_send_failure_raises_the_same_error_as_botocore(service: Service, secret: str) -> None:
    keys = Credentials("AKID", "secret", secret)
    with pytest.raises(HTTPClientError):
        SqsWire(service.url, "us-east-1", keys, None).call("ReceiveMessage", {})


def test_refused_connection_and_closed_connection_have_different_errors(service: Service) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = SqsWire(f"http://127.0.0.1:{probe.getsockname()[1]}", "us-east-1", KEYS, None)
        with pytest.raises(EndpointConnectionError):
            nobody.call("ReceiveMessage", {})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=lambda: listening.accept()[0].close())
        thread.start()
        with pytest.raises(HTTPClientError):
            SqsWire(url, "us-east-1", KEYS, None).call("ReceiveMessage", {})
        thread.join()
    with pytest.raises(NoCredentialsError):
        SqsWire(service.url, "us-east-1", None, None).call("ReceiveMessage", {})


# --- Proxies -------------------------------------------------------------------------------------


def session() -> boto3.Session:
    return session_of(Endpoint("http://sqs.example:4566"))


def test_calls_over_a_proxy_use_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://sqs.example:4566"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    assert connect(session(), url, loopback=False) is not None
    monkeypatch.setenv("no_proxy", "other.example")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert connect(session(), url, loopback=False) is not None
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert connect(session(), url, loopback=False) is None
    assert connect(session(), url, loopback=True) is not None
    monkeypatch.setenv("no_proxy", "sqs.example")
    assert connect(session(), url, loopback=False) is not None


def test_certificates_are_those_that_boto3_trusts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "https://sqs.example"
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # An endpoint with its own keys neither needs nor reads a profile of the user.
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    made = connect(session(), url, loopback=False)
    assert made is not None
    assert made._tls is not None
    assert made._tls.verify_mode is ssl.CERT_REQUIRED
    assert made._tls.check_hostname
    assert not made._tls.verify_flags & ssl.VERIFY_X509_STRICT
    for name in ("REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing.pem"))
        with pytest.raises(BackendError, match=r"nothing\.pem cannot be read") as caught:
            connect(session(), url, loopback=False)
        assert "AWS_CA_BUNDLE" in caught.value.remedy


def test_boto3_sends_the_same_requests() -> None:
    async def asked(endpoint: Endpoint, *, by_hand: bool) -> None:
        queue = SqsQueue(endpoint)
        if not by_hand:
            queue._wire = None
        await queue.send("q", [Outgoing("a"), Outgoing("b", 2.0)])
        await queue.receive("q", wait_s=0, visibility_s=7)
        await queue.delete("q", ["r"])
        await queue.change_visibility("q", [("r", 3.0)])
        await queue.close()

    def answer(_operation: str, sent: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        done = [{"Id": entry["Id"]} for entry in sent.get("Entries", ())]
        return 200, {"Successful": done, "Messages": []}

    found: list[list[Any]] = []
    for by_hand in (True, False):
        with scripted(answer) as (endpoint, calls):
            asyncio.run(asked(endpoint, by_hand=by_hand))
        for _, sent in calls:
            assert sent.pop("authorization").startswith("AWS4-HMAC-SHA256 Credential=test/")
        found.append(calls)
    assert found[0] == found[1]
    assert len(found[0]) == 4
