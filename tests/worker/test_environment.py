"""A worker's description of its environment, and the report of a difference."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.port_retries import Patience
from batchlab.worker import environment

PATIENCE = Patience(random.Random(0), limit_s=0.0)


def test_environment_lists_packages_and_hides_values() -> None:
    secret = "hunter2-very-secret"
    environ = {"DB_PASSWORD": secret, "TZ": "UTC", "AWS_SECRET_ACCESS_KEY": secret, "TERM": "x"}
    found = environment.current(environ, image="sha256:1")
    assert found.minor == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert found.packages["pyyaml"] == version("pyyaml")
    assert found.variables == ("DB_PASSWORD",)
    assert found.settings == {"TZ": "UTC"}
    assert secret not in json.dumps(environment.to_json(found))


def test_the_first_installed_version_counts_as_it_does_for_an_import(tmp_path: Path) -> None:
    for folder, name in (("a", "My_Pkg-1.0.dist-info"), ("b", "my_pkg-2.0.dist-info")):
        (tmp_path / folder / name).mkdir(parents=True)
    (tmp_path / "b" / "old-0.1-py3.11.egg-info").mkdir()
    (tmp_path / "zip").write_text("")
    path = [str(tmp_path / name) for name in ("a", "b", "zip", "gone")]
    assert environment.packages(path) == {"my-pkg": "1.0", "old": "0.1-py3.11"}


def test_environment_is_stored_once_per_worker() -> None:
    async def main() -> None:
        objects = SimObjects()
        found = environment.current({"MODEL": "x"})
        await environment.record(objects, "w-1", found, PATIENCE)
        assert await environment.load(objects, "w-1", PATIENCE) == found
        assert await environment.load(objects, "w-2", PATIENCE) is None

    asyncio.run(main())


def test_a_later_batchlabs_record_can_be_read() -> None:
    doc = {**environment.to_json(environment.current({})), "moon": "full"}
    assert environment.from_json(doc) == environment.current({})


def test_differences_are_named_and_sameness_is_not() -> None:
    now = environment.current({"TZ": "UTC"})
    assert environment.differences(now, now) == []
    there = replace(
        now,
        python="3.9.1",
        packages={**now.packages, "pyyaml": "1.0", "ghost": "2.0"},
        settings={},
        variables=("MODEL_PATH",),
        image="app:7",
    )
    told = " ".join(environment.differences(there, now))
    assert "was CPython 3.9.1 on the worker" in told
    assert f"pyyaml ({version('pyyaml')}, there 1.0)" in told
    assert "Installed there and not here: ghost (2.0)." in told
    assert "TZ is 'UTC' here and was not set there." in told
    assert "MODEL_PATH is not set here" in told
    assert "image app:7" in told
    many = replace(now, variables=tuple(f"V{n:02d}" for n in range(20)))
    assert "V07 and 12 more are not set here" in " ".join(environment.differences(many, now))
