"""Rounds of measurements.

Each measurement is one driver process with one peer. The rounds are the outer loop, so a slow phase of the machine
affects all peers.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import processes, report, services, workloads
from benchmarks.peers.config import ROOT, VARIABLE, Config
from benchmarks.peers.install import python
from benchmarks.peers.registry import PEERS

Figures = Mapping[str, Any]
Runs = dict[str, dict[str, list[Figures]]]
"""Figures of each round, by peer and workload."""


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    peers: Sequence[str]
    workloads: Sequence[str]
    venvs: Path
    scratch: Path
    repeat: int = 3
    workers: int = 2
    scale: float = 1.0
    bundle: int = 0
    reliable: bool = False
    quiet: float = 0.25
    patience: float = 60.0
    noise: float = 0.2
    attempts: int = 3
    limit: float = 900.0
    keep: bool = False


def groups(names: Sequence[str]) -> Iterator[list[str]]:
    """Return the groups of workloads that share a grid."""
    if shared := [name for name in names if name in workloads.SHARED_GRID]:
        yield shared
    yield from ([name] for name in names if name in workloads.OWN_GRID)


def run(options: Options) -> Iterator[Runs]:
    """Measure all peers and workloads, and yield all figures after each peer. Print each new figure."""
    options.scratch.mkdir(parents=True, exist_ok=True)
    if "W4" in options.workloads:
        workloads.make_claims(options.scratch / "claims")
    needed = {service for peer in options.peers for service in PEERS[peer].services}
    runs: Runs = {}
    with services.running(needed, options.venvs) as started:
        for number in range(options.repeat):
            for peer in options.peers:
                for group in groups([name for name in options.workloads if name not in PEERS[peer].skips]):
                    found = _measure_quietly(options, peer, group, started)
                    for name in group:
                        runs.setdefault(peer, {}).setdefault(name, []).append(found[name])
                        print(f"{number + 1} {peer:<18} {name:<3} {brief(found[name])}", flush=True)
                    if "redis" in PEERS[peer].services:
                        _flush(started["redis"].url)
                yield runs


def _measure_quietly(
    options: Options, peer: str, group: Sequence[str], started: services.Started
) -> Mapping[str, Figures]:
    """Measure one group. Repeat a start (W6) while other programs use the machine."""
    best = measure(options, peer, group, started)
    for _ in range(options.attempts - 1 if group == ["W6"] else 0):
        if best["W6"].get("other_cores", 0.0) <= options.noise:
            break
        again = measure(options, peer, group, started)
        best = min(best, again, key=lambda one: float(one["W6"].get("other_cores", 9.0)))
    return best


def measure(options: Options, peer: str, group: Sequence[str], started: services.Started) -> dict[str, Figures]:
    """Run one driver process, and return its figures by workload."""
    work = Path(tempfile.mkdtemp(prefix="measurement-", dir=options.scratch))
    (work / "claims").symlink_to(options.scratch / "claims")
    described = PEERS[peer]
    kills = group[0] in workloads.KILLS
    config = Config(
        peer=peer,
        workloads=group,
        work=str(work),
        run_id=secrets.token_hex(4),
        options=described.options,
        urls={name: started[name].url for name in described.services},
        pids={name: started[name].pid for name in described.services},
        workers=options.workers,
        nodes=options.workers if group[0] == "W7N" else 1,
        reliable=options.reliable or kills,
        scale=options.scale,
        slow=described.slow,
        bundle=options.bundle,
        quiet=options.quiet,
        patience=options.patience,
        noise=options.noise,
        attempts=1 if kills else options.attempts,
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHON"))}
    environment |= {VARIABLE: str(config.path), "PYTHONPATH": str(ROOT)}
    environment |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    log = work / "driver.log"
    with log.open("wb") as output:
        if group == ["W6"]:
            processes.wait_until_quiet(config.pids, options.quiet, options.patience, str(config.path))
        replace(config, started_s=time.monotonic(), busy_s=processes.machine_cpu_s()).write()
        command = [str(python(options.venvs, described.venv)), "-m", "benchmarks.peers.driver"]
        process: subprocess.Popen[bytes] | None = None
        try:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=work
            )
            process.wait(options.limit)
        except subprocess.TimeoutExpired:
            print(f"The driver of {peer} did not end within {options.limit} s.", flush=True)
        finally:
            # A signal may interrupt the start of the driver, which then runs without being stored in `process`.
            processes.stop([process] if process else [])
            # A peer may leave processes behind, which have the configuration or work in its folder.
            processes.kill({*processes.marked(str(config.path)), *processes.working_in(work)})
    figures = work / "figures.json"
    if figures.exists():
        found: dict[str, Figures] = json.loads(figures.read_text())
    else:
        error = f"The driver failed: {log.read_text(errors='replace')[-1500:]}"
        found = {name: {"error": error} for name in group}
    if not options.keep:
        shutil.rmtree(work, ignore_errors=True)
    return found


def _flush(url: str) -> None:
    """Remove all data of Redis."""
    host, _, port = url.removeprefix("redis://").partition("/")[0].partition(":")
    with socket.create_connection((host, int(port)), 5) as client:
        client.sendall(b"FLUSHALL\r\n")
        client.recv(100)


def brief(figures: Figures) -> str:
    """Return the figures of one measurement in one line."""
    shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    shown.pop("cpu_s", None)
    return " ".join(f"{name}={value}" for name, value in shown.items())


def document(runs: Runs, options: Options, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the results file: the rounds of each peer and workload, after the rounds of an earlier file `before`."""
    suffix = (f" b{options.bundle}" if options.bundle else "") + (" late" if options.reliable else "")
    merged: dict[str, Any] = json.loads(json.dumps(before["runs"])) if before else {}
    for peer, measured in runs.items():
        of_peer = merged.setdefault(peer + suffix, {})
        for name, rounds in measured.items():
            earlier = of_peer.get(name, {}).get("runs", [])
            of_peer[name] = {"median": report.medians([*earlier, *rounds]), "runs": [*earlier, *rounds]}
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
    return {"machine": machine, "scale": options.scale, "runs": merged}
