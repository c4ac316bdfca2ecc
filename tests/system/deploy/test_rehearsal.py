"""`batchlab deploy rehearse` on MiniStack, from the creation of the shipped stack to the report, and with a failure in
each step. After each rehearsal, the account must be empty."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from batchlab.cli import demo, rehearsal_jobs
from batchlab.cli.rehearsal_steps import STACK, Site
from batchlab.conform import check_table
from batchlab.conform.check import Check, Differs, Severity
from batchlab.core.errors import BackendError
from batchlab.deploy import template
from batchlab.deploy.account import Account
from batchlab.deploy.leftovers import Leftovers
from batchlab.deploy.rehearsal import Step
from examples.example_data import write_claims, write_records, write_rides
from tests.support.aws.deploy import SMALL, release
from tests.support.aws.process_plane import ProcessPlane, process_plane
from tests.support.cli import runner
from tests.system.deploy.test_failures import RawBytes

DESTROY = f"batchlab deploy destroy --stack {STACK} --region us-east-1 --delete-data --yes"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPlane]:
    with process_plane(tmp_path_factory.mktemp("plane"), STACK) as found:
        yield found


class Rehearse:
    """A runner of `deploy rehearse` in this process. After a run, `report` is the JSON report."""

    def __init__(self, plane: ProcessPlane, folder: Path, patch: pytest.MonkeyPatch, run: Any) -> None:
        self.plane, self.folder, self.patch, self._run = plane, folder, patch, run
        self.home = folder / "home"
        self.archive = release(folder)
        self.report: dict[str, Any] = {}

    def only(self, *names: str, **limits_s: float) -> None:
        """Let a rehearsal have only these steps. `limits_s` has shorter limits of steps by name."""
        real = Site.steps

        def steps(site: Site) -> list[Step]:
            chosen = [step for step in real(site) if step.name in names]
            return [replace(step, limit_s=limits_s.get(step.name, step.limit_s)) for step in chosen]

        self.patch.setattr(Site, "steps", steps)

    def __call__(self, *more: object) -> tuple[int, str, str]:
        arguments = ("--yes", "--budget", "5USD", "--release", self.archive, "--home", self.home, *more)
        code, out, err = self._run("deploy", "rehearse", *arguments)
        self.report = json.loads((self.home / "aws" / "rehearsal" / "report.json").read_text())
        return code, out, err

    @property
    def outcomes(self) -> dict[str, str]:
        return {step["name"]: step["outcome"] for step in self.report["steps"]}

    def reason(self, name: str) -> str:
        return str(next(step["reason"] for step in self.report["steps"] if step["name"] == name))

    def nothing_is_left(self) -> None:
        self.plane.until_without_groups()
        assert self.plane.left() == {}


@pytest.fixture
def rehearse(
    plane: ProcessPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Rehearse]:
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "BATCHLAB_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in plane.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo, "make_data", make_data)
    # A job during which a fault occurs must outlast the fault on processes, which are replaced in seconds.
    monkeypatch.setattr(rehearsal_jobs, "TASKS", 40)
    monkeypatch.setattr(rehearsal_jobs, "TASK_S", 0.5)
    yield Rehearse(plane, tmp_path, monkeypatch, runner(monkeypatch, capsys))
    assert plane.ec2
    plane.ec2.refuses, plane.broken = False, []


def make_data(name: str, folder: Path) -> str:
    """Write little input for the examples."""
    if name == "claims":
        write_claims(folder, files=8, claims_per_file=5)
    elif name == "transform":
        write_rides(folder, rows=2000)
    else:
        write_records(folder, size_bytes=5 * 2**20)
    return "little data"


def test_rehearsal_end_to_end(rehearse: Rehearse) -> None:
    code, out, err = rehearse("--json")
    assert code == 0, (rehearse.report, err[-3000:])
    skipped = {"job media": "ffmpeg", "spot notice": "does not have AWS Fault Injection Service"}
    assert {name: outcome for name, outcome in rehearse.outcomes.items() if outcome != "passed"} == dict.fromkeys(
        skipped, "not tried"
    )
    assert all(why in rehearse.reason(name) for name, why in skipped.items())
    rehearse.nothing_is_left()

    report = rehearse.report
    assert json.loads(out) == report
    assert report["succeeded"]
    assert report["left"] == []
    assert report["about"]["account"] == "********0000"
    steps = {step["name"]: step for step in report["steps"]}
    assert list(steps) == [
        *("earlier", "conform", "stack", "manager", "job claims", "job transform", "job sort", "job media"),
        *("worker kill", "manager kill", "spot notice", "bill", "destroy", "leftovers"),
    ]
    # MiniStack breaks rules that batchlab does not need.
    differing = {row["subject"] for row in steps["conform"]["notes"]["comparisons"]}
    assert "s3-key-length" in differing
    figures = steps["worker kill"]["notes"]["figures"]
    assert 0 < figures["gone_s"] < figures["replaced_s"] < 60
    compared = {row["subject"] for row in steps["bill"]["notes"]["comparisons"]}
    assert {"EC2 workers", "SQS", "S3", "VPC endpoints", "job claims", "job worker-kill"} <= compared
    assert steps["bill"]["notes"]["figures"]["metered_usd"] > 0

    page = (rehearse.home / "aws" / "rehearsal" / "report.md").read_text()
    assert "| manager kill | terminate the manager's instance | passed |" in page
    assert "time until another manager led" in page
    token = (rehearse.home / "aws" / "rehearsal" / "token").read_text().strip()
    assert token not in page + out
    assert "000000000000" not in page + out
    # The progress has a line at the begin and the end of each step.
    assert re.search(r"\[3/14\] stack: create the stack, at most .*\n", err)
    assert re.search(r"\[13/14\] destroy: passed after ", err)


def test_failing_steps_hide_no_later_step(rehearse: Rehearse) -> None:
    """The rules of S3 are broken, the input of an example is damaged, EC2 does not allow a termination, and the price
    book is lost."""

    def broken(_: object) -> None:
        raise Differs("the object is missing")

    def damaged(name: str, folder: Path) -> str:
        text = make_data(name, folder)
        for file in folder.iterdir():
            file.write_bytes(b"damaged")
        return text

    check = Check("s3-test", Severity.NEEDED, "S3 has objects.", "a test", "all", "no job works", broken)
    rehearse.patch.setattr(check_table, "CHECKS", (check,))
    rehearse.patch.setattr(demo, "make_data", damaged)
    prices = rehearse.home / "aws" / "rehearsal" / "prices.toml"
    real = Site.compare_bill

    def without_prices(site: Site, notes: Any) -> None:
        prices.write_text("currency = 'EUR'")
        real(site, notes)

    rehearse.patch.setattr(Site, "compare_bill", without_prices)
    assert rehearse.plane.ec2
    rehearse.plane.ec2.refuses = True
    rehearse.only(
        *(
            "earlier",
            "conform",
            "stack",
            "manager",
            "job claims",
            "worker kill",
            "manager kill",
            "bill",
            "destroy",
            "leftovers",
        )
    )
    code, out, err = rehearse()
    assert code == 1, err
    assert rehearse.outcomes == {
        "earlier": "passed",
        "conform": "failed",
        "stack": "passed",
        "manager": "passed",
        "job claims": "failed",
        "worker kill": "failed",
        "manager kill": "failed",
        "bill": "failed",
        "destroy": "passed",
        "leftovers": "passed",
    }
    assert "A rule that batchlab needs does not hold." in rehearse.reason("conform")
    assert "ended FAILED" in rehearse.reason("job claims")
    for name in ("worker kill", "manager kill"):
        assert "not authorized" in rehearse.reason(name)
    assert "currency is 'EUR'" in rehearse.reason("bill")
    assert "The rehearsal failed: 5 of 10 steps passed, 5 failed" in out
    assert "Traceback" not in err
    rehearse.nothing_is_left()


def test_a_stack_that_cannot_be_created_is_removed(rehearse: Rehearse) -> None:
    rehearse.patch.setattr(template, "shipped_template", lambda: SMALL)
    iam = rehearse.plane.aws("iam")
    iam.create_instance_profile(InstanceProfileName="taken")
    rehearse.only("earlier", "stack", "manager", "destroy", "leftovers")
    code, _, err = rehearse("--set", "Wrecked=taken")
    iam.delete_instance_profile(InstanceProfileName="taken")
    assert code == 1, err
    assert rehearse.outcomes == {
        "earlier": "passed",
        "stack": "failed",
        "manager": "not tried",
        "destroy": "passed",
        "leftovers": "passed",
    }
    assert "ROLLBACK_COMPLETE: Wreck (AWS::IAM::InstanceProfile)" in rehearse.reason("stack")
    rehearse.nothing_is_left()


def test_a_manager_that_never_answers_ends_the_step(rehearse: Rehearse) -> None:
    rehearse.plane.broken = ["/bin/sleep", "600"]
    rehearse.only("earlier", "stack", "manager", "job claims", "destroy", "leftovers", manager=8.0)
    code, _, err = rehearse()
    assert code == 1, err
    assert rehearse.outcomes["manager"] == "failed"
    assert rehearse.reason("manager") == "The step did not end within 8.0 s."
    assert rehearse.outcomes["job claims"] == "not tried"
    rehearse.nothing_is_left()


def refuse_deletion(patch: pytest.MonkeyPatch) -> None:
    """Let CloudFormation refuse every deletion of a stack, as for a deployer without the permission."""
    real = Account.client
    body = (
        b"<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code>"
        b"<Message>User: me is not authorized to perform: cloudformation:DeleteStack</Message></Error></ErrorResponse>"
    )

    def refuse(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        headers: Any = {"Content-Type": "text/xml"}
        return AWSResponse(request.url, 403, headers, RawBytes(body))

    def client(self: Account, service: str) -> Any:
        made = real(self, service)
        if service == "cloudformation":
            made.meta.events.register("before-send.cloudformation.DeleteStack", refuse, unique_id="refuse")
        return made

    patch.setattr(Account, "client", client)


def test_a_failed_destruction_names_all_that_is_left_and_the_next_rehearsal_removes_it(rehearse: Rehearse) -> None:
    rehearse.only("earlier", "stack", "destroy", "leftovers")
    with pytest.MonkeyPatch.context() as patch:
        refuse_deletion(patch)
        code, out, _ = rehearse()
    assert code == 1
    assert rehearse.outcomes == {"earlier": "passed", "stack": "passed", "destroy": "failed", "leftovers": "failed"}
    assert "may not do cloudformation:DeleteStack" in rehearse.reason("destroy")
    assert f"Left: stack {STACK} (UPDATE_COMPLETE)\n  Remove it with: {DESTROY}" in out
    # The report hides the number of the account, and the terminal shows it.
    assert "000000000000" not in json.dumps(rehearse.report)
    resources = rehearse.plane.aws("cloudformation").list_stack_resources(StackName=STACK)["StackResourceSummaries"]
    assert len(resources) > 30
    for one in resources:
        assert f"Left: {one['ResourceType']} {one['PhysicalResourceId']}\n  Remove it with: {DESTROY}" in out

    rehearse.only("earlier", "destroy", "leftovers")
    code, out, err = rehearse()
    assert code == 0, err
    assert rehearse.report["left"] == []
    assert f"The stack {STACK} was deleted with its data." in json.dumps(rehearse.report["steps"][0])
    rehearse.nothing_is_left()


def test_a_resource_that_the_destruction_leaves_is_removed_and_reported(rehearse: Rehearse) -> None:
    name = f"{STACK}-stray"
    rehearse.plane.aws("sqs").create_queue(QueueName=name, tags={"batchlab.stack": STACK})
    rehearse.only("destroy", "leftovers")
    code, _, err = rehearse()
    assert code == 1, err
    assert rehearse.outcomes == {"destroy": "not tried", "leftovers": "failed"}
    assert rehearse.reason("leftovers") == "The destruction of the stack left 1 resource."
    assert f"sqs:queue {name} was left, and is removed." in json.dumps(rehearse.report["steps"])
    rehearse.nothing_is_left()


def test_a_search_that_aws_does_not_allow_is_not_a_clean_account(rehearse: Rehearse) -> None:
    def refuse(_: object) -> None:
        raise BackendError("me may not do tag:GetResources.")

    rehearse.patch.setattr(Leftovers, "tagged_resources", refuse)
    rehearse.only("destroy", "leftovers")
    code, out, err = rehearse()
    assert code == 1, err
    command = "batchlab gc --aws --yes --region us-east-1"
    (left,) = rehearse.report["left"]
    assert left == {"resource": f"resources with the tag of the stack {STACK}, perhaps", "command": command}
    assert "Nothing was found." not in (rehearse.home / "aws" / "rehearsal" / "report.md").read_text()
    assert f"Remove it with: {command}" in out


# --- Signals -------------------------------------------------------------------------------------


def started(rehearse: Rehearse) -> subprocess.Popen[str]:
    arguments = ["--yes", "--budget", "5USD", "--release", str(rehearse.archive), "--home", str(rehearse.home)]
    return subprocess.Popen(
        [sys.executable, "-m", "batchlab", "deploy", "rehearse", *arguments],
        env={**os.environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_said(process: subprocess.Popen[str], texts: Sequence[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if any(text in line for text in texts):
            return
    pytest.fail(f"The rehearsal ended before it printed {texts}.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_destroys_everything(rehearse: Rehearse, number: signal.Signals) -> None:
    """The first signal arrives during the checks, and the second while the stack is created."""
    running = started(rehearse)
    until_said(running, ["conform: check the rules"] if number == signal.SIGINT else ["stack: create the stack"])
    running.send_signal(number)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert "The step was interrupted." in out
    assert "The rehearsal was interrupted." in out
    rehearse.nothing_is_left()


def test_a_closed_pipe_destroys_everything(rehearse: Rehearse) -> None:
    """Ctrl-C also ends `tee` in `batchlab deploy rehearse 2>&1 | tee log`."""
    with started(rehearse) as running:
        until_said(running, ["The resources of the stack exist"])
        assert running.stderr
        assert running.stdout
        running.stderr.close()
        running.send_signal(signal.SIGINT)
        out = running.stdout.read()
        assert running.wait(300) == 130, out
    assert re.search(r"destroy +passed", out), out
    rehearse.nothing_is_left()


def test_the_next_rehearsal_removes_what_a_killed_one_left(rehearse: Rehearse) -> None:
    running = started(rehearse)
    until_said(running, ["conform: check the rules"])
    until_said(running, ["checks"])
    running.kill()
    running.communicate()
    assert any(name.startswith("batchlab-conform-") for name in rehearse.plane.left().get("queues", []))
    rehearse.only("earlier", "destroy", "leftovers")
    code, _, err = rehearse()
    assert code == 0, err
    rehearse.nothing_is_left()
