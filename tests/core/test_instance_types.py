"""The catalog of instance types: the shipped file is correct, and mistakes in a file are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.core import instance_types
from batchlab.core.errors import UsageError
from batchlab.core.instance_types import MIN_MEMORY_MIB, InstanceType, Share

ROW = '"x.large" = { vcpu = 2, memory_mib = 8192, architecture = "x86_64" }'


def test_shipped_table_knows_the_common_types() -> None:
    types = instance_types.load().types
    assert len(types) >= 30
    assert types["m7i.large"] == InstanceType("m7i.large", 2, 8192, "x86_64")
    assert types["c7g.medium"] == InstanceType("c7g.medium", 1, 2048, "arm64")
    assert types["t3.nano"].memory_mib == 512


def test_memory_doubles_with_cpus_within_a_family() -> None:
    """A wrong entry in the table would break this rule. Burstable types do not follow the rule."""
    types = [t for t in instance_types.load().types.values() if not (t.name.startswith("t") or t.gpus)]
    ratios: dict[str, set[float]] = {}
    for t in types:
        ratios.setdefault(t.name[0], set()).add(t.memory_mib / t.vcpu)
    assert ratios == {"m": {4096}, "c": {2048}, "r": {8192}}
    assert all((t.architecture == "arm64") == ("g." in t.name) for t in types)


def test_a_share_is_the_types_figures_times_the_scale() -> None:
    known = instance_types.load()
    assert known.share("m7i.large") == Share(2.0, 8192)
    assert known.share("m7i.large", 0.25) == Share(0.5, 2048)
    assert known.share("t3.nano", 0.1).memory_mib == MIN_MEMORY_MIB


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
def test_invalid_scale_is_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="above 0 and up to 1"):
        instance_types.load().share("m7i.large", scale)


def test_unknown_type_is_refused_with_similar_names() -> None:
    with pytest.raises(UsageError, match=r"the instance type 'm7i.lrge'.*Did you mean.*m7i.large"):
        instance_types.load().of("m7i.lrge")
    with pytest.raises(UsageError, match=r"instance-types.toml lists"):
        instance_types.load().of("???")


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("[types", "is not TOML"),
        ("", r"must have a table \[types\]"),
        ("[types]", r"must have a table \[types\]"),
        (f"[types]\n{ROW}\n[more]", r"must have a table \[types\]"),
        (f"[types]\n{ROW.replace(', memory_mib = 8192', '')}", "'x.large' must have arch"),
        (f"[types]\n{ROW.replace('vcpu', 'cpus')}", "'x.large' must have arch"),
        (f"[types]\n{ROW.replace('= 2,', '= 0,')}", "vcpu of 'x.large' is 0"),
        (f"[types]\n{ROW.replace('= 2,', '= true,')}", "vcpu of 'x.large' is True"),
        (f"[types]\n{ROW.replace('8192', '0.5')}", "memory_mib of 'x.large' is 0.5"),
        (f"[types]\n{ROW.replace('x86_64', 'amd64')}", "'amd64', not x86_64 or arm64"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_place(tmp_path: Path, content: str, wrong: str) -> None:
    path = tmp_path / "types.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=wrong) as refused:
        instance_types.load(path)
    assert str(path) in str(refused.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"types.toml cannot be read: No such file"):
        instance_types.load(tmp_path / "types.toml")
