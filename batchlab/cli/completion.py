"""What the shell offers for a word that is being typed: jobs, schedules, backends, scenarios,
examples.

Invariant: it takes no longer than PATIENCE_S, says nothing where something is wrong, and makes
nothing: a word that cannot be completed is simply typed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from batchlab.runtime.home import Home

PATIENCE_S = 0.5
"""For a manager: longer than it takes, shorter than anybody waits for a key."""
MOST = 100
LAST = "last"


def backends(incomplete: str) -> list[str]:
    """Names of backends."""
    return _of(incomplete, _files("backends", "*/backend.toml", lambda path: path.parent.name))


def examples(incomplete: str) -> list[str]:
    """Names of shipped examples that are jobs."""
    return _of(incomplete, _files("examples", "*/job.yaml", lambda path: path.parent.name))


def scenarios(incomplete: str) -> list[str]:
    """Names of shipped scenarios; the shell offers files where none begins so."""
    return _of(incomplete, _files("scenarios", "*.yaml", lambda path: path.stem))


def jobs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of jobs, newest first: those that the manager knows, else those in the bucket here."""
    home = _home(ctx)
    known = [str(one["id"]) for one in _asked(home, f"/v1/jobs?limit={MOST}", "jobs")]
    return _of(incomplete, [LAST, *(known or _left(home))])


def schedules(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of schedules."""
    known = _asked(_home(ctx), "/v1/schedules", "schedules")
    return _of(incomplete, (str(one["name"]) for one in known))


def _of(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _files(folder: str, pattern: str, name: Callable[[Path], str]) -> list[str]:
    from batchlab.core import package_data
    from batchlab.core.errors import UsageError

    try:
        return sorted(name(path) for path in package_data.folder(folder).glob(pattern))
    except UsageError:
        return []


def _home(ctx: typer.Context) -> Home:
    from batchlab.runtime.home import find_home

    named = ctx.params.get("home")
    return find_home(Path(named) if named else None)


def _asked(home: Home, path: str, listed: str) -> list[dict[str, Any]]:
    """What the manager that is up lists; nothing where none is, or it does not answer."""
    from batchlab.client.http import Client
    from batchlab.core.errors import BatchlabError

    try:
        record = home.record()
        if record is None:
            return []
        with Client.of(home, record) as client:
            found: list[dict[str, Any]] = client.get(path, answer_s=PATIENCE_S)[listed]
    except BatchlabError:
        return []
    return found


def _left(home: Home) -> list[str]:
    """Jobs in a bucket that is a folder here, the newest first."""
    try:
        found = [(path.stat().st_mtime, path.name) for path in (home.objects / "jobs").iterdir()]
    except OSError:
        return []
    return [name for _, name in sorted(found, reverse=True)[:MOST]]
