"""moto's own tests of Auto Scaling, from moto's source distribution, run at batchlab's endpoint."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support import ROOT

PLUGIN = Path(__file__).with_name("moto_plugin.py")
FOLDER = "test_autoscaling"
"""Folder of moto's tests of Auto Scaling. Its modules also import the modules in `_HELPERS`."""
_HELPERS = ("__init__.py", "conftest.py", "markers.py", "test_ec2/__init__.py", "test_ec2/conftest.py")
TIMEOUT_S = 60.0
RUN_S = 600.0
"""Time limit in seconds of all of moto's tests, for an endpoint whose groups never come to rest."""


def source_distribution(cache: Path) -> Path:
    """Return the path of moto's source distribution, with the version and the SHA-256 of uv.lock. Without a network,
    skip the test on a laptop, or fail in CI."""
    (locked,) = (p for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"] if p["name"] == "moto")
    assert version("moto") == locked["version"], "the environment has another version of moto than uv.lock"
    url, digest = locked["sdist"]["url"], locked["sdist"]["hash"]
    archive = cache / str(url).rpartition("/")[2]
    if not archive.exists() or _digest(archive) != digest:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                data = response.read()
        except (OSError, HTTPException) as error:
            if os.environ.get("CI"):
                pytest.fail(f"CI promises a network, but {url} cannot be read: {error}")
            pytest.skip(f"{url} cannot be read: {error}")
        part = archive.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.replace(archive)
    assert _digest(archive) == digest, f"{archive} differs from uv.lock"
    return archive


def _digest(archive: Path) -> str:
    return f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}"


def unpack(archive: Path, folder: Path) -> list[str]:
    """Unpack moto's tests of Auto Scaling below `folder`, and return the names of the test files."""
    with tarfile.open(archive) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.name.startswith(f"tests/{FOLDER}/") or member.name in [f"tests/{name}" for name in _HELPERS]:
                tar.extract(member, folder, filter="data")
    return sorted(path.name for path in (folder / "tests" / FOLDER).glob("test_*.py"))


def run(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """Run moto's test files at batchlab's endpoint. Return the error of each test, or "" for a passed test, by the
    test's name in the form `file.py::name`."""
    shutil.copy(PLUGIN, folder)
    results = folder / "results.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "-q", "--tb=line", "-p", "moto_plugin", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--rootdir", ".", f"--junit-xml={results}"),
            *(f"tests/{FOLDER}/{name}" for name in files),
        ],
        cwd=folder,
        # The process must not use the user's AWS_* variables, or load the plugins of the test environment.
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(folder),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return dict(_result(case) for case in ElementTree.parse(results).iter("testcase"))


def _result(case: ElementTree.Element) -> tuple[str, str]:
    module, _, group = case.attrib["classname"].removeprefix(f"tests.{FOLDER}.").partition(".")
    name = "::".join(part for part in (f"{module}.py", group, case.attrib["name"]) if part)
    problem: Any = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    return name, "" if problem is None else str(problem.get("message") or problem.text)
