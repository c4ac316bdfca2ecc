"""An AWS account that refuses calls for a while or cannot be reached. botocore makes the calls to a local server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from batchlab.cli.deploy_options import retry_notes
from batchlab.core.errors import Throttled, Unreachable, UsageError
from batchlab.deploy.account import Account, chosen_region
from batchlab.deploy.stack import Stack

STACK = "arn:aws:cloudformation:us-east-1:1:stack/grid/1"


# --- Throttling ----------------------------------------------------------------------------------


class Busy(ThreadingHTTPServer):
    """A server that refuses the first `refusals` calls as AWS does when it is throttling."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.refusals = 0
        self.calls = 0


class Answering(BaseHTTPRequestHandler):
    server: Busy

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls += 1
        space = 'xmlns="http://cloudformation.amazonaws.com/doc/2010-05-15/"'
        if self.server.calls <= self.server.refusals:
            status, body = (
                400,
                (
                    f"<ErrorResponse {space}><Error><Type>Sender</Type><Code>Throttling</Code>"
                    "<Message>Rate exceeded</Message></Error></ErrorResponse>"
                ),
            )
        else:
            status, body = (
                200,
                (
                    f"<DescribeStacksResponse {space}><DescribeStacksResult><Stacks><member>"
                    f"<StackId>{STACK}</StackId><StackName>grid</StackName>"
                    "<StackStatus>CREATE_COMPLETE</StackStatus>"
                    "<CreationTime>2026-01-01T00:00:00Z</CreationTime>"
                    "</member></Stacks></DescribeStacksResult></DescribeStacksResponse>"
                ),
            )
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    with Busy() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        yield server
        server.shutdown()


def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the pauses between retries without waiting."""
    found: list[float] = []
    monkeypatch.setattr("botocore.endpoint.time.sleep", found.append)
    return found


def test_throttled_calls_are_made_again_with_growing_jittered_waits(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = waited(monkeypatch)
    busy.refusals = 5
    with Account("us-east-1") as account:
        found = Stack(account, "grid").state()
    assert found is not None
    assert found.status == "CREATE_COMPLETE"
    assert busy.calls == 6
    assert len(waits) == 5
    assert all(0 <= wait <= min(20, 2**n) for n, wait in enumerate(waits))
    assert len(set(waits)) == 5, "without jitter all who were refused come back together"


def test_long_throttling_is_reported(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = waited(monkeypatch)
    busy.refusals = 1000
    with Account("us-east-1") as account, pytest.raises(Throttled, match="Rate exceeded"):
        Stack(account, "grid").state()
    assert busy.calls == 10
    assert len(waits) == 9


def test_unreachable_service_is_reported(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    waited(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with Account("us-east-1") as account, pytest.raises(Unreachable) as told_:
        Stack(account, "grid").state()
    assert "AWS_ENDPOINT_URL replaces AWS with http://127.0.0.1:1" in told_.value.remedy


def test_retries_are_announced_during_an_outage(
    busy: Busy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All tries together take about twenty seconds."""
    now_s = [0.0]

    def wait(seconds: float) -> None:
        now_s[0] += 0.6

    monkeypatch.setattr("botocore.endpoint.time.sleep", wait)
    monkeypatch.setattr("batchlab.cli.output.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    with Account("us-east-1", notes=retry_notes) as account:
        Stack(account, "grid").state()
        assert capsys.readouterr().err == "", "what answers is no reason to say something"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with Account("us-east-1", notes=retry_notes) as account, pytest.raises(Unreachable):
        Stack(account, "grid").state()
    said = capsys.readouterr().err.splitlines()
    # The first try is silent, and later tries are reported about once a second. The error itself reports the last try.
    told = [3, 5, 7, 9]
    assert said == [f"http://127.0.0.1:1 does not respond. This was attempt {n} of 10." for n in told]


# --- Without access to AWS -----------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove all AWS configuration, and disable the metadata service."""
    for name in (
        "AWS_PROFILE",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    return monkeypatch


def test_missing_region_is_a_clear_error(nobody: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"No region is set\.") as told_:
        Account.open()
    assert "--region" in told_.value.remedy


def test_a_region_may_be_in_either_variable(nobody: pytest.MonkeyPatch) -> None:
    nobody.setenv("AWS_DEFAULT_REGION", "eu-west-2")
    assert chosen_region(None) == "eu-west-2"
    nobody.setenv("AWS_REGION", "eu-west-3")
    assert chosen_region(None) == "eu-west-3"
    assert chosen_region("ap-northeast-1") == "ap-northeast-1"


def test_invalid_region_is_refused(nobody: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'europe' is not a region"):
        Account.open("europe")


def test_missing_credentials_are_a_clear_error(nobody: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="credentials are missing") as told_:
        Account.open("eu-west-1")
    assert "aws configure" in told_.value.remedy


def test_incomplete_credentials_are_refused(nobody: pytest.MonkeyPatch) -> None:
    nobody.setenv("AWS_ACCESS_KEY_ID", "a")
    with pytest.raises(UsageError, match=r"A part of the AWS credentials is missing: AWS_SECRET_ACCESS_KEY\."):
        Account.open("eu-west-1")


def test_unknown_profile_is_reported(nobody: pytest.MonkeyPatch) -> None:
    nobody.setenv("AWS_PROFILE", "work")
    with pytest.raises(UsageError, match="work"):
        Account.open("eu-west-1")
