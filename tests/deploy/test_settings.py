"""The settings of a stack, from files and from a stack, and checked against the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchlab.cli.option_values import parse_typed_pool
from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.protocol import object_keys
from batchlab.deploy import settings, template
from batchlab.deploy.release import Target
from batchlab.deploy.settings import PoolSettings, Settings
from batchlab.deploy.template import expand
from batchlab.runtime.home import Home
from tests.support.aws.deploy import SMALL

FULL = Settings(
    "grid",
    "eu-west-1",
    (
        PoolSettings("default", 0, 10, 2, ("m7i.large", "m6i.large")),
        PoolSettings("big", 1, 3, 4, ("m7i.2xlarge",), (("PoolOnDemandBase", "1"),)),
    ),
    (("Ledger", "postgres"), ("LogDays", "7")),
    ("duckdb>=1.1,<3",),
    "/etc/rds.pem",
)


def source() -> template.Template:
    return template.load(SMALL)


def test_home_stores_settings_unchanged(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert settings.read(home) is None
    settings.write(home, FULL)
    assert settings.read(home) == FULL


def test_a_persons_yaml_is_read(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "stack: grid\nregion: eu-west-1\n"
        "pools:\n  - {name: gpu, max_size: 4, types: [g5.xlarge]}\n"
        "parameters: {LogDays: 7, Versioning: true, SubnetIds: [subnet-1, subnet-2]}\n"
        "environment: {BATCHLAB_LOG_FORMAT: json}\n"
    )
    assert settings.load(file) == Settings(
        "grid",
        "eu-west-1",
        (PoolSettings("gpu", max_size=4, types=("g5.xlarge",)),),
        (("LogDays", "7"), ("SubnetIds", "subnet-1,subnet-2"), ("Versioning", "true")),
        environment=(("BATCHLAB_LOG_FORMAT", "json"),),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "is not an object"),
        ("pols: []\n", "'pols', which is not a setting"),
        ("pools: [{name: a, min: 1}]\n", "'min', which is not a setting"),
        ("pools: [{name: a, slots: two}]\n", "slots is 'two'"),
        ("pools: [{name: a, slots: true}]\n", "slots is True"),
        ("pools: [{slots: 1}]\n", "a pool lacks a name"),
        ("pools: [{name: a, types: m7i.large}]\n", "not a list"),
        ("parameters: [a]\n", "not names with values"),
        ("packages: duckdb\n", "not a list"),
        ("environment: {API_TOKEN: x}\n", "API_TOKEN is the name of a secret"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_flaws_of_a_settings_file_are_reported(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as told:
        settings.load(file)
    assert says in str(told.value)
    assert str(file) in str(told.value)


def test_stored_settings_name_the_certificates_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stack.yaml").write_text("database_ca: bundle.pem\n")
    assert settings.load(Path("stack.yaml")).database_ca == str(tmp_path / "bundle.pem")
    (tmp_path / "stack.yaml").write_text("packages: [pandas]\n")
    assert settings.load(Path("stack.yaml")).database_ca == ""


def test_damaged_settings_file_is_reported(tmp_path: Path) -> None:
    settings.write(Home(tmp_path), FULL)
    settings.path_in(Home(tmp_path)).write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        settings.read(Home(tmp_path))


def test_parameters_are_named_as_in_the_expanded_template() -> None:
    given = settings.parameters(FULL, source())
    assert given == {
        "Ledger": "postgres",
        "LogDays": "7",
        "PoolName": "default",
        "PoolMin": "0",
        "PoolMax": "10",
        "PoolSlots": "2",
        "PoolInstanceTypes": "m7i.large,m6i.large",
        "PoolBigName": "big",
        "PoolBigMin": "1",
        "PoolBigMax": "3",
        "PoolBigSlots": "4",
        "PoolBigInstanceTypes": "m7i.2xlarge",
        "PoolBigOnDemandBase": "1",
    }
    assert given.keys() <= expand(source(), ["default", "big"])["Parameters"].keys()


@pytest.mark.parametrize("base", ["default", "big"])
def test_stack_reports_the_settings_of_its_creation(base: str) -> None:
    """A user on another machine without settings.json gets the same settings."""
    given = settings.parameters(FULL, source(), base)
    found, found_base = settings.from_stack("grid", "eu-west-1", {**given, "Release": "abc"})
    assert found_base == base
    assert sorted(found.pools, key=lambda one: one.name) == sorted(FULL.pools, key=lambda one: one.name)
    assert found.parameters == FULL.parameters


def test_pools_with_similar_names_are_distinguished() -> None:
    pools = (PoolSettings("big"), PoolSettings("bigger", slots=3), PoolSettings("default"))
    given = settings.parameters(Settings(pools=pools), source())
    found, _ = settings.from_stack("batchlab", "", given)
    assert {(pool.name, pool.slots) for pool in found.pools} == {("big", 2), ("bigger", 3), ("default", 2)}
    assert all(not pool.parameters for pool in found.pools)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"stack": "Grid"}, "cannot be called 'Grid'"),
        ({"stack": "g" * 29}, "cannot be called"),
        ({"pools": (PoolSettings("A"),)}, "cannot be called 'A'"),
        ({"pools": (PoolSettings("a"), PoolSettings("a"))}, "given twice"),
        ({"pools": (PoolSettings("p" * 41),)}, "cannot be called"),
        ({"pools": (PoolSettings("a", 3, 2),)}, "3 to 2 instances"),
        ({"pools": (PoolSettings("a", 0, 0),)}, "0 to 0 instances"),
        ({"pools": (PoolSettings("a", types=("m7i",)),)}, "not an instance type"),
        ({"pools": (PoolSettings("a", types=("m7i.large", "m7g.large")),)}, "different processors (x86_64 and arm64)"),
        ({"parameters": (("Ledgr", "x"),)}, "Similar parameters: Ledger"),
        ({"parameters": (("PoolMin", "1"),)}, "no parameter 'PoolMin'"),
        ({"parameters": (("Release", "1"),)}, "no parameter 'Release'"),
        ({"parameters": (("Ledger", "oracle"),)}, "one of 'sqlite', 'postgres', 'simpledb'"),
        ({"parameters": (("LogDays", "8"),)}, "one of '7', '30', '90'"),
        ({"parameters": (("BudgetUsd", "-1"),)}, "from 0 to"),
        ({"parameters": (("BudgetUsd", "many"),)}, "not a number"),
        ({"parameters": (("AlarmEmail", "me"),)}, "Allowed: An address"),
        ({"pools": (PoolSettings("a", parameters=(("PoolMx", "1"),)),)}, "no parameter 'PoolMx'"),
    ],
)
def test_settings_that_aws_would_refuse_are_refused_first(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as told:
        settings.parameters(Settings(**wrong), source())
    assert says in str(told.value)


GRAVITON = {
    "ManagerImage": "resolve:ssm:/aws/service/ami-amazon-linux-latest/x-arm64",
    "ManagerInstanceType": "t4g.small",
    "WorkerImage": "ami-0123456789abcdef0",
}


def test_graviton_needs_images_and_a_manager_of_its_own() -> None:
    """Each instance would refuse a release for another processor at its boot."""
    whole = template.load(template.shipped_template())
    arm = Settings(pools=(PoolSettings("a", types=("c7g.large", "m7g.large")),))
    with pytest.raises(UsageError) as told:
        settings.parameters(arm, whole)
    assert told.value.message == (
        "The pools' instance types are arm64, but WorkerImage and ManagerImage and ManagerInstanceType are not."
    )
    begin = "resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-"
    assert f"--set WorkerImage={begin}arm64 --set ManagerImage={begin}arm64" in told.value.remedy
    assert "--set ManagerInstanceType=t4g.small" in told.value.remedy
    given = settings.parameters(arm.with_parameters(GRAVITON), whole)
    assert given["ManagerInstanceType"] == "t4g.small"
    intel = Settings(pools=(PoolSettings("a", types=("m7i.large",)),)).with_parameters(
        {"ManagerInstanceType": "t4g.small"}
    )
    with pytest.raises(UsageError, match="ManagerInstanceType is not"):
        settings.parameters(intel, whole)


@pytest.mark.parametrize(
    ("types", "machine"),
    [
        (("m7g.large",), "aarch64"),
        (("m7i.large",), "x86_64"),
        (("q9.huge",), "x86_64"),
        # The catalog does not contain these types.
        (("c8g.large",), "aarch64"),
        (("x2gd.medium",), "aarch64"),
        (("a1.large",), "aarch64"),
        (("g4dn.xlarge",), "x86_64"),
        (("g5g.xlarge",), "aarch64"),
        (("i3en.large",), "x86_64"),
    ],
)
def test_a_release_is_for_the_pools_machines(types: tuple[str, ...], machine: str) -> None:
    wanted = Settings(pools=(PoolSettings("a", types=types),))
    assert Target.of(wanted.machine, "3.12").architecture == machine


def test_the_longest_names_fit_into_a_queues() -> None:
    longest = Settings("g" * 28, pools=(PoolSettings("p" * 40),))
    settings.check(longest)
    assert len(f"{longest.stack}-{object_keys.dead_letters(longest.pools[0].name)}") == 80


def test_a_parameter_without_a_default_must_be_given() -> None:
    demanding = source()
    demanding["Parameters"]["VpcId"] = {"Type": "String"}
    with pytest.raises(UsageError, match="--set VpcId=VALUE"):
        settings.parameters(Settings(), demanding)


@pytest.mark.parametrize(
    ("types", "architecture"),
    [((), "x86_64"), (("m7g.large",), "arm64"), (("m7i.large",), "x86_64"), (("q9.big",), "x86_64")],
)
def test_a_release_is_for_the_pools_processors(types: tuple[str, ...], architecture: str) -> None:
    assert Settings(pools=(PoolSettings("a", types=types),)).architecture == architecture


def test_pools_on_the_command_line_may_name_their_types() -> None:
    pool, types = parse_typed_pool("default:0-4x2@m7i.large,m6i.large")
    assert (pool.name, pool.max_size, types) == ("default", 4, ("m7i.large", "m6i.large"))
    assert parse_typed_pool("default:0-4x2")[1] == ()
    for wrong in ("default:0-4x2@", "default:0-4x2@a,,b"):
        with pytest.raises(BatchlabError, match="lacks an instance type"):
            parse_typed_pool(wrong)


def test_stored_settings_are_readable_json(tmp_path: Path) -> None:
    settings.write(Home(tmp_path), FULL)
    kept = json.loads(settings.path_in(Home(tmp_path)).read_text())
    assert kept["pools"][1]["parameters"] == {"PoolOnDemandBase": "1"}
    assert kept["parameters"] == {"Ledger": "postgres", "LogDays": "7"}
