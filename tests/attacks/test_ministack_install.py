"""Attacks of a package index on the installation of MiniStack."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from batchlab.adapters.local.ministack import VARIABLE, VERSION, find, install, requirements
from batchlab.core.errors import BackendError


def wheel(folder: Path, name: str, version: str) -> None:
    """Write a wheel of that name with foreign code."""
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name.replace('-', '_')}.py", "raise SystemExit('the code of somebody else')")
        head = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{stem}.dist-info/WHEEL", head)
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        file.writestr(f"{stem}.dist-info/METADATA", about)
        file.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.mark.slow
def test_a_file_that_is_not_the_one_on_record_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the installation ran any package that the index served as MiniStack."""
    served = tmp_path / "served"
    served.mkdir()
    packages = re.findall(r"^([\w.-]+)==([\w.]+)", requirements().read_text(), re.MULTILINE)
    for name, version in packages:
        wheel(served, name, version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(BackendError, match="whose hash differs"):
        install(lambda _: None)
    assert find() is None


def test_every_package_has_one_version_and_hashes() -> None:
    """pip checks the hash of each file only if every package has a hash."""
    lines = requirements().read_text().replace("\\\n", " ").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    for line in packages:
        assert re.fullmatch(r"[\w.-]+==\S+\s+(;.*)?(\s*--hash=sha256:[0-9a-f]{64})+\s*", line), line
    names = {line.partition("==")[0] for line in packages}
    assert {"ministack", "uvicorn", "httptools", "botocore"} <= names
    assert any(line.startswith(f"ministack=={VERSION} ") for line in packages)
