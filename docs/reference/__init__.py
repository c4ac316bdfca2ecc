"""Pages of the reference that are made from the code.

`python -m docs.reference docs` makes them again. A test compares each page with its source.
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
"""Function that makes each page, by the page's path. Its argument is the folder of the docs."""


def write(docs: Path) -> list[str]:
    """Write the pages in `docs` and return the paths of those that changed."""
    changed = []
    for path, make in PAGES.items():
        made = make(docs)
        if not (docs / path).exists() or (docs / path).read_text() != made:
            (docs / path).write_text(made)
            changed.append(path)
    return changed
