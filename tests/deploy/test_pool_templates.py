"""The expansion of a template with one pool into a template with several pools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.errors import BatchlabError, UsageError
from batchlab.deploy import template
from tests.support.aws.deploy import SMALL

REAL = template.shipped_template()


def named_in(node: Any) -> set[str]:
    """Return all logical ids and parameters in a node, found independently of `expand`."""
    text = json.dumps(node)
    found = set(re.findall(r'\{"Ref": "([^"]+)"\}', text))
    found |= set(re.findall(r'\{"Fn::GetAtt": \["([^"]+)"', text))
    found |= set(re.findall(r'"(?:Condition|DependsOn)": "([^"]+)"', text))
    found |= set(re.findall(r'"Fn::If": \["([^"]+)"', text))
    found |= set(re.findall(r"\$\{([A-Za-z0-9]+)[.}]", text.replace("${!", "")))
    for depends in re.findall(r'"DependsOn": \[([^\]]*)\]', text):
        found |= set(re.findall(r'"([^"]+)"', depends))
    return found


SECTIONS = ("Parameters", "Resources", "Conditions")


@pytest.mark.parametrize("path", [SMALL, REAL], ids=["small", "real"])
def test_template_for_its_own_pool_is_unchanged(path: Path) -> None:
    source = template.load(path)
    made = template.expand(source, ["default"])
    for section in ("Parameters", "Conditions", "Outputs", "Rules", "Mappings"):
        assert made.get(section, {}) == source.get(section, {})
    for name, resource in source["Resources"].items():
        ours = dict(made["Resources"][name])
        theirs = {key: value for key, value in resource.items() if key != "Metadata"}
        if isinstance(theirs.get("DependsOn"), str):
            theirs["DependsOn"] = [theirs["DependsOn"]]
            ours["DependsOn"] = list([ours["DependsOn"]] if isinstance(ours["DependsOn"], str) else ours["DependsOn"])
        assert ours == theirs


@pytest.mark.parametrize("path", [SMALL, REAL], ids=["small", "real"])
@pytest.mark.parametrize("pools", [["default", "gpu-large"], ["gpu-large"], ["a", "b_1", "c", "default"]], ids=str)
def test_every_reference_of_a_pool_follows_it(path: Path, pools: list[str]) -> None:
    source = template.load(path)
    per_pool = {
        name
        for name, one in source["Resources"].items()
        if one.get("Metadata", {}).get("batchlab", {}).get("per") == "pool"
    }
    assert len(per_pool) >= 5
    made = template.expand(source, pools)
    follows = per_pool | {
        name for section in ("Parameters", "Conditions") for name in source[section] if name.startswith("Pool")
    }
    # The difference contains the variables that belong to an Fn::Sub itself.
    variables = {n for n in named_in(source) if n.startswith("Pool")} - follows
    for pool in pools:
        for name in per_pool:
            there = {n for n in named_in(source["Resources"][name]) if n in follows}
            assert there, f"{name} would be the same for every pool"
            here = named_in(made["Resources"][template.name_for_pool(name, pool)])
            assert {template.name_for_pool(n, pool) for n in there} <= here
            assert (
                not {n for n in here if n.startswith("Pool")}
                - variables
                - {template.name_for_pool(n, pool) for n in there}
            )
    known = {name for section in SECTIONS for name in made.get(section, {})}
    for section in ("Resources", "Outputs", "Conditions", "Rules"):
        for name, one in made.get(section, {}).items():
            unknown = {n for n in named_in(one) if n.startswith("Pool")} - known - variables
            assert not unknown, (section, name, unknown)


def test_shared_resources_name_every_pool() -> None:
    made = template.expand(template.load(SMALL), ["default", "big"])
    reads = made["Resources"]["Reads"]
    assert reads["DependsOn"] == ["PoolTasks", "PoolBigTasks"]
    assert reads["Properties"]["Queues"] == [{"Ref": "Events"}, {"Ref": "PoolTasks"}, {"Ref": "PoolBigTasks"}]
    (statement,) = reads["Properties"]["PolicyDocument"]["Statement"]
    assert [one["Fn::GetAtt"][0] for one in statement["Resource"]] == ["Events", "PoolTasks", "PoolBigTasks"]
    groups = made["Outputs"]["PoolGroups"]["Value"]
    assert groups == {"Fn::Join": [",", [{"Ref": "PoolGroup"}, {"Ref": "PoolBigGroup"}]]}


def test_a_pools_name_is_the_default_of_its_parameter() -> None:
    made = template.expand(template.load(SMALL), ["default", "gpu-large"])
    assert made["Parameters"]["PoolName"]["Default"] == "default"
    assert made["Parameters"]["PoolGpuLargeName"]["Default"] == "gpu-large"
    assert made["Parameters"]["PoolGpuLargeMax"] == made["Parameters"]["PoolMax"]
    assert list(made["Parameters"]).count("Ledger") == 1


def test_the_order_of_pools_and_other_pools_change_no_pools_ids() -> None:
    source = template.load(SMALL)
    alone = template.expand(source, ["big"])["Resources"]
    for pools in (["big", "default"], ["default", "big"], ["a", "big", "c"]):
        made = template.expand(source, pools)["Resources"]
        for name in alone:
            if name.startswith("PoolBig"):
                assert made[name] == alone[name]


def test_logical_ids_of_an_existing_stack_do_not_change() -> None:
    source = template.load(SMALL)
    made = template.expand(source, ["gpu", "default"], base="gpu")
    assert made["Parameters"]["PoolName"]["Default"] == "gpu"
    assert made["Parameters"]["PoolDefaultName"]["Default"] == "default"


def test_sub_keeps_literals_and_local_variables() -> None:
    made = template.expand(template.load(SMALL), ["big"])
    data = made["Resources"]["PoolBigTemplate"]["Properties"]["LaunchTemplateData"]
    text, own = data["UserData"]["Fn::Base64"]["Fn::Sub"]
    assert "${Release} ${PoolBigName} ${Queue}" in text
    assert own == {"Queue": {"Fn::GetAtt": ["PoolBigTasks", "QueueName"]}}
    manager = made["Resources"]["ManagerTemplate"]["Properties"]["LaunchTemplateData"]
    assert "${!HOME} ${Release}" in manager["UserData"]["Fn::Base64"]["Fn::Sub"]


def test_the_consoles_groups_and_labels_have_every_pool() -> None:
    made = template.expand(template.load(SMALL), ["default", "big"])
    interface = made["Metadata"]["AWS::CloudFormation::Interface"]
    assert interface["ParameterGroups"][0]["Parameters"] == [
        "PoolName",
        "PoolBigName",
        "PoolMin",
        "PoolBigMin",
        "PoolMax",
        "PoolBigMax",
    ]
    assert interface["ParameterGroups"][1]["Parameters"] == ["Ledger"]
    assert set(interface["ParameterLabels"]) == {"PoolName", "PoolBigName"}
    assert "Note" not in made["Metadata"]


def test_notes_for_other_tools_are_not_sent() -> None:
    made = template.expand(template.load(REAL), ["default"])
    for resource in made["Resources"].values():
        assert all(key.startswith("AWS::") for key in resource.get("Metadata", {}))


@pytest.mark.slow
@pytest.mark.parametrize("path", [SMALL, REAL], ids=["small", "real"])
def test_a_template_with_two_pools_is_one_that_cfn_lint_takes(path: Path) -> None:
    # cfn-lint imports SymPy, which would slow down the collection of tests in each process.
    from cfnlint.api import lint
    from cfnlint.config import ManualArgs

    source = template.load(path)
    made = template.expand(source, ["default", "gpu-large"])
    # The file explains these exceptions next to the resource, so they are skipped here.
    excused = {
        check
        for one in source["Resources"].values()
        for check in one.get("Metadata", {}).get("cfn-lint", {}).get("config", {}).get("ignore_checks", ())
    }
    wanted = ManualArgs(regions=["us-east-1"], ignore_checks=["I", *excused])
    before = {one.rule.id for one in lint(path.read_text(), config=wanted)}
    assert not {one for one in before if one.startswith("E")}
    found = lint(template.body(made), config=wanted)
    assert [str(one) for one in found if one.rule.id not in before] == []


# --- Refused templates ---------------------------------------------------------------------------


@pytest.mark.parametrize("pools", [["a-b", "a_b"], ["gpu", "gpu-"]], ids=str)
def test_pools_that_would_have_the_same_ids_are_refused(pools: list[str]) -> None:
    with pytest.raises(UsageError, match="two things would be called Pool"):
        template.expand(template.load(SMALL), pools)


def test_pool_with_a_reserved_logical_id_is_refused() -> None:
    source = template.load(SMALL)
    source["Resources"]["PoolBigTasks"] = source["Resources"]["PoolTasks"]
    with pytest.raises(UsageError, match="PoolBigTasks"):
        template.expand(source, ["default", "big"])


def test_stack_without_pools_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a pool"):
        template.expand(template.load(SMALL), [])


def test_a_shared_part_that_can_have_one_pool_only_is_a_flaw() -> None:
    source = template.load(SMALL)
    source["Resources"]["Events"]["Properties"]["QueueName"] = {"Ref": "PoolTasks"}
    with pytest.raises(BatchlabError, match="Resources Events mentions a pool's part"):
        template.expand(source, ["default", "big"])


def test_a_pools_part_must_be_called_so() -> None:
    source = template.load(SMALL)
    source["Resources"]["Tasks"] = source["Resources"]["PoolTasks"]
    with pytest.raises(BatchlabError, match="Tasks is one per pool"):
        template.expand(source, ["default"])


def test_template_above_cloudformations_limits_is_refused_locally() -> None:
    made = template.expand(template.load(REAL), [f"p{n}" for n in range(40)])
    with pytest.raises(UsageError, match="CloudFormation takes"):
        template.body(made)


# --- Text ----------------------------------------------------------------------------------------


def test_short_forms_dates_and_json_are_read_as_aws_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "Resources:\n"
        "  A: {Type: T, Properties: {V: 2012-10-17, G: !GetAtt B.C.D, S: !Sub '${A}',\n"
        "      L: !Join [',', [!Ref A]], C: !Condition X, B: !Base64 {'Fn::Sub': x}}}\n"
    )
    assert template.load(file)["Resources"]["A"]["Properties"] == {
        "V": "2012-10-17",
        "G": {"Fn::GetAtt": ["B", "C.D"]},
        "S": {"Fn::Sub": "${A}"},
        "L": {"Fn::Join": [",", [{"Ref": "A"}]]},
        "C": {"Condition": "X"},
        "B": {"Fn::Base64": {"Fn::Sub": "x"}},
    }
    text = template.body(template.load(SMALL))
    assert template.parse(text, "it") == template.load(SMALL)
    assert "\n" not in text


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "Resources: 3\n", "Parameters: {}\n"])
def test_invalid_template_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(str(file))):
        template.load(file)


def test_with_ten_pools_the_real_template_is_far_from_too_large() -> None:
    """With its user data, the template is too large for a request. The template is uploaded to a bucket, which `deploy`
    creates before a new stack."""
    made = template.expand(template.load(REAL), ["default", *(f"pool-{i}" for i in range(9))])
    assert len(template.body(made).encode()) <= template.MAX_STORED_BYTES * 0.3
