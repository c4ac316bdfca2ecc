"""Code folders and pickled functions on this instance, each fetched once.

Invariant: code that cannot be had is the job's failure, with a sentence; a store that does not
answer is not, and propagates.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from batchlab.errors import NotFound, UsageError
from batchlab.ports import Objects
from batchlab.worker import code
from batchlab.worker.handlers import Problem
from batchlab.worker.materialise import OffLoop
from batchlab.worker.runner import Scratch


class Library:
    """What the jobs of one worker run."""

    def __init__(self, objects: Objects, scratch: Scratch, off_loop: OffLoop) -> None:
        self._objects = objects
        self._scratch = scratch
        self._off_loop = off_loop
        self._locks: dict[str, asyncio.Lock] = {}
        self._functions: dict[str, Path] = {}

    async def code(self, key: str | None) -> tuple[str, Path | None]:
        """The digest and the unpacked folder of a code zip; ("", None) for a job without one.

        Problem of kind "import" where the zip is gone or damaged.
        """
        if key is None:
            return "", None
        try:
            digest = code.digest_of(key)
            folder = self._scratch.code(digest)
            async with self._lock(key):
                if not folder.is_dir():
                    data = await self._objects.get(key)
                    await self._off_loop(code.unpack, data, digest, folder)
        except (NotFound, UsageError) as error:
            raise Problem("import", f"The job's code cannot be had: {error}") from error
        return digest, folder

    def at_hand(self, key: str) -> Path | None:
        """The file of a pickled function that has been fetched before, None of any other."""
        return self._functions.get(key)

    async def function(self, key: str) -> Path:
        """The file of a pickled function. Problem of kind "import" where it is gone."""
        path = self._scratch.root / "functions" / hashlib.sha256(key.encode()).hexdigest()
        try:
            async with self._lock(key):
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    await self._objects.download(key, path)
        except NotFound as error:
            raise Problem("import", f"The job's function cannot be had: {error}") from error
        self._functions[key] = path
        return path

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())
