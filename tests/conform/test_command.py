"""The command `batchlab conform` without an endpoint."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from batchlab.cli import endpoints
from batchlab.cli.output import Stopped
from batchlab.conform.check import Check, CheckVerdict
from batchlab.conform.check_table import CHECKS
from batchlab.conform.run import Result
from batchlab.conform.target import Target
from tests.support.cli import Run, run
from tests.support.conform.site import NOWHERE, no_aws

__all__ = ["run"]

__all__ = ["no_aws"]

pytestmark = pytest.mark.usefixtures("no_aws")


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> dict[str, CheckVerdict]:
    """Replace the checks by fixed verdicts, by name. A check without an entry agrees."""
    given: dict[str, CheckVerdict] = {}

    def pretend(_: Target, checks: list[Check], **__: object) -> list[Result]:
        found = [(check, given.get(check.name, CheckVerdict.AGREES)) for check in checks]
        return [
            Result(check, verdict, "" if verdict is CheckVerdict.AGREES else "something else", 0.1)
            for check, verdict in found
        ]

    monkeypatch.setattr("batchlab.conform.run.run", pretend)
    monkeypatch.setattr(Target, "open", lambda *_: None)
    return given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Without --endpoint, the checks would create a bucket and about 100 queues in an AWS account"),
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
        (("--aws",), "AWS credentials are missing"),
        (("--endpoint", "http://a", "--service", "ec2"), "batchlab does not have checks for the service 'ec2'"),
        (("--aws", "--service", "autoscaling"), "launch instances, so they do not run on AWS itself"),
        (("--endpoint", "http://a", "--template", "t"), "--template is for --service autoscaling"),
        (("--endpoint", "http://a", "--service", "autoscaling", "--only", "s3-*"), "No check has a name like s3-*"),
        (("--endpoint", "http://a", "--service", "s3", "--markdown", "x.md"), "Leave out --only"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str, run: Run) -> None:
    code, out, err = run("conform", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_silent_endpoint_is_reported(run: Run) -> None:
    with socket.socket() as nobody:
        # The port is bound but does not listen, so connections are refused and no other program can use the port.
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
                f"Error: {service} does not respond at {url}.\n"
                "  Start the service at this address, or correct the address.\n"
            )


@pytest.mark.parametrize(
    ("name", "verdict", "options", "code"),
    [
        ("s3-range", CheckVerdict.AGREES, (), 0),
        ("s3-range", CheckVerdict.DIFFERS, (), 1),
        ("s3-range", CheckVerdict.UNTRIED, (), 1),
        ("s3-range-behind", CheckVerdict.DIFFERS, (), 1),
        ("s3-range-behind", CheckVerdict.UNTRIED, (), 0),
        ("s3-range-behind", CheckVerdict.DIFFERS, ("--needed",), 0),
        ("s3-range", CheckVerdict.DIFFERS, ("--needed",), 1),
        ("s3-range", CheckVerdict.DIFFERS, ("--only", "sqs-*"), 0),
    ],
)
def test_its_exit_code(
    name: str, verdict: CheckVerdict, options: tuple[str, ...], code: int, run: Run, verdicts: dict[str, CheckVerdict]
) -> None:
    verdicts[name] = verdict
    assert run("conform", "--endpoint", "http://127.0.0.1:9", *options)[0] == code


def test_text_output(run: Run, verdicts: dict[str, CheckVerdict]) -> None:
    verdicts["s3-range-behind"] = CheckVerdict.DIFFERS
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
        "  AWS   A range that starts after the end of the object returns 416 InvalidRange. [S3 API, GetObject]",
        "  here  something else",
        "  so    the adapter sends one more request for an empty part of an input",
    ]
    assert summary.startswith("Mine: 2 of 2 needed rules hold; 0 of 1 noted rules hold. (")
    _, out, _ = run(*call, "--all")
    assert "s3-range-cut  needed    A range that ends after the end of the object is shortened." in out


def test_json_output(run: Run, verdicts: dict[str, CheckVerdict]) -> None:
    verdicts["sqs-delay-901"] = CheckVerdict.DIFFERS
    code, out, err = run("conform", "--endpoint", "http://127.0.0.1:9", "--json")
    told = json.loads(out)
    assert (code, err) == (1, "")
    assert (told["agrees"], told["needed_agree"]) == (False, True)
    assert told["counts"] == {"agrees": len(CHECKS) - 1, "differs": 1, "untried": 0}
    assert [one["check"] for one in told["checks"]] == [one.name for one in CHECKS]


def test_a_page_is_written_and_written_again(run: Run, verdicts: dict[str, CheckVerdict], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    call = ("conform", "--endpoint", "http://127.0.0.1:9", "--name", "Mine", "--markdown", page)
    verdicts["sqs-wake"] = CheckVerdict.DIFFERS
    run(*call)
    before = page.read_text()
    assert "`sqs-wake` | needed |" in before
    del verdicts["sqs-wake"]
    code, _, err = run(*call)
    assert (code, err) == (0, f"The report is in {page}.\n")
    assert page.read_text().count("### Mine") == 1
    assert "observed" not in page.read_text()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Check that the previous signal handlers are restored."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("dropped", [0, 2])
def test_only_the_first_interrupt_counts(
    number: signal.Signals, dropped: int, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops an exception that is raised in a finalizer."""
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
    with pytest.raises(Stopped), endpoints._interruptible(), endpoints._target(NOWHERE.url, None, None, None):
        work()
    assert cleaned == ["all"]
