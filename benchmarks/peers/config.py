"""Configuration of one driver process and its workers, in a JSON file that an environment variable names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""Root of the repository, which is on the import path of drivers and workers."""

VARIABLE = "BATCHLAB_PEERS_CONFIG"
"""Environment variable with the path of the file. The path also identifies the processes of one measurement."""


@dataclass(frozen=True)
class Config:
    """Configuration of one measurement."""

    peer: str
    workloads: Sequence[str]
    work: str
    """Folder of the measurement's files."""
    run_id: str
    options: Mapping[str, Any]
    """Options of the peer's adapter."""
    urls: Mapping[str, str]
    """Addresses of the services."""
    pids: Mapping[str, int]
    """First process of each service."""
    workers: int
    nodes: int
    reliable: bool
    """Whether the peer uses its recommended settings for at-least-once execution instead of those for throughput."""
    scale: float
    slow: float
    bundle: int
    quiet: float
    patience: float
    noise: float
    attempts: int
    started_s: float = 0.0
    """Monotonic time at which the driver process was started."""
    busy_s: float = 0.0
    """CPU time of the machine at that time."""

    @property
    def folder(self) -> Path:
        return Path(self.work)

    @property
    def path(self) -> Path:
        return self.folder / "config.json"

    def write(self) -> None:
        self.path.write_text(json.dumps(asdict(self)))


def load() -> Config:
    """Read the configuration of this process."""
    return Config(**json.loads(Path(os.environ[VARIABLE]).read_text()))
