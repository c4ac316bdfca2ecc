"""The verdicts of checks, and the resources that a run may touch, without an endpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, FlexibleChecksumError
from botocore.parsers import ResponseParserError

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.clock import WallClock
from batchlab.conform import run as running
from batchlab.conform.check import Answer, Check, CheckVerdict, Differs, Run, Severity, Untried
from batchlab.conform.check_table import CHECKS
from batchlab.conform.site import Site
from batchlab.conform.target import Target, endpoint
from batchlab.core.errors import AlreadyExists, Throttled, Unreachable, UsageError
from tests.support.conform.site import NOWHERE, no_aws

__all__ = ["no_aws"]

pytestmark = pytest.mark.usefixtures("no_aws")


@pytest.fixture
def target() -> Target:
    return Target(NOWHERE, run="conform-test", clock=WallClock())


def _check(name: str, run: Run) -> Check:
    return Check(name, Severity.NEEDED, "Rule.", "S3 API, GetObject", "all", "all is lost", run)


def _client_error(status: int, code: str) -> ClientError:
    told = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(told, "PutObject")  # type: ignore[arg-type]


# --- Verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "verdict", "observed"),
    [
        (Differs("it does not"), CheckVerdict.DIFFERS, "it does not"),
        (Untried("it cannot"), CheckVerdict.UNTRIED, "it cannot"),
        (_client_error(400, "Bad"), CheckVerdict.DIFFERS, "PutObject returns 400 Bad"),
        (_client_error(503, "SlowDown"), CheckVerdict.UNTRIED, "PutObject returns 503 SlowDown"),
        (FlexibleChecksumError(error_msg="other"), CheckVerdict.DIFFERS, "an object arrives damaged"),
        (ResponseParserError("?"), CheckVerdict.DIFFERS, "boto3 cannot parse the response"),
        (
            EndpointConnectionError(endpoint_url="x"),
            CheckVerdict.UNTRIED,
            "the endpoint does not respond: EndpointConnectionError",
        ),
        (Unreachable("No."), CheckVerdict.UNTRIED, "the endpoint does not respond: Unreachable"),
        (Throttled("Later."), CheckVerdict.UNTRIED, "the endpoint does not respond: Throttled"),
        (AlreadyExists("Taken."), CheckVerdict.DIFFERS, "Taken."),
        (KeyError("ETag"), CheckVerdict.DIFFERS, "a response is malformed: KeyError: 'ETag'"),
        (ZeroDivisionError("of ours"), CheckVerdict.UNTRIED, "the check itself fails: ZeroDivisionError: of ours"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_results_of_a_check(raised: Exception, verdict: CheckVerdict, observed: str, target: Target) -> None:
    def fails(_: Site) -> None:
        raise raised

    async def later(_: Site) -> None:
        raise raised

    for check in (_check("s3-a", fails), _check("sqs-a", later)):
        (result,) = running.run(target, [check])
        assert (result.verdict, result.observed) == (verdict, observed)
        assert result.check is check


def test_hanging_check_is_abandoned_and_delays_no_other(target: Target) -> None:
    release = threading.Event()
    ended = threading.Event()

    def hangs(_: Site) -> None:
        release.wait()
        ended.set()

    told: list[running.Result] = []
    checks = [_check("sqs-a", hangs), _check("s3-a", lambda _: None), _check("sqs-b", hangs)]
    results = running.run(target, checks, on_result=told.append, limit_s=0.0, at_once=1)
    assert [result.check.name for result in results] == ["sqs-a", "s3-a", "sqs-b"]
    assert results[0].verdict is CheckVerdict.UNTRIED
    assert results[0].observed == "the check takes longer than 0 s"
    assert len(told) == 3
    release.set()
    assert ended.wait(30)


@pytest.mark.parametrize(
    "failure",
    [
        lambda: Answer("PutObject", 500, "InternalError").expect_accepted(),
        lambda: Answer("PutObject", 503, "503").expect_refused(412, "PreconditionFailed"),
        lambda: _raise(_client_error(500, "InternalError")),
    ],
    ids=["not accepted", "not refused", "of a port"],
)
def test_two_failures_of_the_endpoint_count_and_one_does_not(target: Target, failure: Callable[[], object]) -> None:
    """AWS's services fail a few times in a million requests, so clients repeat a failed request."""
    keys: list[str] = []

    def once(site: Site) -> None:
        keys.append(site.named("a")["Key"])
        if len(keys) == 1:
            failure()

    def always(_: Site) -> None:
        failure()

    agrees, differs = running.run(target, [_check("s3-once", once), _check("s3-always", always)])
    assert (agrees.verdict, agrees.observed) == (CheckVerdict.AGREES, "")
    assert len(set(keys)) == 2, "it finds nothing of its first try"
    assert differs.verdict is CheckVerdict.DIFFERS
    assert differs.observed.startswith("PutObject returns 50")


def _raise(error: Exception) -> None:
    raise error


# --- Allowed resources ----------------------------------------------------------------------------


def test_after_the_end_nothing_is_made_any_more(target: Target) -> None:
    assert target.close() == []
    for make in (lambda: target.create_queue("a", {}), lambda: target.create_group("a", {}), lambda: target.objects):
        with pytest.raises(Untried, match="the run has ended"):
            make()
    (result,) = running.run(target, [_check("s3-a", lambda _: None)])
    assert (result.verdict, result.observed) == (CheckVerdict.UNTRIED, "the run has ended")


def test_the_end_waits_for_what_is_being_made(target: Target) -> None:
    making, closing, made = threading.Event(), threading.Event(), threading.Event()

    def make() -> None:
        with target.creating():
            making.set()
            closing.wait(30)
            made.set()

    maker = threading.Thread(target=make)
    maker.start()
    assert making.wait(30)
    closer = threading.Thread(target=target.close)
    closer.start()
    assert not made.is_set()
    closing.set()
    closer.join(30)
    assert made.is_set()
    maker.join(30)


def test_keys_and_queues_of_two_checks_are_never_the_same(target: Target) -> None:
    sites = [Site(target, one.name, again=again) for one in CHECKS for again in (False, True)]
    keys = [site.named("a")["Key"] for site in sites]
    queues = [name for site in sites for name in (site.new_name(), site.new_name())]
    assert len(set(keys)) == len(keys)
    assert len(set(queues)) == len(queues)
    assert all(one.startswith("conform-test") for one in (*keys, *queues))


# --- The endpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:4566",
        "ftp://a",
        "http://",
        "http://:80",
        "http://a:b",
        "http://a:99999",
        "http://a/bucket",
        "http://a?x=1",
        "http://user:word@a",
        "http://[::1",
        "http://a#b",
    ],
)
def test_invalid_endpoint_addresses(url: str) -> None:
    with pytest.raises(UsageError, match="is not the address of an endpoint"):
        endpoint(url, None)


@pytest.mark.parametrize(
    "url", ["https://s3.amazonaws.com", "https://sqs.eu-west-1.amazonaws.com/", "https://a.b.api.aws"]
)
def test_aws_itself_is_not_reached_by_its_address(url: str) -> None:
    with pytest.raises(UsageError, match="is AWS itself") as told:
        endpoint(url, None)
    assert "--aws" in told.value.remedy


def test_an_endpoint_gets_the_environments_keys_and_nothing_of_a_profile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("[work]\naws_access_key_id = A\naws_secret_access_key = B\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert endpoint("http://a:1/", None) == Endpoint("http://a:1", "us-east-1", "test", "test")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert endpoint("http://a:1", None).access_key == "test"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert endpoint("http://a:1", None) == Endpoint("http://a:1", "eu-west-1", "key", "secret")
    assert endpoint("http://a:1", "eu-west-2").region == "eu-west-2"


def test_host_that_only_resembles_aws_is_not_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for service in ("s3", "sqs", "autoscaling"):
        target = Target(Endpoint(None), run="conform-test", clock=WallClock())
        with pytest.raises(UsageError, match="in place of AWS"):
            target.open({service})
        assert target.close() == []
