"""Data folders that ship with the code: backends, scenarios, compose, examples."""

from __future__ import annotations

from pathlib import Path

from batchlab.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `name`, in an installed wheel or in a checkout; UsageError where it is neither."""
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise UsageError(f"This installation lacks its {name} folder.", remedy="Install it again.")
