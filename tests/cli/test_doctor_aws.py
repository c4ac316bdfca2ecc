"""The doctor's output about AWS without a stack, and the output for a home that is connected to a stack."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.cli import option_values
from batchlab.cli.doctor import Level, stack_findings
from batchlab.core.errors import Unreachable
from batchlab.deploy.account import Account
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.home import Home

KNOWN = AwsDeployment("grid", "eu-west-1", "bucket", "grid-", "grid-manager", "arn:aws:secretsmanager:::s", ())


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the AWS credentials and the plugin of Session Manager."""
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("BATCHLAB_MANAGER_URL", raising=False)


@pytest.mark.usefixtures("nobody")
def test_doctor_lists_missing_parts_before_the_first_stack(tmp_path: Path) -> None:
    found = {finding.about: finding for finding in stack_findings(Home(tmp_path), factory.load("aws"))}
    assert list(found) == ["account", "stack", "session"]
    assert {one.level for one in found.values()} == {Level.FAIL}
    assert found["account"].text == "AWS credentials are missing."
    assert found["stack"].text.startswith("No stack is recorded")
    assert "session-manager-plugin is not installed" in found["session"].text


@pytest.mark.usefixtures("nobody")
def test_known_stack_is_not_queried_without_credentials(tmp_path: Path) -> None:
    home = Home(tmp_path)
    aws_deployment.write(home, KNOWN)
    assert [finding.about for finding in stack_findings(home, factory.load("aws"))] == ["account", "session"]


@pytest.mark.usefixtures("nobody")
def test_caller_identity_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(region: str | None = None, **_: object) -> Account:
        return Account(region or "eu-west-2", "123", "arn:aws:sts::123:assumed-role/ops/me")

    monkeypatch.setattr(Account, "open", opened)
    first = next(stack_findings(Home(tmp_path), factory.load("aws")))
    assert (first.about, first.level) == ("account", Level.OK)
    assert first.text == "123 in eu-west-2, as arn:aws:sts::123:assumed-role/ops/me"


def test_home_of_a_stack_explains_how_to_connect(tmp_path: Path) -> None:
    """Without this hint, the user would start another grid on this machine."""
    home = Home(tmp_path)
    with pytest.raises(Unreachable) as told, option_values.connect(home):
        pass
    assert told.value.remedy.startswith("Start one with `batchlab grid up`,")
    aws_deployment.write(home, KNOWN)
    with pytest.raises(Unreachable) as told, option_values.connect(home):
        pass
    assert "`batchlab grid up --backend aws`" in told.value.remedy
