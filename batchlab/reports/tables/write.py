"""Writer of a job's performance data, which reads the bucket, builds Parquet files, and uploads the files.

Invariants: the index is written last, so a reader that finds the index also finds all files. Writing the data of a job
again produces the same facts.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from batchlab import __version__
from batchlab.core.errors import BackendError, NotFound
from batchlab.core.model import JobId
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.reports.tables.build import Setting, TableBuilder
from batchlab.reports.tables.gather import JobDataReader
from batchlab.reports.tables.schema import TABLES, VERSION

INDEX = "report.json"


@dataclass(frozen=True, slots=True)
class Index:
    """List of the written files of a job, and the state of the job. `rows` and `sizes` (in bytes) have the table as
    key.
    """

    round: int
    is_final: bool
    rows: dict[str, int]
    sizes: dict[str, int]

    def to_bytes(self) -> bytes:
        tables = {name: [rows, self.sizes[name]] for name, rows in self.rows.items()}
        return json_format.to_bytes(
            {
                "v": json_format.VERSION,
                "schema_version": VERSION,
                "by": f"batchlab {__version__}",
                "round": self.round,
                "is_final": self.is_final,
                "tables": tables,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Index:
        doc = json_format.loads(data)
        tables = doc["tables"]
        return cls(
            doc["round"],
            doc["is_final"],
            {name: rows for name, (rows, _) in tables.items()},
            {name: size for name, (_, size) in tables.items()},
        )


class Writer:
    """Writer of performance data to one bucket. `scratch` is a folder for temporary files. The writer creates the
    folder when it first writes a file.
    """

    def __init__(self, objects: Objects, patience: Patience, setting: Setting, scratch: Path | None = None) -> None:
        self._objects = objects
        self._patience = patience
        self._setting = setting
        self._scratch = scratch

    async def write(self, job: JobId) -> None:
        """Write the job's data into the bucket.

        Raise UsageError if the job does not exist. The function may also raise BackendError, OSError, and duckdb.Error.
        """
        async with self._folder() as folder:
            await self.publish(job, folder, await self.make(job, folder))

    async def make(self, job: JobId, folder: Path) -> Index:
        """Write the job's data into a folder and return the index."""
        async with self._folder() as scratch:
            gathered = await JobDataReader(self._objects, self._patience).gather(job, scratch)
            building = await asyncio.to_thread(TableBuilder, gathered, self._setting, scratch)
            try:
                rows = await asyncio.to_thread(building.run, folder)
            except asyncio.CancelledError:
                building.interrupt()  # without the interrupt, the process could not exit before the query ends
                raise
        sizes = {table.name: (folder / table.file).stat().st_size for table in TABLES}
        return Index(gathered.round, gathered.ending is not None, rows, sizes)

    async def publish(self, job: JobId, folder: Path, index: Index) -> None:
        """Upload a folder's files to the bucket. The uploads are unconditional, because only managers may write
        performance data.

        The index is uploaded after all files. A reader compares the size of each file with the index.
        """
        prefix = object_keys.reports(job)
        for table in TABLES:
            upload = partial(self._objects.upload, prefix + table.file, folder / table.file)
            await self._patience(upload)
        await self._patience(partial(self._objects.put, prefix + INDEX, index.to_bytes()))

    @asynccontextmanager
    async def _folder(self) -> AsyncIterator[Path]:
        def create() -> Path:
            if self._scratch:
                self._scratch.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="report-", dir=self._scratch))

        folder = await asyncio.to_thread(create)
        try:
            yield folder
        finally:
            # Errors are ignored, because an interrupted thread may still have files open for a moment.
            shutil.rmtree(folder, ignore_errors=True)


async def index_of(objects: Objects, patience: Patience, job: JobId) -> Index | None:
    """Return the index of the job's data, or None if the bucket does not have final data.

    Data is not final if the data was written while the job ran, or if a retry of the job has started since.
    """
    try:
        data = await patience(partial(objects.get, object_keys.reports(job) + INDEX))
    except NotFound:
        return None
    index = Index.from_bytes(data)
    if not index.is_final:
        return None
    again = partial(objects.head, object_keys.retry(job, index.round + 1))
    return None if await patience(again) else index


async def fetch(objects: Objects, patience: Patience, job: JobId, index: Index, to: Path) -> None:
    """Download the files of an index into the folder `to`. Raise BackendError if a file changed during the download."""
    prefix = object_keys.reports(job)
    for table in TABLES:
        if table.name in index.sizes:
            download = partial(objects.download, prefix + table.file, to / table.file)
            if await patience(download) != index.sizes[table.name]:
                raise BackendError(f"The performance data of job {job} changed while it was read.", remedy="Ask again.")
