"""Check for slower releases: ratios of batchlab's figures to a process pool's figures, compared with recorded ratios.

    python benchmarks/gate.py [--small] [--record]

The gate runs the benchmark of peers (see `peers`) for batchlab's backends and for the standard library's process pool.
The gate compares ratios of batchlab's figures to the pool's figures, because batchlab and the pool run on the same
machine. A figure that is a share of an ideal value is compared without a ratio. The gate compares the figures with
`recorded.json`, which `--record` writes. The gate reports a workload that became slower by more than its noise, but
does not fail.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded.json"
BACKENDS = ("batchlab_local", "batchlab_ministack")
POOL = "ppe1"
Figures = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """Figure of one workload. `of` computes the figure from batchlab's results and the process pool's results."""

    what: str
    more_is_better: bool
    of: Callable[[Figures, Figures], float]
    noise: float = 0.15
    """Relative difference between two measurements of the same code on an otherwise idle machine."""


MEASURES: Mapping[str, Measure] = {
    "W1": Measure("no-ops a second, per pool's", True, lambda b, p: b["per_s"] / p["per_s"]),
    "W2": Measure("share of the CPU limit", True, lambda b, _: float(b["efficiency"])),
    "W3": Measure("share of the ideal", True, lambda b, _: float(b["efficiency"])),
    "W4": Measure("files a second, per pool's", True, lambda b, p: b["per_s"] / p["per_s"]),
    "W5": Measure("latency, pools'", False, lambda b, p: b["median_ms"] / p["median_ms"], 0.35),
    "W6": Measure("start to first result, pools'", False, lambda b, p: b["wall_s"] / p["wall_s"]),
}
SMALL = ("W1", "W5", "W6")
SMALL_BACKENDS = ("batchlab_local",)


def measured(backends: tuple[str, ...], workloads: tuple[str, ...], repeat: int) -> dict[str, dict[str, float]]:
    """Run the benchmark of peers once. Return the figures of the run by backend and workload."""
    with tempfile.TemporaryDirectory(prefix="batchlab-gate-") as scratch:
        results = Path(scratch) / "results.json"
        command = [sys.executable, "-m", "benchmarks.peers", "run", "--peers", ",".join((POOL, *backends))]
        command += ["--workloads", ",".join(workloads), "--repeat", str(repeat)]
        command += ["--attempts", "1", "--patience", "5", "--json", str(results)]
        if code := subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            sys.exit(code)
        runs = json.loads(results.read_text())["runs"]
    pool = runs[POOL]
    return {
        backend: {
            name: round(MEASURES[name].of(runs[backend][name]["median"], pool[name]["median"]), 4) for name in workloads
        }
        for backend in backends
    }


def change(name: str, now: float, before: float | None) -> str:
    """Return a text that compares the figure `now` with the recorded figure `before`."""
    if before is None:
        return "not on record"
    measure = MEASURES[name]
    gained = now / before if measure.more_is_better else before / now
    if gained < 1 - measure.noise:
        return f"SLOWER by {1 - gained:.0%}"
    return f"faster by {gained - 1:.0%}" if gained > 1 + measure.noise else "as before"


def main() -> None:
    """Run the benchmark of peers, and print the comparison with the recorded figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="three workloads on one backend, once")
    parser.add_argument("--record", action="store_true", help="put the ratios on record")
    options = parser.parse_args()
    now = measured(SMALL_BACKENDS, SMALL, 1) if options.small else measured(BACKENDS, tuple(MEASURES), 3)
    before = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    print(f"\n{'backend':<20}{'workload':<10}{'now':>10}{'recorded':>10}  change")
    for backend, figures in now.items():
        for name, figure in figures.items():
            known = before.get(backend, {}).get(name)
            told = f"{known:>10.3f}" if known is not None else f"{'-':>10}"
            row = f"{backend:<20}{name:<10}{figure:>10.3f}{told}  {change(name, figure, known)}"
            print(f"{row} ({MEASURES[name].what})")
    if options.record:
        RECORDED.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
