"""The published Python API, which changes only on purpose."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, public_api
from tests.support.public_api import ACCEPT, FILE, MODULES, text


def test_the_published_api_is_the_one_that_was_accepted() -> None:
    accepted, now = FILE.read_text(), text()
    changes = "\n".join(
        difflib.unified_diff(accepted.splitlines(), now.splitlines(), "accepted", "now", lineterm="", n=2)
    )
    assert not changes, (
        f"The published Python API has changed:\n{changes}\n"
        f"Where that is meant, `{ACCEPT}` accepts it; say it in CHANGELOG.md too. What is taken "
        "away, or asks for more than before, breaks users' programs."
    )


def test_documented_executor_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_api, "FILE", tmp_path / "python-api.txt")
    monkeypatch.setattr(sys, "argv", ["tests.support.public_api", *ACCEPT.split()[3:]])
    public_api.main()
    assert (tmp_path / "python-api.txt").read_text() == FILE.read_text()


def test_documented_imports_are_published() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text()
    imported = {
        (module, name)
        for module, names in re.findall(r"^from (batchlab[\w.]*) import (.+)$", page, re.M)
        for name in re.split(r",\s*", names)
    }
    assert len(imported) >= 4
    assert imported <= {(module, name) for module, names in MODULES.items() for name in names}
    for module in re.findall(r"^import (batchlab[\w.]*)$", page, re.M):
        assert module in MODULES


def test_joblib_backend_names_its_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("batchlab.client.joblib", "joblib.parallel"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ImportError, match="needs joblib, which is not installed: pip install jobl"):
        importlib.import_module("batchlab.client.joblib")
