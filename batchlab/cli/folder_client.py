"""Client of a grid that is not up, which reads the ledger and the bucket in the grid's folder.

The requests of the client run in this process, by the endpoints of the manager's API. Invariant: the client does not
create or change a file of the grid's folder. A request that changes something, or that is not about jobs, raises
Unreachable.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.cli.option_values import no_grid
from batchlab.client.http import Client
from batchlab.client.requests import error_of
from batchlab.core.api_types import EtaView
from batchlab.core.capabilities import backend_names
from batchlab.core.errors import UsageError
from batchlab.core.model import GroupView, JobState
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    import httpx

    from batchlab.core.ports import Ledger

_JOBS = "/v1/jobs"


def open_folder(home: Home, backend: str | None = None) -> FolderClient | None:
    """Return a client of the grid that was up last in the folder, or None if the folder does not have its ledger.

    If `backend` is given, the grid is the grid on this backend. The ledger of a stack on AWS is not in the folder.
    """
    if backend is None and aws_deployment.path_in(home).exists():
        return None
    found: list[tuple[float, Backend]] = []
    for name in [backend] if backend else backend_names():
        with suppress(UsageError):  # $BATCHLAB_ENDPOINT may be set for another backend.
            one = factory.load(name)
            if path := one.ledger_in(home):
                found.append((_changed_s(path), one))
    return FolderClient(home, max(found, key=itemgetter(0))[1]) if found else None


def _changed_s(ledger: Path) -> float:
    """Return the time of the last write to the ledger. A killed manager leaves a write-ahead log with content."""
    log = ledger.with_name(f"{ledger.name}-wal")
    return max(path.stat().st_mtime for path in (ledger, log) if path == ledger or _has_content(path))


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


class FolderClient(Client):
    """Client of a grid that is not up. The client opens the ledger and the bucket at its first request."""

    def __init__(self, home: Home, backend: Backend) -> None:
        self._key = secrets.token_hex(16)
        super().__init__("http://localhost", self._key)
        self.home = home
        self.backend = backend
        self._runner = asyncio.Runner()
        self._ledger: Ledger | None = None
        self._http: httpx.AsyncClient | None = None

    def why(self, job: str) -> str:
        """Return the result of a job that has ended. Any other job waits for a grid."""
        if JobState(self.job(job)["state"]).ended:
            return super().why(job)
        return f"No grid is up in {self.home.path}. `batchlab grid up` starts a grid, which continues the job."

    def eta(self, job: str) -> EtaView:
        """Return an unknown time if the job has not ended."""
        if JobState(self.job(job)["state"]).ended:
            return super().eta(job)
        return {"low_s": None, "high_s": None, "unmeasured": [], "text": "unknown: no grid is up"}

    def _call(
        self, method: str, path: str, *, body: Any = None, answer_s: float = 0.0, **query: str | float | None
    ) -> Any:
        del body, answer_s
        if method != "GET" or not path.startswith(_JOBS):
            raise no_grid(self.home)
        return self._runner.run(self._get(path, {key: value for key, value in query.items() if value is not None}))

    async def _get(self, path: str, query: dict[str, str | float]) -> Any:
        if self._http is None:
            self._http = self._open()
        response = await self._http.get(path, params=query)
        if response.is_error:
            raise error_of(path, response.status_code, response.content)
        return response.json()

    def _open(self) -> httpx.AsyncClient:
        import httpx

        from batchlab.adapters.clock import RandomIds, WallClock
        from batchlab.client.debug.prepare import ReadOnlyObjects
        from batchlab.manager.manager import Manager
        from batchlab.manager.state import Ports
        from batchlab.server.http import create_app

        patience = factory.patience()
        objects = ReadOnlyObjects(self.backend.open_bucket(self.home), patience)
        self._ledger = ledger = self.backend.read_ledger(self.home)
        nothing: Any = _Nothing()
        ports = Ports(objects, nothing, nothing, ledger, WallClock(), RandomIds(), patience)
        # The manager neither takes the lease nor runs. Its endpoints for jobs read only the ledger and the bucket.
        manager = Manager(ports, self.backend.manager, (), "folder")
        manager.is_leader.set()
        app, _ = create_app(manager, token=self._key, backend_name=self.backend.name, on_shutdown=lambda: None)
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url=self.url,
            headers={"Authorization": f"Bearer {self._key}"},
        )

    def close(self) -> None:
        """Close the ledger."""
        super().close()
        if self._ledger is not None:
            self._runner.run(self._ledger.close())
            self._ledger = None
        self._runner.close()


class _Nothing:
    """Fleet without groups, and queues that the client does not use."""

    async def describe(self) -> list[GroupView]:
        return []
