"""Gate against slower releases: ratios of batchlab to a process pool, compared with recorded ratios.

    python benchmarks/gate.py --harness FOLDER [--small] [--record]

The gate runs the harness, which is outside of this repository (`harness.py`), for batchlab's backends
and, in the same run, for the standard library's process pool. The ratio of the two counts, since both
run on the same machine. A figure that is a share of an ideal counts as it is. The gate compares the
ratios with `recorded.json`, which `--record` writes. It reports workloads that became slower by more
than their noise, and does not fail for them.
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

import harness

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded.json"
BACKENDS = ("batchlab_local", "batchlab_ministack")
POOL = "ppe1"
Figures = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """Figure of one workload. `of` computes it from the figures of batchlab and of the pool."""

    what: str
    more_is_better: bool
    of: Callable[[Figures, Figures], float]
    noise: float = 0.15
    """The same code measured twice differs by so much on a machine that does nothing else."""


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


def measured(
    folder: Path, backends: tuple[str, ...], workloads: tuple[str, ...], repeat: int
) -> dict[str, dict[str, float]]:
    """Return the ratios by backend and workload of one run of the harness in `folder`."""
    with tempfile.TemporaryDirectory(prefix="batchlab-gate-") as scratch:
        results = Path(scratch) / "results.json"
        command = [sys.executable, str(HERE / "run.py"), "--harness", str(folder)]
        command += ["--peers", ",".join((POOL, *backends))]
        command += ["--workloads", ",".join(workloads), "--repeat", str(repeat)]
        command += ["--attempts", "1", "--patience", "5", "--json", str(results)]
        if code := subprocess.run(command, check=False).returncode:
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
    """Describe how `now` compares with the recorded ratio."""
    if before is None:
        return "not on record"
    measure = MEASURES[name]
    gained = now / before if measure.more_is_better else before / now
    if gained < 1 - measure.noise:
        return f"SLOWER by {1 - gained:.0%}"
    return f"faster by {gained - 1:.0%}" if gained > 1 + measure.noise else "as before"


def main() -> None:
    """Measure, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    harness.add_to(parser)
    parser.add_argument("--small", action="store_true", help="three workloads on one backend, once")
    parser.add_argument("--record", action="store_true", help="put the ratios on record")
    options = parser.parse_args()
    folder = harness.there(options.harness)
    if options.small:
        now = measured(folder, SMALL_BACKENDS, SMALL, 1)
    else:
        now = measured(folder, BACKENDS, tuple(MEASURES), 3)
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
