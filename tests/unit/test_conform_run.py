"""How checks come out, what a run may touch, and the command around them; without an endpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, FlexibleChecksumError
from botocore.parsers import ResponseParserError

from batchlab.adapters.aws import Endpoint
from batchlab.adapters.clock import WallClock
from batchlab.cli import conform as command
from batchlab.cli.signals import Stopped
from batchlab.conform import run as running
from batchlab.conform.check import Answer, Check, Differs, Run, Severity, Untried, Verdict
from batchlab.conform.checks import CHECKS
from batchlab.conform.run import Result
from batchlab.conform.site import Site
from batchlab.conform.target import Target, endpoint
from batchlab.errors import AlreadyExists, Throttled, Unreachable, UsageError
from tests.unit import cli_rig

NOWHERE = Endpoint("http://127.0.0.1:9")
"""Nothing is ever sent there."""


@pytest.fixture(autouse=True)
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the AWS configuration of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


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
        (Differs("it does not"), Verdict.DIFFERS, "it does not"),
        (Untried("it cannot"), Verdict.UNTRIED, "it cannot"),
        (_client_error(400, "Bad"), Verdict.DIFFERS, "PutObject answers 400 Bad"),
        (_client_error(503, "SlowDown"), Verdict.UNTRIED, "PutObject answers 503 SlowDown"),
        (
            FlexibleChecksumError(error_msg="other"),
            Verdict.DIFFERS,
            "an object arrives damaged",
        ),
        (ResponseParserError("?"), Verdict.DIFFERS, "it answers what boto3 cannot read"),
        (
            EndpointConnectionError(endpoint_url="x"),
            Verdict.UNTRIED,
            "there is no answer: EndpointConnectionError",
        ),
        (Unreachable("No."), Verdict.UNTRIED, "there is no answer: Unreachable"),
        (Throttled("Later."), Verdict.UNTRIED, "there is no answer: Throttled"),
        (AlreadyExists("Taken."), Verdict.DIFFERS, "Taken."),
        (KeyError("ETag"), Verdict.DIFFERS, "an answer is malformed: KeyError: 'ETag'"),
        (
            ZeroDivisionError("of ours"),
            Verdict.UNTRIED,
            "the check itself fails: ZeroDivisionError: of ours",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_how_a_check_comes_out(
    raised: Exception, verdict: Verdict, observed: str, target: Target
) -> None:
    def fails(_: Site) -> None:
        raise raised

    async def later(_: Site) -> None:
        raise raised

    for check in (_check("s3-a", fails), _check("sqs-a", later)):
        (result,) = running.run(target, [check])
        assert (result.verdict, result.observed) == (verdict, observed)
        assert result.check is check


def test_a_check_that_hangs_is_given_up_and_holds_up_nobody(target: Target) -> None:
    release = threading.Event()
    ended = threading.Event()

    def hangs(_: Site) -> None:
        release.wait()
        ended.set()

    told: list[Result] = []
    checks = [_check("sqs-a", hangs), _check("s3-a", lambda _: None), _check("sqs-b", hangs)]
    results = running.run(target, checks, tell=told.append, limit_s=0.0, at_once=1)
    assert [one.check.name for one in results] == ["sqs-a", "s3-a", "sqs-b"]
    assert results[0].verdict is Verdict.UNTRIED
    assert results[0].observed == "it takes longer than 0 s"
    assert len(told) == 3
    release.set()
    assert ended.wait(30)


@pytest.mark.parametrize(
    "failure",
    [
        lambda: Answer("PutObject", 500, "InternalError").accepted(),
        lambda: Answer("PutObject", 503, "503").refused(412, "PreconditionFailed"),
        lambda: _raise(_client_error(500, "InternalError")),
    ],
    ids=["not accepted", "not refused", "of a port"],
)
def test_one_failure_of_the_endpoint_says_nothing_of_a_rule_and_two_do(
    target: Target, failure: Callable[[], object]
) -> None:
    """AWS's services fail too, a few times in a million: whoever asks them asks once more."""
    keys: list[str] = []

    def once(site: Site) -> None:
        keys.append(site.named("a")["Key"])
        if len(keys) == 1:
            failure()

    def always(_: Site) -> None:
        failure()

    agrees, differs = running.run(target, [_check("s3-once", once), _check("s3-always", always)])
    assert (agrees.verdict, agrees.observed) == (Verdict.AGREES, "")
    assert len(set(keys)) == 2, "it finds nothing of its first try"
    assert differs.verdict is Verdict.DIFFERS
    assert differs.observed.startswith("PutObject answers 50")


def _raise(error: Exception) -> None:
    raise error


# --- What a run may touch -------------------------------------------------------------------------


def test_after_the_end_nothing_is_made_any_more(target: Target) -> None:
    assert target.close() == []
    for make in (
        lambda: target.create_queue("a", {}),
        lambda: target.create_group("a", {}),
        lambda: target.objects,
    ):
        with pytest.raises(Untried, match="the run has ended"):
            make()
    (result,) = running.run(target, [_check("s3-a", lambda _: None)])
    assert (result.verdict, result.observed) == (Verdict.UNTRIED, "the run has ended")


def test_the_end_waits_for_what_is_being_made(target: Target) -> None:
    making, closing, made = threading.Event(), threading.Event(), threading.Event()

    def make() -> None:
        with target.making():
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
        *("", "127.0.0.1:4566", "ftp://a", "http://", "http://:80", "http://a:b", "http://a:99999"),
        *("http://a/bucket", "http://a?x=1", "http://user:word@a", "http://[::1", "http://a#b"),
    ],
)
def test_what_is_no_address_of_an_endpoint(url: str) -> None:
    with pytest.raises(UsageError, match="is not the address of an endpoint"):
        endpoint(url, None)


@pytest.mark.parametrize(
    "url",
    ["https://s3.amazonaws.com", "https://sqs.eu-west-1.amazonaws.com/", "https://a.b.api.aws"],
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


def test_what_only_calls_itself_aws_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for service in ("s3", "sqs", "autoscaling"):
        target = Target(Endpoint(None), run="conform-test", clock=WallClock())
        with pytest.raises(UsageError, match="in place of AWS"):
            target.open({service})
        assert target.close() == []


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> cli_rig.Run:
    return cli_rig.runner(monkeypatch, capsys)


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Verdict]:
    """What the checks come to, by name, without an endpoint; the others agree."""
    given: dict[str, Verdict] = {}

    def pretend(_: Target, checks: list[Check], **__: object) -> list[Result]:
        found = [(check, given.get(check.name, Verdict.AGREES)) for check in checks]
        return [
            Result(check, verdict, "" if verdict is Verdict.AGREES else "something else", 0.1)
            for check, verdict in found
        ]

    monkeypatch.setattr("batchlab.conform.run.run", pretend)
    monkeypatch.setattr(Target, "open", lambda *_: None)
    return given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Without --endpoint this would make a bucket and some 100 queues in an AWS account"),
        (("--endpoint", "http://a", "--aws"), "exclude each other"),
        (("--endpoint", "localhost:4566"), "is not the address of an endpoint"),
        (("--endpoint", "https://s3.amazonaws.com"), "is AWS itself"),
        (("--endpoint", "http://a", "--only", "zz*"), "No check has a name like zz*"),
        (
            ("--endpoint", "http://a", "--only", "sqs-delay-901", "--needed"),
            "No check that batchlab needs has a name like sqs-delay-901",
        ),
        (("--endpoint", "http://a", "--only", "s3*", "--markdown", "x.md"), "Leave out --only"),
        (("--endpoint", "http://a", "--needed", "--markdown", "x.md"), "and --needed"),
        (("--endpoint", "http://a", "--markdown", "no/where.md"), "no/where.md cannot be written"),
        (("--endpoint", "http://a", "--region", "eu west"), "eu west is not the name of a region"),
        (("--aws",), "There are no AWS credentials"),
        (("--endpoint", "http://a", "--service", "ec2"), "There are no checks of a service ec2"),
        (("--aws", "--service", "autoscaling"), "would launch instances in an AWS account"),
        (("--endpoint", "http://a", "--template", "t"), "--template is for --service autoscaling"),
        (
            ("--endpoint", "http://a", "--service", "autoscaling", "--only", "s3-*"),
            "No check has a name like s3-*",
        ),
        (("--endpoint", "http://a", "--service", "s3", "--markdown", "x.md"), "Leave out --only"),
    ],
)
def test_what_it_refuses(options: tuple[str, ...], message: str, run: cli_rig.Run) -> None:
    code, out, err = run("conform", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_where_nothing_answers_it_says_so(run: cli_rig.Run) -> None:
    with socket.socket() as nobody:
        # Bound, and not listening: refused, and nobody else's meanwhile.
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for options, service in (
            ((), "S3"),
            (("--only", "sqs-*"), "SQS"),
            (("--service", "sqs"), "SQS"),
            (("--service", "autoscaling"), "Auto Scaling"),
        ):
            code, out, err = run("conform", "--endpoint", url, *options)
            assert (code, out) == (3, "")
            assert err == (
                f"Error: No {service} answers at {url}.\n"
                "  Start what should answer there, or correct the address.\n"
            )


@pytest.mark.parametrize(
    ("name", "verdict", "options", "code"),
    [
        ("s3-range", Verdict.AGREES, (), 0),
        ("s3-range", Verdict.DIFFERS, (), 1),
        ("s3-range", Verdict.UNTRIED, (), 1),
        ("s3-range-behind", Verdict.DIFFERS, (), 1),
        ("s3-range-behind", Verdict.UNTRIED, (), 0),
        ("s3-range-behind", Verdict.DIFFERS, ("--needed",), 0),
        ("s3-range", Verdict.DIFFERS, ("--needed",), 1),
        ("s3-range", Verdict.DIFFERS, ("--only", "sqs-*"), 0),
    ],
)
def test_its_exit_code(
    name: str,
    verdict: Verdict,
    options: tuple[str, ...],
    code: int,
    run: cli_rig.Run,
    verdicts: dict[str, Verdict],
) -> None:
    verdicts[name] = verdict
    assert run("conform", "--endpoint", "http://127.0.0.1:9", *options)[0] == code


def test_what_a_person_is_told(run: cli_rig.Run, verdicts: dict[str, Verdict]) -> None:
    verdicts["s3-range-behind"] = Verdict.DIFFERS
    call = ("conform", "--endpoint", "http://127.0.0.1:9", "--only", "s3-range*", "--name", "Mine")
    code, out, err = run(*call)
    assert (code, err) == (1, "")
    table, difference, summary = out.rstrip().split("\n\n")
    assert table.splitlines() == [
        "SERVICE  SEVERITY  AGREES  DIFFERS  UNTRIED",
        "s3       needed         2        0        0",
        "s3       noted          0        1        0",
    ]
    assert difference.splitlines() == [
        "DIFFERS  s3-range-behind (noted)",
        "  AWS   A range that begins behind the end answers 416 InvalidRange. [S3 API, GetObject]",
        "  here  something else",
        "  so    one more request where a part is empty",
    ]
    assert summary.startswith(
        "Mine: 2 of 2 rules that batchlab needs hold; 0 of 1 rules that it does without hold. ("
    )
    _, out, _ = run(*call, "--all")
    assert "s3-range-cut  needed    A range that reaches behind the end is cut off there." in out


def test_what_a_program_is_told(run: cli_rig.Run, verdicts: dict[str, Verdict]) -> None:
    verdicts["sqs-delay-901"] = Verdict.DIFFERS
    code, out, err = run("conform", "--endpoint", "http://127.0.0.1:9", "--json")
    told = json.loads(out)
    assert (code, err) == (1, "")
    assert (told["agrees"], told["needed_agree"]) == (False, True)
    assert told["counts"] == {"agrees": len(CHECKS) - 1, "differs": 1, "untried": 0}
    assert [one["check"] for one in told["checks"]] == [one.name for one in CHECKS]


def test_a_page_is_written_and_written_again(
    run: cli_rig.Run, verdicts: dict[str, Verdict], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    call = ("conform", "--endpoint", "http://127.0.0.1:9", "--name", "Mine", "--markdown", page)
    verdicts["sqs-wake"] = Verdict.DIFFERS
    run(*call)
    before = page.read_text()
    assert "`sqs-wake` | needed |" in before
    del verdicts["sqs-wake"]
    code, _, err = run(*call)
    assert (code, err) == (0, f"The report is in {page}.\n")
    assert page.read_text().count("### Mine") == 1
    assert "seen here" not in page.read_text()


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers that somebody had before are there again afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("dropped", [0, 2])
def test_only_the_first_interrupt_that_is_heard_counts(
    number: signal.Signals, dropped: int, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops what is raised in a finalizer."""
    cleaned: list[str] = []

    def close(_target: Target) -> list[str]:
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(again)
        cleaned.append("all")
        return []

    def work() -> None:
        for _ in range(dropped):
            with suppress(Stopped):
                signal.raise_signal(number)
        signal.raise_signal(number)

    monkeypatch.setattr(Target, "close", close)
    with (
        pytest.raises(Stopped),
        command._interruptible(),
        command._target(NOWHERE.url, None, None, None),
    ):
        work()
    assert cleaned == ["all"]
