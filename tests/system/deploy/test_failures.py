"""Stacks that cannot be created or changed, and interrupted operations, on MiniStack."""

from __future__ import annotations

import io
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from batchlab.cli.output import Stopped
from batchlab.core.errors import Refused
from batchlab.deploy import template
from batchlab.deploy.account import Account
from batchlab.deploy.apply import Apply, StackFailed
from batchlab.deploy.settings import Settings
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Event, State
from batchlab.runtime import aws_deployment
from batchlab.runtime.home import Home
from tests.support.aws.deploy import REGION, SMALL, Front, client, group, queues, release, stacks
from tests.support.cli import Run


def taken(name: str = "taken") -> str:
    client("iam").create_instance_profile(InstanceProfileName=name)
    return name


def test_a_stack_that_cannot_be_made_is_explained_and_made_anew(deploy: Run, tmp_path: Path) -> None:
    archive = release(tmp_path)
    wreck = f"Wrecked={taken()}"
    code, _, err = deploy("apply", "--yes", "--release", archive, "--set", wreck)
    assert code == 3
    assert "Error: The stack batchlab is ROLLBACK_COMPLETE: Wreck (AWS::IAM::InstanceProfile): " in err
    assert "already exists" in err
    assert "gc --aws" in err
    assert "The next `batchlab deploy apply` deletes the empty stack" in err
    assert stacks() == {"batchlab": "ROLLBACK_COMPLETE"}
    assert queues() == []

    # A plan is refused, the status explains the problem, and another apply starts again.
    code, _, err = deploy("plan")
    assert code == 2
    assert "ROLLBACK_COMPLETE" in err
    code, out, _ = deploy("status", "--json")
    assert code == 0
    assert json.loads(out)["cause"]["resource"] == "Wreck"
    code, _, err = deploy("apply", "--yes", "--release", archive, "--set", "Wrecked=")
    assert code == 0, err
    assert "First failure: Wreck (AWS::IAM::InstanceProfile)" in err
    assert stacks() == {"batchlab": "UPDATE_COMPLETE"}


def test_an_update_that_fails_leaves_the_stack_as_it_was(deploy: Run, tmp_path: Path) -> None:
    archive = release(tmp_path)
    deploy("apply", "--yes", "--release", archive)
    wreck = f"Wrecked={taken()}"
    more = ("--pool", "default:0-10x2", "--pool", "big:0-1x1", "--set", wreck)
    code, _, err = deploy("apply", "--yes", "--release", archive, *more)
    assert code == 3
    assert "UPDATE_ROLLBACK_COMPLETE: Wreck (AWS::IAM::InstanceProfile): " in err
    assert "The stack is as it was before." in err
    assert not [name for name in queues() if "big" in name]
    assert group("batchlab-pool-default")["MaxSize"] == 10
    _, out, _ = deploy("status")
    assert "UPDATE_ROLLBACK_COMPLETE" in out
    assert "Wreck (AWS::IAM::InstanceProfile)" in out


def whole(home: Home, front: Front, archive: Path, **parameters: str) -> Apply:
    wanted = Settings(region=REGION).with_parameters(parameters)
    stack = Stack(Account.open(), "batchlab")
    return Apply(stack, wanted, template.load(SMALL), home, front, lambda: archive)


def test_an_apply_that_is_interrupted_is_taken_up_by_the_next(account: str, home: Home, tmp_path: Path) -> None:
    """Ctrl-C arrives while the stack is being created. AWS continues the operation, and the next apply does the
    remaining steps."""
    archive = release(tmp_path)

    def stop(event: Event) -> None:
        raise Stopped(130)

    with pytest.raises(Stopped):
        whole(home, Front(seeing=stop), archive).run()
    assert stacks()["batchlab"] in ("CREATE_IN_PROGRESS", "CREATE_COMPLETE")
    front = Front()
    done = whole(home, front, archive).run()
    assert done is not None
    assert stacks() == {"batchlab": "UPDATE_COMPLETE"}
    assert aws_deployment.read(home) == done
    told = client("cloudformation").describe_stacks()["Stacks"][0]
    assert told["EnableTerminationProtection"]
    assert group("batchlab-manager")["MinSize"] == 1


COMMAND = """
import sys
from pathlib import Path
from batchlab.deploy import template
path = Path(sys.argv.pop(1))
template.shipped_template = lambda: path
from batchlab.cli import main
main()
"""


def started(home: Home, archive: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `batchlab deploy apply` in its own process, without a terminal."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            COMMAND,
            str(SMALL),
            "deploy",
            "apply",
            "--yes",
            "--release",
            str(archive),
            "--home",
            str(home.path),
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen[str], text: str) -> str:
    """Return the output up to a line with that text."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    pytest.fail(f"it has ended before it said {text!r}: {said}")


def test_ctrl_c_leaves_the_operation_running_and_the_next_apply_follows_it(
    account: str, home: Home, tmp_path: Path
) -> None:
    """The test controls the duration of the operation, because one resource waits for a signal."""
    archive = release(tmp_path)
    first = started(home, archive, "--set", "Slow=yes")
    until(first, "CREATE_COMPLETE PoolTasks")
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "AWS goes on with the stack" in said
    assert "Traceback" not in said
    assert stacks() == {"batchlab": "CREATE_IN_PROGRESS"}

    second = started(home, archive)
    until(second, "The stack batchlab is CREATE_IN_PROGRESS. Waiting for the end of this operation.")
    # The output includes all events from the beginning of the operation.
    until(second, "CREATE_COMPLETE PoolTasks")
    client("cloudformation").signal_resource(
        StackName="batchlab", LogicalResourceId="Wait", UniqueId="1", Status="SUCCESS"
    )
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert "CREATE_COMPLETE Wait" in said
    assert stacks() == {"batchlab": "UPDATE_COMPLETE"}
    assert aws_deployment.read(home) is not None


def test_plan_does_not_wait(deploy: Run, home: Home, tmp_path: Path) -> None:
    archive = release(tmp_path)
    going = started(home, archive, "--set", "Slow=yes")
    until(going, "CREATE_COMPLETE PoolTasks")
    code, _, err = deploy("plan")
    assert code == 2
    assert "The stack batchlab is CREATE_IN_PROGRESS." in err
    assert "waits for the end of the operation" in err
    client("cloudformation").signal_resource(
        StackName="batchlab", LogicalResourceId="Wait", UniqueId="1", Status="FAILURE"
    )
    _, said = going.communicate(timeout=60)
    assert going.returncode == 3
    assert "is ROLLBACK_COMPLETE: Wait (AWS::CloudFormation::WaitCondition)" in said


def test_a_rollback_that_hangs_is_resumed(
    account: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = release(tmp_path)
    whole(home, Front(), archive).run()
    stuck = Stack.state
    resumed: list[str] = []

    def state(self: Stack, stack: str | None = None) -> State | None:
        found = stuck(self, stack)
        return found if resumed or not found else replace(found, status="UPDATE_ROLLBACK_FAILED")

    def resume(self: Stack) -> None:
        resumed.append(self.name)
        # The events only need some operation of the stack, so an update replaces the continued rollback.
        self.protect(on=False)
        self.account.client("cloudformation").update_stack(
            StackName=self.name,
            UsePreviousTemplate=True,
            Parameters=[
                {"ParameterKey": "LogDays", "ParameterValue": "7"},
                {"ParameterKey": "Release", "UsePreviousValue": True},
            ],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )

    monkeypatch.setattr(Stack, "state", state)
    monkeypatch.setattr(Stack, "resume_rollback", resume)
    unwilling = Front(agreed=False)
    with pytest.raises(Refused, match="stays UPDATE_ROLLBACK_FAILED"):
        whole(home, unwilling, archive).run()
    assert unwilling.questions == ["Continue the rollback?"]
    assert not resumed
    assert whole(home, Front(), archive).run() is not None
    assert resumed == ["batchlab"]
    assert stacks() == {"batchlab": "UPDATE_COMPLETE"}


def test_running_operation_of_another_user_is_followed_first(
    account: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = release(tmp_path)
    whole(home, Front(), archive).run()
    # The state simulates another apply that is still running. MiniStack itself finishes each operation at once.
    real, answers = Stack.state, iter([True, False])

    def state(self: Stack, stack: str | None = None) -> State | None:
        found = real(self, stack)
        is_moving = next(answers, False)
        return replace(found, status="UPDATE_IN_PROGRESS") if found and is_moving else found

    monkeypatch.setattr(Stack, "state", state)
    front = Front()
    assert whole(home, front, archive).run() is not None
    assert front.said[0] == "The stack batchlab is UPDATE_IN_PROGRESS. Waiting for the end of this operation."
    assert [one.status for one in front.seen if one.is_of_stack] == ["UPDATE_IN_PROGRESS", "UPDATE_COMPLETE"]


def test_a_failure_carries_its_cause(account: str, home: Home, tmp_path: Path) -> None:
    taken()
    with pytest.raises(StackFailed) as failed:
        whole(home, Front(), release(tmp_path), Wrecked="taken").run()
    assert failed.value.cause is not None
    assert failed.value.cause.resource == "Wreck"
    assert failed.value.exit_code == 3


def test_a_busy_aws_only_takes_longer(deploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third call of all commands is throttled."""
    real, count, refused = Account.client, itertools.count(1), []
    body = (
        b"<ErrorResponse><Error><Type>Sender</Type><Code>Throttling</Code>"
        b"<Message>Rate exceeded</Message></Error></ErrorResponse>"
    )

    def refuse(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if next(count) % 3:
            return None
        refused.append(request.url)
        headers: Any = {"Content-Type": "text/xml"}
        return AWSResponse(request.url, 400, headers, RawBytes(body))

    def busy(self: Account, service: str) -> Any:
        made = real(self, service)
        if service in ("cloudformation", "autoscaling", "sts"):
            made.meta.events.register("before-send", refuse, unique_id="busy")
        return made

    monkeypatch.setattr(Account, "client", busy)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: None)
    archive = release(tmp_path)
    for arguments in (
        ("plan",),
        ("apply", "--yes", "--release", archive),
        ("apply", "--yes", "--release", archive, "--pool", "default:0-9x1"),
        ("status",),
        ("destroy", "--yes"),
    ):
        before = len(refused)
        code, _, err = deploy(*arguments)
        assert code == 0, (arguments, err)
        assert len(refused) > before
    assert stacks() == {}
    assert client("s3").list_buckets()["Buckets"] == []


class RawBytes(io.BytesIO):
    """A response body as botocore reads it from a connection."""

    def stream(self, **_: object) -> Iterator[bytes]:
        while part := self.read(1024):
            yield part
