"""The pages of the reference that are made from the code.

Invariant: a page says nothing that the code does not say; a test compares each with what it would
be now. `python -m docs.reference docs` makes all of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from docs.reference import (
    capabilities,
    commands,
    decisions,
    http,
    job_file,
    scenario_file,
    settings,
)

PAGES: Mapping[str, Callable[[Path], str]] = {
    "cli.md": lambda _: commands.reference(),
    "http-api.md": lambda _: http.reference(),
    "capabilities.md": lambda _: capabilities.reference(),
    "settings.md": lambda _: settings.reference(),
    "job-file.md": lambda _: job_file.reference(),
    "scenario-file.md": lambda _: scenario_file.reference(),
    "decisions/index.md": decisions.reference,
}
"""What makes each page, by its path in the folder of the docs, which it is given."""


def write(docs: Path) -> list[str]:
    """Make the pages in `docs` again; returns the paths of those that have changed."""
    changed = []
    for path, make in PAGES.items():
        made = make(docs)
        if not (docs / path).exists() or (docs / path).read_text() != made:
            (docs / path).write_text(made)
            changed.append(path)
    return changed
