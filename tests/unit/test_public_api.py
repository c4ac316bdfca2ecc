"""What users' programs rely on changes only on purpose."""

from __future__ import annotations

import difflib
import re

from tests.public_api import ACCEPT, FILE, MODULES, ROOT, text


def test_the_published_api_is_the_one_that_was_accepted() -> None:
    accepted, now = FILE.read_text(), text()
    changes = "\n".join(
        difflib.unified_diff(
            accepted.splitlines(), now.splitlines(), "accepted", "now", lineterm="", n=2
        )
    )
    assert not changes, (
        f"The published Python API has changed:\n{changes}\n"
        f"Where that is meant, `{ACCEPT}` accepts it; say it in CHANGELOG.md too. What is taken "
        "away, or asks for more than before, breaks users' programs."
    )


def test_what_the_docs_import_is_published() -> None:
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
