"""A template rendered by its conditions, compared with a second implementation of the conditions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.errors import BatchlabError
from batchlab.deploy import template
from batchlab.deploy.settings import text_of
from batchlab.deploy.template import render
from tests.support.aws import cfn

SHAPES: list[dict[str, str]] = [
    {},
    {"Release": "0" * 64, "PoolInstanceTypes": "m7i.large,m6i.large,m5.large", "AlarmEmail": "a@b"},
    {"Ledger": "postgres", "Egress": "nat", "BudgetUsd": "50"},
    {"Ledger": "simpledb", "VpcId": "vpc-1", "SubnetIds": "subnet-1,subnet-2"},
    {"Ledger": "postgres", "PoolPeakMin": "3", "Versioning": "on"},
]


def values(made: template.Template, given: dict[str, str]) -> dict[str, str]:
    declared = made["Parameters"]
    usual = {name: text_of(form.get("Default")) for name, form in declared.items()}
    assert given.keys() <= usual.keys()
    return {"AWS::Region": "us-east-1", **usual, **given}


@pytest.mark.parametrize("given", SHAPES, ids=str)
def test_rendered_resources_match_the_template(given: dict[str, str]) -> None:
    source = template.expand(template.load(template.shipped_template()), ["default"])
    made = render(source, values(source, given))
    judge = cfn.Rendered(cfn.load(), **given)
    assert made["Resources"].keys() == judge.resources.keys()
    assert made["Outputs"].keys() == judge.outputs.keys()
    left = json.dumps(made["Resources"]) + json.dumps(made["Outputs"])
    assert "Fn::If" not in left
    assert "Conditions" not in made
    for name in source["Resources"].keys() - made["Resources"].keys():
        assert f'{{"Ref": "{name}"}}' not in left
        assert f'"Fn::GetAtt": ["{name}"' not in left
    # The resources' properties with the parameters inserted are the same too.
    again = cfn.Rendered({**made, "Conditions": {}}, **given)
    for name, one in judge.resources.items():
        assert again.resources[name]["Properties"] == one["Properties"], name


def test_with_more_pools_it_is_as_good() -> None:
    source = template.expand(template.load(template.shipped_template()), ["default", "big"])
    made = render(source, values(source, {"PoolBigInstanceTypes": "m7i.large,m6i.large"}))
    assert {"PoolTasks", "PoolBigTasks"} <= made["Resources"].keys()
    overrides = json.dumps(made["Resources"]["PoolBigGroup"]).count('InstanceType"')
    assert overrides >= 2


@pytest.mark.parametrize("given", [shape for shape in SHAPES if shape.get("Ledger") != "simpledb"], ids=str)
def test_template_without_simpledb_creates_the_same_resources(given: dict[str, str]) -> None:
    source = template.expand(template.load(template.shipped_template()), ["default"])
    made = template.without_simpledb(source)
    assert "SDB" in json.dumps(source)
    for word in ("SDB", "UsesSimpleDb", "LedgerDomain", "sdb:"):
        assert word not in json.dumps(made)
    assert made["Parameters"]["Ledger"]["AllowedValues"] == ["sqlite", "postgres"]
    assert made["Conditions"].keys() == source["Conditions"].keys() - {"UsesSimpleDb"}
    assert render(made, values(made, given)) == {
        **render(source, values(source, given)),
        "Parameters": made["Parameters"],
    }


def test_template_of_another_grid_is_unchanged() -> None:
    source = {"Resources": {"A": {"Type": "T"}}}
    assert template.without_simpledb(source) == source


@pytest.mark.slow
def test_cfn_lint_finds_nothing_in_the_template_without_simpledb(tmp_path: Path) -> None:
    source = template.expand(template.load(template.shipped_template()), ["default", "big"], for_scanners=True)
    file = tmp_path / "stack.json"
    file.write_text(template.body(template.without_simpledb(source)))
    command = [str(Path(sys.executable).with_name("cfn-lint")), "-t", str(file), "-r", "eu-central-1"]
    command += ["-i", "W2506"]  # as in .cfnlintrc.yaml
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def small(conditions: dict[str, Any]) -> template.Template:
    return {
        "Parameters": {"A": {"Type": "String"}},
        "Conditions": conditions,
        "Resources": {
            "Yes": {"Type": "T", "DependsOn": "No", "Properties": {"X": {"Fn::If": ["C", 1, 2]}}},
            "No": {"Type": "T", "Condition": "C"},
            "Both": {"Type": "T", "DependsOn": ["No", "Yes"]},
        },
    }


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ({"Fn::Equals": [{"Ref": "A"}, "x"]}, "x", True),
        ({"Fn::Equals": [{"Ref": "A"}, "x"]}, "y", False),
        ({"Fn::Equals": [{"Ref": "A"}, 1]}, "1", True),
        ({"Fn::Equals": [{"Ref": "A"}, True]}, "true", True),
        ({"Fn::Not": [{"Fn::Equals": [{"Fn::Sub": "${A}-b"}, "a-b"]}]}, "a", False),
        ({"Fn::And": [{"Condition": "D"}, {"Fn::Equals": [{"Ref": "A"}, "d"]}]}, "d", True),
        ({"Fn::Or": [{"Condition": "D"}, {"Fn::Equals": [{"Ref": "A"}, "e"]}]}, "e", True),
        ({"Fn::Equals": [{"Fn::Select": ["1", {"Fn::Split": [",", {"Ref": "A"}]}]}, "q"]}, "p,q", True),
        ({"Fn::Equals": [{"Fn::Join": ["-", ["a", {"Ref": "A"}]]}, "a-b"]}, "b", True),
    ],
    ids=str,
)
def test_conditions(condition: dict[str, Any], value: str, holds: bool) -> None:
    conditions = {"C": condition, "D": {"Fn::Equals": [{"Ref": "A"}, "d"]}}
    made = render(small(conditions), {"A": value})["Resources"]
    assert ("No" in made) is holds
    assert made["Yes"]["Properties"]["X"] == (1 if holds else 2)
    assert made["Yes"].get("DependsOn") == (["No"] if holds else None)
    assert made["Both"]["DependsOn"] == (["No", "Yes"] if holds else ["Yes"])


@pytest.mark.parametrize(
    "condition",
    [
        {"Fn::Equals": [{"Ref": "Nobody"}, "x"]},
        {"Fn::Equals": [{"Fn::ImportValue": "x"}, "x"]},
        {"Fn::Contains": ["a", "b"]},
    ],
    ids=str,
)
def test_unknown_values_are_flaws(condition: dict[str, Any]) -> None:
    with pytest.raises(BatchlabError, match="template is flawed"):
        render(small({"C": condition}), {"A": "x"})
