"""The output of `batchlab deploy` for a person: plans, events, and questions."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from rich.console import Console

from batchlab.cli import deploy_options
from batchlab.cli.deploy_options import Person, plan_text
from batchlab.cli.progress import StackDisplay
from batchlab.core.errors import UsageError
from batchlab.deploy import template
from batchlab.deploy.account import Account
from batchlab.deploy.apply import StackFailed, python_of
from batchlab.deploy.leftovers import remove, resource_of
from batchlab.deploy.plan import Cost, Plan, cost, shape_of
from batchlab.deploy.settings import Settings
from batchlab.deploy.stack_records import Cause, Change, ChangeSet, Event, State
from batchlab.runtime.home import Home
from tests.support.aws.deploy import SMALL, release


def a_plan(*changes: Change, is_new: bool = False, known: Cost | None = None) -> Plan:
    return Plan(
        Settings("grid"),
        "123",
        "arn:aws:iam::123:user/me",
        "eu-west-1",
        is_new,
        ChangeSet("c", "s", changes),
        {},
        known or Cost(None, "What it costs is not known: no price."),
        1000,
    )


def an_event(resource: str, status: str, reason: str = "") -> Event:
    kind = "AWS::CloudFormation::Stack" if resource == "grid" else "AWS::SQS::Queue"
    return Event("e", 0.0, resource, kind, status, reason, is_of_stack=resource == "grid")


# --- Plans ---------------------------------------------------------------------------------------


def test_plan_shows_its_notes() -> None:
    plan = replace(a_plan(is_new=True), notes=("The key could not be checked.", "SimpleDB is old."))
    assert "\n\nNote: The key could not be checked.\nNote: SimpleDB is old.\n\n" in plan_text(plan)
    assert plan.to_json()["notes"] == list(plan.notes)
    assert "Note:" not in plan_text(a_plan(is_new=True))


def test_update_lists_reasons_and_replacements() -> None:
    text = plan_text(
        a_plan(
            Change("Modify", "Group", "AWS::X::Y", "False", ("MaxSize (PoolMax)",), "g"),
            Change("Modify", "Queue", "AWS::SQS::Queue", "True", tuple("abcd"), "q"),
            Change("Remove", "Old", "AWS::X::Y", "", (), "o"),
        )
    )
    assert "Stack grid in eu-west-1, account 123, as arn:aws:iam::123:user/me." in text
    assert "What it costs is not known: no price." in text
    assert "Update, 3 changes:" in text
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith(("Mod", "Rem"))}
    assert lines["Group"].split() == ["Modify", "Group", "X::Y", "False", "MaxSize", "(PoolMax)"]
    assert lines["Queue"].endswith("a, b, c, …")
    assert lines["Old"].split() == ["Remove", "Old", "X::Y", "-", "-"]
    assert "Replaced, or perhaps: Queue." in text


def test_update_without_changes_is_reported() -> None:
    assert plan_text(a_plan()).endswith("No changes: the stack is as it is to be.")
    assert a_plan().to_json()["action"] == "none"


def test_endpoints_and_alarms_are_counted_in_the_template() -> None:
    found = shape_of(template.load(template.shipped_template()))
    assert found.interface_endpoints >= 4
    assert found.alarms >= 3
    assert shape_of(template.load(SMALL)).interface_endpoints == 0


def test_prices_of_another_region_are_marked() -> None:
    parameters = {"PoolInstanceTypes": "m7i.large", "ManagerInstanceType": "t3.small"}
    there = cost(parameters, "eu-south-2", None, shape_of(template.load(SMALL)))
    assert there.hourly is not None
    assert "eu-south-2" in there.note
    unknown = {**parameters, "PoolInstanceTypes": "q9.huge"}
    nowhere = cost(unknown, "us-east-1", None, shape_of(template.load(SMALL)))
    assert nowhere.hourly is None
    assert "q9.huge" in nowhere.note


# --- Events --------------------------------------------------------------------------------------


def test_output_without_a_terminal_has_a_line_per_finished_resource(capsys: pytest.CaptureFixture[str]) -> None:
    lines = StackDisplay("creating", 3, is_live=False)
    for event in (
        an_event("grid", "CREATE_IN_PROGRESS", "User Initiated"),
        an_event("A", "CREATE_IN_PROGRESS"),
        an_event("A", "CREATE_FAILED", "no\nmore"),
    ):
        lines.show_event(event)
    said = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "CREATE_IN_PROGRESS grid (AWS::CloudFormation::Stack): User Initiated",
        "CREATE_FAILED A (AWS::SQS::Queue): no more",
    ]


def test_a_terminal_has_a_bar_and_what_is_being_made(capsys: pytest.CaptureFixture[str]) -> None:
    picture = StackDisplay("creating", 3, is_live=True)

    def drawn() -> str:
        page = Console(file=io.StringIO(), width=100)
        page.print(picture.draw())
        assert isinstance(page.file, io.StringIO)
        return page.file.getvalue()

    picture.show_event(an_event("A", "CREATE_IN_PROGRESS"))
    picture.show_event(an_event("B", "CREATE_IN_PROGRESS"))
    assert "0/3" in drawn()
    assert "create_in_progress A" in drawn()
    picture.show_event(an_event("A", "CREATE_COMPLETE"))
    picture.show_event(an_event("B", "CREATE_FAILED", "taken"))
    assert "2/3" in drawn()
    assert "create_in_progress" not in drawn()
    assert capsys.readouterr().err == "CREATE_FAILED B (AWS::SQS::Queue): taken\n"
    for name in "CDEF":
        picture.show_event(an_event(name, "UPDATE_COMPLETE"))
    assert "6/6" in drawn()


def test_many_things_at_once_do_not_fill_the_screen() -> None:
    picture = StackDisplay("creating", 50, is_live=True)
    for number in range(50):
        picture.show_event(an_event(f"R{number}", "CREATE_IN_PROGRESS"))
    page = Console(file=io.StringIO(), width=100)
    page.print(picture.draw())
    assert isinstance(page.file, io.StringIO)
    assert len(page.file.getvalue().splitlines()) < 12


# --- Questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "answer", "agrees"),
    [
        ("", "y", True),
        ("", "YES", True),
        ("", "n", False),
        ("", "", False),
        ("grid", "grid", True),
        ("grid", "y", False),
        ("grid", "Grid", False),
    ],
)
def test_accepted_confirmations(monkeypatch: pytest.MonkeyPatch, typed: str, answer: str, agrees: bool) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda: answer)
    assert Person(typed=typed).agrees("Go on?") is agrees


def test_end_of_input_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> str:
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", nothing)
    assert not Person().agrees("Go on?")
    assert Person(yes=True).agrees("Go on?")


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "next_"),
    [
        ("ROLLBACK_COMPLETE", "creates it again"),
        ("UPDATE_ROLLBACK_COMPLETE", "as it was before"),
        ("UPDATE_ROLLBACK_FAILED", "continues the rollback"),
        ("DELETE_FAILED", "then run `batchlab deploy destroy` again"),
    ],
)
def test_failure_names_its_cause_a_remedy_and_the_remains(status: str, next_: str) -> None:
    state = State("id", "grid", status, {}, {}, False, 0.0)
    error = StackFailed(state, Cause("Queue", "AWS::SQS::Queue", "It exists.", "Remove it."))
    assert error.message == f"The stack grid is {status}: Queue (AWS::SQS::Queue): It exists."
    assert error.remedy.startswith("Remove it. ")
    assert next_ in error.remedy
    assert StackFailed(state, None).message == f"The stack grid is {status}."


# --- Releases and ARNs ---------------------------------------------------------------------------


def test_release_names_its_python(tmp_path: Path) -> None:
    assert python_of(release(tmp_path)) == "3.12"
    damaged = tmp_path / "x.tar.gz"
    damaged.write_bytes(b"no")
    with pytest.raises(UsageError, match=r"x\.tar\.gz is not a release: not a gzip file\. Name") as refused:
        python_of(damaged)
    assert "\n" not in str(refused.value)


def test_renamed_release_is_refused(tmp_path: Path) -> None:
    archive = release(tmp_path)
    wanted = Settings()
    home = Home(tmp_path)
    assert deploy_options.release_archive(wanted, archive, home) == archive
    other = archive.rename(tmp_path / "mine.tar.gz")
    with pytest.raises(UsageError, match="is not the SHA-256"):
        deploy_options.release_archive(wanted, other, home)
    with pytest.raises(UsageError, match="cannot be read"):
        deploy_options.release_archive(wanted, archive, home)


@pytest.mark.parametrize(
    ("arn", "kind", "name"),
    [
        ("arn:aws:s3:::grid-bucket-1", "s3:bucket", "grid-bucket-1"),
        ("arn:aws:sqs:eu-west-1:1:grid-events", "sqs:queue", "grid-events"),
        ("arn:aws:logs:eu-west-1:1:log-group:/batchlab/grid:*", "logs:log-group", "/batchlab/grid"),
        (
            "arn:aws:autoscaling:eu-west-1:1:autoScalingGroup:uuid:autoScalingGroupName/grid-m",
            "autoscaling:group",
            "grid-m",
        ),
        ("arn:aws:ec2:eu-west-1:1:launch-template/lt-1", "ec2:launch-template", "lt-1"),
        ("arn:aws:ec2:eu-west-1:1:instance/i-1", "ec2:instance", "i-1"),
        ("arn:aws:secretsmanager:eu-west-1:1:secret:TokenSecret-x-a1", "secretsmanager:secret", "TokenSecret-x-a1"),
        ("arn:aws:cloudwatch:eu-west-1:1:alarm:grid-down", "cloudwatch:alarm", "grid-down"),
        ("arn:aws:rds:eu-west-1:1:snapshot:grid-1", "rds:snapshot", "grid-1"),
        ("arn:aws:sns:eu-west-1:1:grid-alarms", "sns:topic", "grid-alarms"),
        ("arn:aws:cloudformation:eu-west-1:1:stack/grid/u", "cloudformation:stack", "grid/u"),
    ],
)
def test_names_in_an_arn(arn: str, kind: str, name: str) -> None:
    thing = resource_of(arn, "grid")
    assert (thing.kind, thing.name) == (kind, name)


def test_a_topic_is_deleted_by_its_arn() -> None:
    arn = "arn:aws:sns:eu-west-1:1:grid-alarms"
    sns: Any = boto3.client("sns", region_name="eu-west-1", aws_access_key_id="a", aws_secret_access_key="b")
    account = Account("eu-west-1", "1")
    account._clients["sns"] = sns
    with Stubber(sns) as stub:
        stub.add_response("delete_topic", {}, {"TopicArn": arn})
        remove(account, resource_of(arn, "grid"), lambda _: None)
        stub.assert_no_pending_responses()
