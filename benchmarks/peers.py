"""Comparison of batchlab with every peer that this machine can run, and the comparison's table in the documentation.

    python benchmarks/peers.py --harness FOLDER --install [--docs]
    python benchmarks/peers.py --harness FOLDER --small --peers batchlab_local,dask,ray

A peer is another scheduler. The harness is outside of this repository (see `harness.py`). With --install, uv installs
the missing peers in their own virtual environments (--venvs). `run.py` runs the harness for all peers. Each round of
the harness measures every peer once, so a slow phase of the machine affects all peers. If a peer needs a program that
is missing, the benchmark names and skips the peer. Each figure of the table is the median of all rounds. With --docs,
the new table replaces the old table in `docs/benchmarks.md`. A round of all peers takes about 20 minutes on an idle
machine. The option --small runs one round with a tenth of the work, as a check without reliable figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"

PACKAGES: Mapping[str, Sequence[str]] = {
    "main": ("celery[redis,sqs]", "dramatiq[redis]", "rq", "dask[distributed]"),
    "ray": ("ray",),
    "parsl": ("parsl",),
}
"""Packages of the peers, by virtual environment of the harness.

Ray and Parsl cannot share an environment with other peers.
"""

OURS = {"batchlab_local": "batchlab, `local`", "batchlab_ministack": "batchlab, `ministack`"}
PEERS: Mapping[str, tuple[str, str, str]] = {
    "ppe1": ("ProcessPoolExecutor", "", ""),
    "dask": ("Dask distributed", "main", ""),
    "ray": ("Ray", "ray", ""),
    "parsl": ("Parsl HTEX", "parsl", ""),
    "celery_redis": ("Celery + Redis", "main", "redis-server"),
    "celery_sqs": ("Celery + SQS", "main", "redis-server"),
    "dramatiq": ("Dramatiq + Redis", "main", "redis-server"),
    "rq_simple": ("RQ (SimpleWorker)", "main", "redis-server"),
    "parallel": ("GNU parallel", "", "parallel"),
}
"""Title, virtual environment, and required program of each peer."""


def present(peers: Iterable[str], venvs: Path) -> list[str]:
    """Return the peers that can run on this machine. For each other peer, print what the peer lacks."""
    found: list[str] = []
    for peer in peers:
        _, venv, program = PEERS.get(peer, ("", "", ""))
        if venv and not (venvs / f"v_{venv}" / "bin" / "python").exists():
            print(f"{peer} is left out: it is not installed; --install does that.")
        elif program and not shutil.which(program):
            print(f"{peer} is left out: it needs {program}, which this machine does not have.")
        else:
            found.append(peer)
    return found


def install(venvs: Path) -> None:
    """Create the missing virtual environments of the peers."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("Peers are installed with uv, which is not here; install it, or name --venvs.")
    for name, packages in PACKAGES.items():
        venv = venvs / f"v_{name}"
        python = venv / "bin" / "python"
        if not python.exists():
            subprocess.run([uv, "venv", "-q", "-p", sys.executable, str(venv)], check=True)
            command = [uv, "pip", "install", "-q", "--compile-bytecode", "-p", str(python)]
            subprocess.run([*command, *packages], check=True)


def versions(venvs: Path) -> str:
    """Return the installed versions of the peers, for the caption of the table."""
    told: list[str] = []
    for name, packages in PACKAGES.items():
        python = venvs / f"v_{name}" / "bin" / "python"
        if python.exists():
            names = [package.partition("[")[0] for package in packages]
            code = f"import importlib.metadata as m; print(*map(m.version, {names!r}))"
            run = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
            told += [f"{n} {v}" for n, v in zip(names, run.stdout.split(), strict=True)]
    return ", ".join(told)


def table(runs: Mapping[str, Mapping[str, Mapping[str, Any]]], peers: Sequence[str]) -> str:
    """Return the table of figures in Markdown, with one row for each peer."""
    head = "| | W1 | W2 | W3 | W4 | W5 median / p99 | W6 | W7 | W7N |"
    lines = [head, f"| --- |{' ---: |' * 8}"]
    for peer in peers:
        title = OURS.get(peer) or PEERS[peer][0]
        found = {name: one["median"] for name, one in runs.get(peer, {}).items()}
        cells = [_cell(name, found.get(name, {})) for name in ("W1", "W2", "W3", "W4", "W5")]
        cells += [_cell(name, found.get(name, {})) for name in ("W6", "W7", "W7N")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(workload: str, figures: Mapping[str, Any]) -> str:
    try:
        match workload:
            case "W1" | "W4":
                return f"{figures['per_s']:,.0f}/s"
            case "W2" | "W3":
                return f"{figures['efficiency']:.1%}"
            case "W5":
                return f"{figures['median_ms']:.1f} / {figures['p99_ms']:.0f} ms"
            case "W6":
                return f"{figures['first_s']:.2f} s"
        lost, twice = figures["lost"], figures["completed_twice"]
        took = f"{figures['wall_s']:.1f} s" if not lost else "–"
        return f"{took}, {lost:.0f} lost, {twice:.0f} twice"
    except KeyError:
        return "–"


def write(text: str, path: Path) -> None:
    """Replace the table between the marks BEGIN and END in the file `path`."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{path} has no marks {BEGIN} and {END} for the table.")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    """Install the peers, run the harness, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", default=",".join((*OURS, *PEERS)), help="comma list")
    parser.add_argument("--workloads", default="all", help="comma list of W1 … W7N, or all")
    harness.add_to(parser)
    parser.add_argument(
        "--venvs",
        type=Path,
        default=Path.home() / ".cache" / "batchlab" / "peers",
        help="where the peers are installed",
    )
    parser.add_argument("--install", action="store_true", help="install the peers first")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--small", action="store_true", help="a check, not a measurement")
    parser.add_argument("--docs", action="store_true", help="write the table to the docs")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "peers.json")
    options = parser.parse_args()
    unknown = set(options.peers.split(",")) - {*OURS, *PEERS}
    if unknown:
        sys.exit(f"No such peer: {', '.join(sorted(unknown))}; there are {', '.join((*OURS, *PEERS))}.")
    harness.there(options.harness)
    options.venvs.mkdir(parents=True, exist_ok=True)
    if options.install:
        install(options.venvs)
    peers = present(options.peers.split(","), options.venvs)
    command = [sys.executable, str(HERE / "run.py"), "--harness", str(options.harness)]
    command += ["--venvs", str(options.venvs), "--peers", ",".join(peers)]
    command += ["--workloads", options.workloads, "--json", str(options.json)]
    if options.small:
        command += ["--repeat", "1", "--scale", "0.1", "--attempts", "1", "--patience", "1"]
    else:
        command += ["--repeat", str(options.repeat)]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
    told = table(json.loads(options.json.read_text())["runs"], peers)
    told += f"\nVersions: {versions(options.venvs)}.\n"
    print(f"\n{told}")
    if options.docs:
        write(told, DOCS)


if __name__ == "__main__":
    main()
