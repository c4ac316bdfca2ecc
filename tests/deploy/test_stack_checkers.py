"""The stack template, checked by the external checkers checkov and cfn-guard.

Every exception is in the template next to its resource, with a reason. An exception that is not needed any more fails
too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.aws import cfn
from tests.support.aws.stack_shapes import SHAPES

pytestmark = pytest.mark.slow

CHECKOV = "BATCHLAB_CHECKOV"
"""Environment variable with the path of checkov."""
CFN_GUARD = "BATCHLAB_CFN_GUARD"
"""Environment variable with the folder of the unpacked npm package @cdklabs/cdk-validator-cfnguard, which contains
cfn-guard and AWS Control Tower's rules."""


def _promised(variable: str) -> Path:
    if path := os.environ.get(variable):
        return Path(path)
    if os.environ.get("CI"):
        pytest.fail(f"CI promises a checker, but {variable} is not set")
    pytest.skip(f"{variable} is not set")


@pytest.fixture(scope="module")
def checkov() -> Path:
    return _promised(CHECKOV)


@pytest.fixture(scope="module")
def guard() -> Path:
    return _promised(CFN_GUARD)


def skipped(checker: str) -> set[tuple[str, str]]:
    """Return (check, resource) of each exception in the template, and check that each has a reason."""
    found = set()
    for name, resource in cfn.load()["Resources"].items():
        for one in resource.get("Metadata", {}).get(checker, {}).get("skip", []):
            assert len(one["comment"]) > 10, (name, one)
            found.add((one["id"], name))
    return found


def printed(folder: Path) -> Path:
    """Return a file with the output of `batchlab deploy template`."""
    command = [sys.executable, "-m", "batchlab", "deploy", "template", "--home", folder / "home"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=True)
    file = folder / "stack.json"
    file.write_text(done.stdout)
    return file


def test_checkov_finds_nothing_but_what_the_template_explains(checkov: Path, tmp_path: Path) -> None:
    """The template is checked as a file and as the output of `deploy template`, in one run of checkov."""
    files = [cfn.stack_file(), printed(tmp_path)]
    # Without the flag, checkov downloads descriptions of the checks from its vendor.
    command = [checkov, "-f", *files, "--framework", "cloudformation", "-o", "json", "--skip-download"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    results = report["results"]
    assert report["summary"]["parsing_errors"] == 0
    assert [(result["check_id"], result["resource"]) for result in results["failed_checks"]] == []
    for file in files:
        passed, ignored = (
            [one for one in results[kind] if Path(one["file_abs_path"]).samefile(file)]
            for kind in ("passed_checks", "skipped_checks")
        )
        assert len(passed) > 25, "it has looked at little"
        used = {(one["check_id"], one["resource"].split(".")[1]) for one in ignored}
        assert used == skipped("checkov"), "an exception that nothing needs"


Broken = set[tuple[str, str]]
"""Pairs (rule, resource) of violations."""


def _judged(guard: Path, rules: Path, folder: Path) -> dict[str, tuple[int, Broken]]:
    """Return the number of satisfied rules and the violations, for each template in the folder."""
    program = guard / "bin" / "ubuntu" / os.uname().machine / "cfn-guard"
    done = subprocess.run(
        [program, "validate", "--data", folder, "--rules", rules, "-S", "none", "--structured", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 19), done.stderr
    return {
        Path(report["name"]).stem: (len(report["compliant"]), _broken(report)) for report in json.loads(done.stdout)
    }


def _broken(report: dict[str, Any]) -> Broken:
    broken: Broken = set()
    for found in report["not_compliant"]:
        text = json.dumps(found["Rule"])
        ids = re.findall(r"\[(CT\.[A-Z0-9.]+)\]", text) or [found["Rule"]["name"]]
        broken |= {(ids[0], name) for name in re.findall(r"/Resources/(\w+)", text)}
    return broken


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the template in each shape to a folder, because the rules do not support Fn::If."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, shape in SHAPES.items():
        rendered = cfn.Rendered(cfn.load(), open_ends=True, **shape)
        (folder / f"{name}.json").write_text(json.dumps(rendered.template()))
    return folder


def test_control_tower_finds_just_what_the_template_explains(guard: Path, templates: Path) -> None:
    judged = _judged(guard, guard / "rules" / "control-tower" / "cfn-guard", templates)
    assert judged.keys() == SHAPES.keys()
    assert min(holds for holds, _ in judged.values()) >= 15, "they have looked at little"
    needed = {one for _, broken in judged.values() for one in broken}
    assert needed == skipped("cfn-guard")


def test_our_own_rules_hold(guard: Path, templates: Path) -> None:
    rules = cfn.stack_file().with_name("rules.guard")
    count = rules.read_text().count("\nrule ")
    for shape, (holds, broken) in _judged(guard, rules, templates).items():
        assert broken == set(), shape
        # One of the rule's results is for the database.
        assert holds >= count - 1, "they have looked at little"


@pytest.mark.parametrize(
    ("rule", "resource", "path", "value"),
    [
        (
            "credentials_only_by_token",
            "PoolTemplate",
            "Properties.LaunchTemplateData.MetadataOptions.HttpTokens",
            "optional",
        ),
        (
            "disks_are_encrypted",
            "ManagerTemplate",
            "Properties.LaunchTemplateData.BlockDeviceMappings.0.Ebs.Encrypted",
            False,
        ),
        ("logs_expire_and_go_with_the_stack", "LogGroup", "DeletionPolicy", "Retain"),
    ],
)
def test_our_own_rules_can_fail(
    guard: Path, tmp_path: Path, rule: str, resource: str, path: str, value: object
) -> None:
    made = cfn.Rendered(cfn.load(), open_ends=True).template()
    at: Any = made["Resources"][resource]
    *way, last = path.split(".")
    for step in way:
        at = at[int(step) if step.isdigit() else step]
    at[last] = value
    (tmp_path / "spoilt.json").write_text(json.dumps(made))
    rules = cfn.stack_file().with_name("rules.guard")
    assert _judged(guard, rules, tmp_path)["spoilt"][1] == {(rule, resource)}
