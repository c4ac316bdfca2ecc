"""The four example jobs come to the same wherever they run: simulated, local, in containers."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from batchlab.datagen import write_claims, write_records
from tests.integration.containers_grid import need_containers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BACKENDS = ("sim", "local", "localstack")
_OURS = ("summary.json", "printed.log", ".batchlab-made")
"""What is about the run, not of it."""


def _claims(folder: Path, _: Path) -> None:
    write_claims(folder, seed=5, files=12, claims_per_file=10)


def _sort(folder: Path, _: Path) -> None:
    write_records(folder, seed=3, size_bytes=16 * 1024 * 1024)


def _transform(folder: Path, shared: Path) -> None:
    shutil.copy(shared / "transform" / "taxis.csv", folder)


def _media(folder: Path, shared: Path) -> None:
    shutil.copy(shared / "media" / "bigbuckbunny.mp4", folder)


FILL: dict[str, Callable[[Path, Path], None]] = {
    "claims": _claims,
    "sort": _sort,
    "transform": _transform,
    "media": _media,
}


def batchlab(*arguments: object) -> str:
    """What a command of ours says on stderr; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "batchlab", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert not done.returncode, (arguments, done.stdout[-2000:], done.stderr[-2000:])
    return done.stderr


def content(path: Path) -> object:
    """What a result file holds, however it is packed."""
    if path.suffix == ".mp4":
        decoded = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "framemd5", "-"]
        return subprocess.run(decoded, capture_output=True, check=True).stdout
    if path.suffix == ".parquet":
        with duckdb.connect() as db:
            return db.execute(f"SELECT * FROM read_parquet('{path}')").fetchall()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _OURS
    }


@pytest.mark.usefixtures("ffmpeg")
def test_the_examples_come_to_the_same_everywhere(tmp_path: Path, shared_data: Path) -> None:
    need_containers(tmp_path)
    homes = {name: tmp_path / "homes" / name for name in BACKENDS}
    batchlab("grid", "up", "--backend", "localstack", "--home", homes["localstack"])
    try:
        for name, fill in FILL.items():
            job = tmp_path / name
            shutil.copytree(EXAMPLES / name, job, ignore=shutil.ignore_patterns("data"))
            (job / "data").mkdir()
            fill(job / "data", shared_data)
            found = {}
            for backend in BACKENDS:
                out = tmp_path / "out" / backend / name
                batchlab(
                    *("run", job / "job.yaml", "--backend", backend),
                    *("--home", homes[backend], "--out", out),
                )
                found[backend] = contents(out)
            assert any(path.endswith(".jsonl") for path in found["local"])
            assert found["sim"] == found["local"]
            assert found["localstack"] == found["local"]
    finally:
        batchlab("grid", "down", "--home", homes["localstack"])
