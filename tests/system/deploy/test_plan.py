"""`batchlab deploy plan` on MiniStack, which reports every change and leaves no resource behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from batchlab.deploy import settings
from batchlab.deploy.settings import PoolSettings
from batchlab.runtime.home import Home
from tests.support.aws.deploy import REGION, client, rds_bundle, release, stacks
from tests.support.cli import Run


def test_plan_shows_changes_and_cost_and_leaves_nothing(deploy: Run, account: str, home: Home) -> None:
    code, out, err = deploy("plan", "--pool", "default:0-4x2@m7i.large")
    assert (code, err) == (0, "")
    assert f"Stack batchlab in {REGION}, account {account}, as arn:aws:iam::{account}:root." in out
    assert "idle, per hour" in out
    assert "each worker of pool default (m7i.large), per hour" in out
    assert re.search(r"^Add +PoolTasks +SQS::Queue$", out, re.M)
    assert out.index("per hour") < out.index("ACTION")
    assert stacks() == {}
    assert client("s3").list_buckets()["Buckets"] == []
    kept = settings.read(home)
    assert kept is not None
    assert kept.pools == (PoolSettings("default", 0, 4, 2, ("m7i.large",)),)


def test_a_plan_as_json(deploy: Run, account: str) -> None:
    code, out, _ = deploy("plan", "--json", "--pool", "default:1-4x2@m7i.large", "--budget", "50")
    assert code == 0
    plan = json.loads(out)
    assert (plan["action"], plan["account"], plan["stack"]) == ("create", account, "batchlab")
    assert plan["parameters"]["BudgetUsd"] == "50"
    assert {"action", "id", "type", "replacement", "why", "physical"} == set(plan["changes"][0])
    assert plan["cost"]["idle_usd_per_hour"]
    (worker,) = plan["cost"]["workers"]
    assert worker["pool"] == "default"


def test_stored_settings_apply(deploy: Run, home: Home, tmp_path: Path) -> None:
    deploy("plan", "--pool", "default:0-4x2@m7i.large", "--pool", "big:0-1x4", "--set", "LogDays=7")
    code, out, _ = deploy("plan", "--json", "--ledger", "simpledb")
    assert code == 0
    parameters = json.loads(out)["parameters"]
    assert parameters["PoolBigMax"] == "1"
    assert (parameters["LogDays"], parameters["Ledger"]) == ("7", "simpledb")
    # One pool is changed but keeps its instance types.
    deploy("plan", "--pool", "default:0-9x2", "--on-demand-percent", "50")
    kept = settings.read(home)
    assert kept is not None
    assert kept.pools == (PoolSettings("default", 0, 9, 2, ("m7i.large",), (("PoolOnDemandPercent", "50"),)),)
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"stack": "other", "pools": [{"name": "only"}]}))
    _, out, _ = deploy("plan", "--json", "--settings", file)
    plan = json.loads(out)
    assert (plan["stack"], plan["parameters"]["PoolOnlyName"]) == ("other", "only")
    assert "PoolName" not in plan["parameters"]


def test_simpledb_is_not_recommended(deploy: Run) -> None:
    code, out, _ = deploy("plan", "--ledger", "simpledb")
    assert code == 0
    assert "Note: AWS is reported to have closed SimpleDB to new accounts. Use RDS (--ledger postgres)" in out


def test_database_needs_its_certificates_before_anything_is_created(deploy: Run, home: Home, tmp_path: Path) -> None:
    for command in (("plan",), ("apply", "--yes"), ("apply", "--yes", "--release", release(tmp_path))):
        code, out, err = deploy(*command, "--ledger", "postgres")
        assert (code, out) == (2, "")
        assert "certificates of RDS" in err
        assert "--database-ca" in err
    assert stacks() == {}
    assert not settings.path_in(home).exists()
    bundle = rds_bundle(tmp_path)
    code, _, err = deploy("plan", "--ledger", "postgres", "--database-ca", bundle)
    assert (code, err) == (0, "")
    kept = settings.read(home)
    assert kept is not None
    assert kept.database_ca == str(bundle)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ledger", "oracle"), "Ledger cannot be 'oracle'"),
        (("--set", "Colour=red"), "no parameter 'Colour'"),
        (("--set", "LogDays"), "'LogDays' is not NAME=VALUE"),
        (("--pool", "default"), "is not NAME:MIN-MAXxSLOTS"),
        (("--pool", "default:0-1x1@m7i"), "not an instance type"),
        (("--stack", "Nice"), "cannot be called 'Nice'"),
        (("--region", "here"), "'here' is not a region"),
        (
            ("--ledger", "simpledb", "--egress", "nat", "--region", "eu-central-1"),
            "SimpleDB does not exist in eu-central-1",
        ),
        (("--settings", "/nowhere.yaml"), "cannot be read"),
    ],
)
def test_impossible_settings_are_refused(deploy: Run, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = deploy("plan", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert stacks() == {}


def test_oversized_template_uses_a_temporary_bucket(deploy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.deploy.plan.MAX_INLINE_BYTES", 100)
    code, out, err = deploy("plan", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["action"] == "create"
    assert client("s3").list_buckets()["Buckets"] == []
    assert stacks() == {}
