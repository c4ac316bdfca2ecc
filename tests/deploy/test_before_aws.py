"""The steps of `batchlab deploy` before its first AWS call: the template, its cost, and refused settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from batchlab.deploy import settings
from batchlab.deploy.settings import PoolSettings, Settings
from batchlab.runtime.home import Home
from tests.support.aws import cfn
from tests.support.cli import Run, runner


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a command line without AWS configuration, in which AWS calls fail."""

    def asked(region: str | None = None, **_: object) -> None:
        raise AssertionError(f"AWS is asked, in {region}")

    monkeypatch.setattr("batchlab.deploy.account.Account.open", asked)
    return runner(monkeypatch, capsys)


def test_template_is_printed_with_its_settings_and_cost(nobody: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, out, err = nobody(
        "deploy",
        "template",
        "--home",
        home,
        "--egress",
        "nat",
        "--set",
        "BudgetUsd=150",
        "--pool",
        "default:0-4x2@m7i.large",
        "--pool",
        "big:1-2x8@m7i.4xlarge",
    )
    assert code == 0, err
    made = json.loads(out)
    said = {name: one.get("Default") for name, one in made["Parameters"].items()}
    assert (said["Egress"], said["BudgetUsd"], said["Ledger"]) == ("nat", "150", "sqlite")
    assert (said["PoolMax"], said["PoolBigMin"], said["PoolBigName"]) == ("4", "1", "big")
    assert {"PoolTasks", "PoolBigTasks", "ManagerRole", "NatGateway"} <= made["Resources"].keys()
    assert made["Resources"]["ManagerRole"]["Properties"]["Policies"]
    assert re.search(r"^NAT gateways +0\.05 USD$", err, re.M)
    assert "list prices of us-east-1 in USD, as of 2026-07-20" in err
    assert not home.exists(), "nothing is kept"


def test_printed_template_explains_its_exceptions_to_scanners(nobody: Run, tmp_path: Path) -> None:
    pools = ("--pool", "default:0-4x2@m7i.large", "--pool", "big:1-2x8@m7i.4xlarge")
    _, out, _ = nobody("deploy", "template", "--home", tmp_path, *pools)
    made = json.loads(out)["Resources"]
    source = cfn.load()["Resources"]
    for name in ("Bucket", "PoolTasks", "PoolBigTasks", "TokenSecret"):
        explained = source[name.replace("Big", "")]["Metadata"]
        assert made[name]["Metadata"] == {tool: notes for tool, notes in explained.items() if tool != "batchlab"}
        assert made[name]["Metadata"]["checkov"]["skip"][0]["comment"]
    assert "Metadata" not in made["PoolRole"]
    assert "batchlab" not in [tool for one in made.values() for tool in one.get("Metadata", {})]


def test_printed_template_has_a_domain_only_for_its_ledger(nobody: Run, tmp_path: Path) -> None:
    _, out, _ = nobody("deploy", "template", "--home", tmp_path)
    assert "AWS::SDB::Domain" not in out
    _, out, _ = nobody("deploy", "template", "--home", tmp_path, "--ledger", "simpledb", "--egress", "nat")
    assert json.loads(out)["Resources"]["LedgerDomain"]["Type"] == "AWS::SDB::Domain"


def test_ledger_that_the_region_lacks_is_refused(nobody: Run, tmp_path: Path) -> None:
    simpledb = ("deploy", "template", "--home", tmp_path, "--ledger", "simpledb", "--egress", "nat")
    code, out, err = nobody(*simpledb, "--region", "eu-central-1")
    assert (code, out) == (2, "")
    assert err.startswith("Error: SimpleDB does not exist in eu-central-1.\n")
    assert nobody(*simpledb, "--region", "eu-west-1")[0] == 0


def test_stored_settings_of_a_stack_apply(nobody: Run, tmp_path: Path) -> None:
    home = Home(tmp_path)
    pools = (PoolSettings("gpu", max_size=3, types=("m7i.large",)),)
    settings.write(home, Settings("grid", "eu-south-2", pools, (("LogDays", "7"),)))
    code, out, err = nobody("deploy", "template", "--home", tmp_path)
    assert code == 0, err
    said = json.loads(out)["Parameters"]
    assert (said["LogDays"]["Default"], said["PoolGpuMax"]["Default"]) == ("7", "3")
    assert "at prices of us-east-1, not of eu-south-2." in err
    _, out, _ = nobody("deploy", "template", "--home", tmp_path, "--stack", "other")
    assert json.loads(out)["Parameters"]["LogDays"]["Default"] == 30


def test_impossible_settings_are_refused_without_credentials(nobody: Run, tmp_path: Path) -> None:
    wrong = ("--pool", "default:0-4x2@c8g.large")
    code, out, err = nobody("deploy", "template", "--home", tmp_path, *wrong)
    assert (code, out) == (2, "")
    assert "--set ManagerInstanceType=t4g.small" in err


def test_unknown_instance_type_is_reported_before_the_template(nobody: Run, tmp_path: Path) -> None:
    """AWS may have types that the price book lacks."""
    code, out, err = nobody("deploy", "template", "--home", tmp_path, "--pool", "default:0-10x2@m7x.large")
    assert code == 0
    assert json.loads(out)["Parameters"]["PoolInstanceTypes"]["Default"] == "m7x.large"
    (line,) = err.splitlines()
    assert "no instance type 'm7x.large'. Did you mean m7" in line


@pytest.mark.parametrize("command", ["plan", "template", "apply"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--set", "Colour=red"), "The stack has no parameter 'Colour'."),
        (("--ledger", "paper"), "Ledger cannot be 'paper'."),
        (("--pool", "default:0-4x2@large"), "'large' is not an instance type."),
        (("--pool", "default:0-4x2@m7i.larg"), "'m7i.larg' is not an instance type.\n  Did you mean m7i.large?"),
        (("--set", "ManagerInstanceType=t3.smal"), "'t3.smal' is not an instance type.\n  Did you mean t3.small?"),
        (("--stack", "Grid"), "The stack cannot be called 'Grid'."),
        (("--set", "AlarmEmail=nobody"), "AlarmEmail cannot be 'nobody'."),
    ],
)
def test_local_mistakes_are_refused_before_a_call_to_aws(
    nobody: Run, tmp_path: Path, command: str, wrong: tuple[str, str], said: str
) -> None:
    code, out, err = nobody("deploy", command, "--home", tmp_path, *wrong)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {said}\n")


def test_problems_that_the_stack_may_solve_are_left_to_aws(nobody: Run, tmp_path: Path) -> None:
    """In a fresh folder, the images of the stack are not known yet."""
    graviton = ("deploy", "plan", "--home", tmp_path, "--pool", "default:0-4x2@c8g.large")
    _, _, err = nobody(*graviton)
    assert "AWS is asked" in err
    settings.write(Home(tmp_path), Settings())
    code, _, err = nobody(*graviton)
    assert code == 2
    assert "--set ManagerInstanceType=t4g.small" in err


def test_leftovers_are_searched_for_a_known_stack(nobody: Run, tmp_path: Path) -> None:
    settings.write(Home(tmp_path), Settings("grid", "eu-south-2"))
    _, _, err = nobody("gc", "--aws", "--home", tmp_path)
    assert "AWS is asked, in eu-south-2" in err
    _, _, err = nobody("gc", "--aws", "--home", tmp_path, "--region", "eu-west-1")
    assert "AWS is asked, in eu-west-1" in err
    code, _, err = nobody("gc", "--yes")
    assert code == 2
    assert "Add --aws" in err
