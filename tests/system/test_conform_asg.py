"""`batchlab conform --service autoscaling` on batchlab's own endpoint with processes, and on moto.

The findings match docs/contributing/asg-endpoint.md, and no resource is left behind. A proxy that breaks one rule is
noticed, and a run through an unchanged proxy shows no finding.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws import endpoint as aws
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.clock import WallClock
from batchlab.conform.check import CheckVerdict, Severity
from batchlab.conform.check_table import ASG_CHECKS
from batchlab.conform.run import run as run_checks
from batchlab.conform.target import Cleaner, Target
from tests.support import ROOT
from tests.support.cli import Run, runner
from tests.support.conform.proxy import Request, Response, Sabotage, Send, proxy
from tests.support.conform.sabotages_asg import ASG_SABOTAGES
from tests.support.waiting import until

PAGE = ROOT / "docs" / "contributing" / "asg-endpoint.md"

AT_ONCE = 4
EVERY = {check.name for check in ASG_CHECKS}

TEMPLATE = "sleeper"
TEMPLATES = f"""\
[{TEMPLATE}]
[[{TEMPLATE}.version]]
type = "m7i.large"
command = ["sleep", "1000"]
"""

MOTO_DIFFERS_IN_NEEDED = {
    "autoscaling-create-taken",
    "autoscaling-activities",
    "autoscaling-launch-hook",
    "autoscaling-drain-hook",
    "autoscaling-hook-gone",
    "autoscaling-unhealthy",
    "autoscaling-port",
}
"""moto replaces a group of the same name, stores no activities, ignores hooks, and does not replace an unhealthy
instance."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Run `batchlab asg serve`, whose instances are sleeping processes."""
    folder = tmp_path_factory.mktemp("asg")
    (folder / "templates.toml").write_text(TEMPLATES)
    argv = [sys.executable, "-m", "batchlab", "asg", "serve", "--state", str(folder / "state")]
    with subprocess.Popen(
        [*argv, "--templates", str(folder / "templates.toml")], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield Endpoint(process.stdout.readline().strip())
        finally:
            # The instances of the endpoint end with the endpoint.
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a runner of command lines in this process, with keys that every emulator accepts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return runner(monkeypatch, capsys)


def _groups(endpoint: Endpoint) -> list[str]:
    """Return the existing groups of conformance runs."""
    asg = aws.client(endpoint, "autoscaling", connections=1)
    found = asg.describe_auto_scaling_groups(MaxRecords=100)["AutoScalingGroups"]
    names = [one["AutoScalingGroupName"] for one in found]
    return [name for name in names if name.startswith("batchlab-conform-")]


def _tried(run: Run, endpoint: Endpoint, name: str, page: Path, *more: str) -> dict[str, Any]:
    """Run the command, which rewrites the page, and return its JSON output."""
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    code, out, err = run(
        "conform",
        "--service",
        "autoscaling",
        "--endpoint",
        endpoint.url,
        "--json",
        "--name",
        name,
        "--markdown",
        page,
        *more,
    )
    assert "Left behind" not in err
    told: dict[str, Any] = json.loads(out)
    differing = [one["check"] for one in told["checks"] if one["verdict"] != "agrees"]
    assert code == (1 if differing else 0)
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), differing
    until(lambda: not _groups(endpoint), 30.0)  # a group is listed until its instances have ended
    return told


def test_own_endpoint_follows_every_rule(ours: Endpoint, run: Run, tmp_path: Path) -> None:
    told = _tried(run, ours, "batchlab asg serve", tmp_path / "page.md", "--template", TEMPLATE)
    assert told["agrees"], told["counts"]
    assert {one["service"] for one in told["checks"]} == {"autoscaling"}


def test_page_matches_moto(moto: Endpoint, run: Run, tmp_path: Path) -> None:
    """The page is compared word by word, so a rule that moto now follows fails the test too."""
    told = _tried(run, moto, f"moto {version('moto')}", tmp_path / "page.md")
    needed = [one for one in told["checks"] if one["severity"] == "needed"]
    differing = {one["check"] for one in needed if one["verdict"] != "agrees"}
    assert differing == MOTO_DIFFERS_IN_NEEDED
    ec2 = aws.client(moto, "ec2", connections=1)
    templates = ec2.describe_launch_templates()["LaunchTemplates"]
    assert not [template for template in templates if "conform" in template["LaunchTemplateName"]]


def test_missing_template_is_requested(ours: Endpoint, run: Run) -> None:
    code, out, err = run("conform", "--service", "autoscaling", "--endpoint", ours.url)
    assert (code, out) == (2, "")
    assert "A launch template cannot be created" in err
    assert "--template NAME" in err


def test_endpoint_without_auto_scaling_is_reported_in_one_line(run: Run) -> None:
    def not_there(_: Request, __: Send) -> Response:
        """Return LocalStack's answer for an unsupported service."""
        code = b"<ErrorResponse><Error><Code>InternalFailure</Code></Error></ErrorResponse>"
        return Response(501, code, {"Content-Type": "text/xml"})

    with proxy("http://127.0.0.1:9", not_there) as address:
        code, out, err = run("conform", "--service", "autoscaling", "--endpoint", address)
    assert (code, out) == (3, "")
    assert err == (
        f"Error: Auto Scaling is missing at {address}: DescribeAutoScalingGroups returns 501 InternalFailure.\n"
    )


def test_undeletable_resources_are_named(ours: Endpoint, run: Run) -> None:
    def keeps_groups(request: Request, send: Send) -> Response:
        if b"Action=DeleteAutoScalingGroup" in request.body:
            code = b"<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>"
            return Response(403, code, {"Content-Type": "text/xml"})
        return send(request)

    assert ours.url is not None
    with proxy(ours.url, keeps_groups) as address:
        code, _, err = run(
            "conform",
            "--service",
            "autoscaling",
            "--endpoint",
            address,
            "--template",
            TEMPLATE,
            "--only",
            "autoscaling-create",
        )
    (left,) = _groups(ours)
    asg = aws.client(ours, "autoscaling", connections=1)
    asg.delete_auto_scaling_group(AutoScalingGroupName=left, ForceDelete=True)
    assert code == 0
    reason = "DeleteAutoScalingGroup returns AccessDenied"
    assert err == f"Left behind: Auto Scaling group {left}: {reason}\n"


# --- The checks can fail --------------------------------------------------------------------------


def _nothing_is_spoiled(request: Request, send: Send) -> Response:
    return send(request)


def _unexpected(
    endpoint: Endpoint, number: int, sabotage: Sabotage, names: Set[str], expected: CheckVerdict
) -> dict[str, str]:
    """Return the unexpected results by the names of the checks."""
    assert endpoint.url is not None
    checks = [check for check in ASG_CHECKS if check.name in names]
    with proxy(endpoint.url, sabotage) as address:
        target = Target(Endpoint(address), run=f"sabotage-{number}", clock=WallClock(), template=TEMPLATE)
        # The checks wait in vain for some changes, so the waits are short.
        target.appears_s = 5.0 if expected is CheckVerdict.DIFFERS else 20.0
        try:
            target.open({"autoscaling"})
            results = run_checks(target, checks, limit_s=120.0)
        finally:
            target.close()
            # The sabotage prevented the removal of these groups.
            left = Cleaner(endpoint).groups(sorted(target._groups))
    assert left == []
    return {
        result.check.name: f"{result.verdict.value} {result.observed}"
        for result in results
        if result.verdict is not expected
    }


def test_every_check_that_is_needed_is_spoiled() -> None:
    spoiled = set().union(*(names for _, names in ASG_SABOTAGES.values()))
    needed = {check.name for check in ASG_CHECKS if check.severity is Severity.NEEDED}
    assert needed - spoiled == set()
    assert spoiled - EVERY == set()


def test_sabotage_is_detected_by_the_right_check(ours: Endpoint) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        spoiled = {
            what: threads.submit(_unexpected, ours, number, spoil, names, CheckVerdict.DIFFERS)
            for number, (what, (spoil, names)) in enumerate(ASG_SABOTAGES.items(), 1)
        }
        unspoiled = threads.submit(_unexpected, ours, 0, _nothing_is_spoiled, EVERY, CheckVerdict.AGREES)
    assert unspoiled.result() == {}
    assert {what: told for what, one in spoiled.items() if (told := one.result())} == {}
