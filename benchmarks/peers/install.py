"""Virtual environments of the peers, with pinned packages."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.peers import services
from benchmarks.peers.registry import PACKAGES, PEERS

DEFAULT = Path.home() / ".cache" / "batchlab" / "peers"


def python(venvs: Path, name: str) -> Path:
    """Return the Python of a virtual environment. An empty name stands for the environment of this process."""
    return venvs / name / "bin" / "python" if name else Path(sys.executable)


def _marker(venvs: Path, name: str) -> Path:
    return venvs / name / "packages.txt"


def is_complete(venvs: Path, name: str) -> bool:
    """Return whether the virtual environment has exactly the pinned packages of this version of the benchmark."""
    marker = _marker(venvs, name)
    return not name or (marker.exists() and marker.read_text().split() == list(PACKAGES[name]))


def install(peers: Iterable[str], venvs: Path) -> None:
    """Create the missing virtual environments of `peers`."""
    for name in sorted({PEERS[peer].venv for peer in peers} - {""}):
        if not is_complete(venvs, name):
            print(f"Installing {', '.join(PACKAGES[name])} in {venvs / name}", flush=True)
            venv.create(venvs / name, clear=True, with_pip=True)
            command = [str(python(venvs, name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*command, *PACKAGES[name]], check=True)
            _marker(venvs, name).write_text("\n".join(PACKAGES[name]) + "\n")


def present(peers: Iterable[str], venvs: Path) -> list[str]:
    """Return the peers that can run on this machine. For each other peer, print what the peer lacks."""
    found = []
    for name in peers:
        peer = PEERS[name]
        lacks = [lack for one in (peer.program, *peer.services) if (lack := services.lacking(one))]
        if not is_complete(venvs, peer.venv):
            lacks.append("its packages: run `python -m benchmarks.peers install`")
        if lacks:
            print(f"{name} is skipped, because this machine lacks {' and '.join(lacks)}.", flush=True)
        else:
            found.append(name)
    return found
