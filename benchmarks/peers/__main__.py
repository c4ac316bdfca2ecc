"""Command line of the benchmark of peers.

    python -m benchmarks.peers install
    python -m benchmarks.peers run --peers batchlab_local,dask,ray --workloads W1,W5
    python -m benchmarks.peers run --docs
    python -m benchmarks.peers table benchmarks/results/peers.json
    python -m benchmarks.peers ceilings

`install` creates the virtual environments of the peers. `run` measures the peers and prints the tables. With `--docs`,
the tables replace the tables in `docs/contributing/benchmarks.md`. `table` prints the tables of an earlier run.
`ceilings` measures the request rates of MiniStack.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.peers import install, report, rounds, workloads
from benchmarks.peers.config import ROOT
from benchmarks.peers.registry import PEERS

DOCS = ROOT / "docs" / "contributing" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"


def _names(known: Collection[str], default: Collection[str]) -> dict[str, object]:
    """Return the parser's settings of an option with a comma-separated list of names."""

    def parse(text: str) -> list[str]:
        names = list(default) if text == "default" else list(known) if text == "all" else text.split(",")
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return {"type": parse, "default": "default", "metavar": "NAMES", "help": f"comma list of {', '.join(known)}"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    install_ = commands.add_parser("install", help="install the peers")
    run = commands.add_parser("run", help="measure the peers, and print the tables")
    table = commands.add_parser("table", help="print the tables of an earlier run")
    table.add_argument("json", type=Path, nargs="?", default=RESULTS, help="results file")
    ceilings = commands.add_parser("ceilings", help="measure the request rates of MiniStack")
    ceilings.add_argument("--count", type=int, default=800, help="requests of each measurement")
    for one in (install_, run):
        one.add_argument("--peers", **_names(PEERS, [name for name, peer in PEERS.items() if peer.is_default]))  # type: ignore[arg-type]
        one.add_argument("--venvs", type=Path, default=install.DEFAULT, help="folder of the virtual environments")
    run.add_argument("--workloads", **_names(workloads.ALL, workloads.ALL))  # type: ignore[arg-type]
    run.add_argument("--json", type=Path, default=RESULTS, help="results file")
    run.add_argument("--append", action="store_true", help="add the rounds to the rounds of the results file")
    run.add_argument("--docs", action="store_true", help="write the tables to docs/contributing/benchmarks.md")
    run.add_argument("--small", action="store_true", help="one round with a tenth of the work, as a check")
    run.add_argument("--repeat", type=int, default=3, help="rounds")
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--scale", type=float, default=1.0, help="share of the tasks")
    run.add_argument("--bundle", type=int, default=0, help="put this number of calls into one task of the peer")
    run.add_argument("--reliable", action="store_true", help="use the settings of W7 in all workloads")
    run.add_argument("--quiet", type=float, default=0.25, help="start when other programs use fewer cores")
    run.add_argument("--patience", type=float, default=60.0, help="wait for that at most this time, in seconds")
    run.add_argument("--noise", type=float, default=0.2, help="repeat if other programs used more cores")
    run.add_argument("--attempts", type=int, default=3, help="largest number of such measurements; the quietest counts")
    run.add_argument("--limit", type=float, default=900.0, help="time limit of a driver process, in seconds")
    run.add_argument("--scratch", type=Path, help="folder of the measurements; by default a temporary one")
    run.add_argument("--keep", action="store_true", help="keep the files of the measurements")
    return parser


def _run(options: argparse.Namespace) -> None:
    given = vars(options)
    if options.small:
        given |= {"repeat": 1, "scale": 0.1, "attempts": 1, "patience": 1.0}
    peers = install.present(options.peers, options.venvs)
    if not peers:
        sys.exit("None of the peers can run on this machine.")
    document: dict[str, Any] = {}
    before = json.loads(options.json.read_text()) if options.append and options.json.exists() else None
    with tempfile.TemporaryDirectory(prefix="batchlab-peers-") as temporary:
        given |= {"peers": peers, "scratch": (options.scratch or Path(temporary)).resolve()}
        chosen = rounds.Options(**{name: given[name] for name in rounds.Options.__dataclass_fields__})
        options.json.parent.mkdir(parents=True, exist_ok=True)
        for runs in rounds.run(chosen):
            document = rounds.document(runs, chosen, before)
            options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    tables = report.tables(document)
    print(f"\n{tables}")
    if options.docs:
        report.write(tables, DOCS)


def main() -> None:
    """Run the command of the command line."""
    # Without this handler, SIGTERM would leave the services behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = _parser().parse_args()
    match options.command:
        case "install":
            install.install(options.peers, options.venvs)
        case "run":
            _run(options)
        case "table":
            print(report.tables(json.loads(options.json.read_text())))
        case "ceilings":
            from benchmarks.peers import ceilings

            print(ceilings.report(install.DEFAULT, options.count))


if __name__ == "__main__":
    main()
