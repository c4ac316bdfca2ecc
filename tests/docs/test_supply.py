"""The licenses of the packages and files that batchlab contains, compared with the stored list."""

from __future__ import annotations

import hashlib
import re
import tomllib

import pytest

from tests.support import ROOT
from tests.support.supply import VENDOR, bill, is_allowed, licence, runtime, vendored
from tests.support.uv import program


def test_every_licence_of_what_is_installed_with_it_is_allowed() -> None:
    licences = {one.name: licence(one) for one in runtime()}
    assert {"boto3", "docker", "duckdb", "typer"} <= set(licences)
    wrong = {name: told for name, told in licences.items() if not is_allowed(told)}
    assert not wrong, "say in tests/support/supply.py what they mean, or do without them"


@pytest.mark.parametrize(
    ("told", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 AND BSD-2-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("a licence of our own", False),
        ("", False),
    ],
)
def test_an_unknown_licence_is_not(told: str, allowed: bool) -> None:
    assert is_allowed(told) is allowed


def test_vendored_files_are_those_that_are_written_down() -> None:
    listed = {one["file"]: one for one in vendored()}
    kept = {path.name for path in VENDOR.iterdir() if path.suffix in (".js", ".css")}
    assert kept == set(listed)
    for name, one in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == one["sha256"]
        assert is_allowed(one["licence"])


def test_the_bill_of_materials_has_all_of_the_lock_and_of_what_is_vendored() -> None:
    made = bill(program())
    assert made["bomFormat"] == "CycloneDX"
    have = {one["name"]: one for one in made["components"]}
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {one["name"]: one.get("version") for one in lock["package"]}
    (ours,) = (one for one in lock["package"] if one["name"] == "batchlab")
    of_extras = [one for some in ours["optional-dependencies"].values() for one in some]
    assert {"boto3", "docker", "opentelemetry-sdk"} <= {extra["name"] for extra in of_extras}
    for one in [*ours["dependencies"], *of_extras]:
        assert have[one["name"]]["version"] == locked[one["name"]]
    assert {"pytest", "mypy", "moto"}.isdisjoint(have)
    assert {one["file"] for one in vendored()} <= set(have)
    here = {one.name.lower() for one in runtime()}
    assert not [name for name in here & set(have) if "licenses" not in have[name]]


@pytest.mark.parametrize("processor", ["arm64", "x86_64"])
def test_no_dependency_needs_a_compiler_on_macos_13(processor: str) -> None:
    lock = {one["name"]: one for one in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    wheel = re.compile(rf"(cp313-cp313|abi3|py3-none)-macosx_(\d+)_\d+_(universal2|{processor})\.whl$")
    without = []
    for name in sorted({one.name.lower().replace("_", "-") for one in runtime()} & set(lock) - {"batchlab"}):
        wheels = [one["url"] for one in lock[name].get("wheels", ())]
        found = [match for one in wheels if (match := wheel.search(one))]
        if not any(one.endswith("-none-any.whl") for one in wheels) and not any(int(one[2]) <= 13 for one in found):
            without.append(name)
    assert without == ["localstack-client"], "its source is pure Python"
