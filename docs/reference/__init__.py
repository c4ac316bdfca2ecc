"""Pages and pictures of the docs that are generated from the code.

`python -m docs.reference docs` generates all of them. A test compares each committed page with the
generated one, so a page cannot contradict the code.
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
    report_tables,
    rooms,
    scenario_file,
    settings,
)


def _without_docs(make: Callable[[], str]) -> Callable[[Path], str]:
    return lambda _: make()


PAGES: Mapping[str, Callable[[Path], str]] = {
    **{path: _without_docs(make) for path, make in commands.pages().items()},
    "contributing/http-api.md": lambda _: http.reference(),
    "capabilities.md": lambda _: capabilities.reference(),
    "settings.md": lambda _: settings.reference(),
    "job-file.md": lambda _: job_file.reference(),
    "report-data.md": lambda _: report_tables.page(),
    "scenario-file.md": lambda _: scenario_file.reference(),
    "contributing/decisions/index.md": decisions.reference,
    "images/rooms.svg": lambda _: rooms.picture(),
}
"""Generator of each page, by its path below `docs`. Its argument is the path of `docs`."""


def write(docs: Path) -> list[str]:
    """Generate the pages in `docs` and return the paths of the changed ones."""
    changed = []
    for path, make in PAGES.items():
        made = make(docs)
        (docs / path).parent.mkdir(exist_ok=True)
        if not (docs / path).exists() or (docs / path).read_text() != made:
            (docs / path).write_text(made)
            changed.append(path)
    return changed
