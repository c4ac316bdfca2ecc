"""The list of the oldest dependencies, which CI installs on the oldest Python."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [name for names in PROJECT["optional-dependencies"].values() for name in names]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / ".ci" / "oldest.txt").read_text(), re.M))


@pytest.mark.parametrize("written", sorted({*PROJECT["dependencies"], *EXTRAS}))
def test_lower_bound_is_tested(written: str) -> None:
    """A lower bound must be the version that CI installs. To write the list again: .ci/oldest"""
    requirement = Requirement(written)
    (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
    assert Version(PINS[requirement.name]) == Version(bound)
