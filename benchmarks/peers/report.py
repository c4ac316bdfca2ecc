"""Medians of the rounds, and the tables of the results in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.registry import PEERS

Figures = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Content of `runs` in a results file: medians and rounds by peer and workload."""

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
NONE = "–"
_COUNTED = 3
"""Number of rounds that count: the ones with the least other load."""


def medians(rounds: Sequence[Figures]) -> dict[str, Any]:
    """Return the median of each figure over the rounds without an error, of which the quietest ones count."""
    right = sorted((one for one in rounds if "error" not in one), key=lambda one: float(one.get("other_cores", 0.0)))
    right = right[:_COUNTED]
    found: dict[str, Any] = {"rounds": len(right)}
    if errors := [one["error"] for one in rounds if "error" in one]:
        found["errors"] = errors
    for name, value in right[0].items() if right else ():
        values = [one[name] for one in right]
        if isinstance(value, Mapping):
            found[name] = {key: statistics.median(one[key] for one in values) for key in value}
        elif isinstance(value, list):
            found[name] = sorted({item for one in values for item in one})
        else:
            found[name] = statistics.median(values)
    return found


def _failure(figures: Figures) -> str:
    took = f"{figures['wall_s']:.1f} s" if not figures["lost"] else NONE
    return f"{took}, {figures['lost']:.0f} lost, {figures['completed_twice']:.0f} twice"


COLUMNS: Mapping[str, tuple[str, Callable[[Figures], str]]] = {
    "W1": ("W1", lambda f: f"{f['per_s']:,.0f}/s"),
    "W2": ("W2", lambda f: f"{f['efficiency']:.1%}"),
    "W3": ("W3", lambda f: f"{f['efficiency']:.1%}"),
    "W4": ("W4", lambda f: f"{f['per_s']:,.0f}/s"),
    "W5": ("W5 median / p99", lambda f: f"{f['median_ms']:.1f} / {f['p99_ms']:.0f} ms"),
    "W6": ("W6", lambda f: f"{f['first_s']:.2f} s"),
    "W7": ("W7", _failure),
    "W7N": ("W7N", _failure),
}
"""Title and text of each workload's column."""


def title(name: str) -> str:
    """Return the title of a peer's row. The name may have the suffixes of other settings."""
    base, *suffixes = name.split(" ")
    told = [f"bundles of {one[1:]} by hand" if one[0] == "b" else "at-least-once settings" for one in suffixes]
    return ", ".join((PEERS[base].title, *told))


def ordered(results: Results) -> list[str]:
    """Return the names of the rows in the order of the registry, with the rows of other settings behind the others."""
    return sorted(results, key=lambda name: (" " in name, list(PEERS).index(name.split(" ")[0]), name))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with numbers in all columns except the first."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figures_table(results: Results) -> str:
    """Return the table with one row for each peer, and one column for each workload."""
    rows = []
    for name in ordered(results):
        cells = []
        for workload, (_, text) in COLUMNS.items():
            found = results[name].get(workload, {}).get("median", {})
            cells.append(text(found) if found.get("rounds") else "error" if found else NONE)
        rows.append([title(name), *cells])
    return table(["", *(head for head, _ in COLUMNS.values())], rows)


def cpu_table(results: Results) -> str:
    """Return the table of CPU times of a task of W1, by role."""
    rows = []
    for name in ordered(results):
        found = results[name].get("W1", {}).get("median", {})
        if found.get("rounds"):
            cpu_s, tasks = found["cpu_s"], found["tasks"]
            services = [value for role, value in cpu_s.items() if role not in ("total", "driver", "workers")]
            parts = [cpu_s["total"], cpu_s["driver"], cpu_s["workers"]]
            cells = [f"{1000 * part / tasks:.3f}" for part in parts]
            rows.append([title(name), *cells, f"{1000 * sum(services) / tasks:.3f}" if services else NONE])
    return table(["CPU time of a W1 task, ms", "total", "driver", "workers", "services"], rows)


def caption(results: Results, scale: float) -> str:
    """Return the versions of the peers, the rounds, the scale, and the other load during the measurements."""
    names = {name.split(" ")[0] for name in results}
    versions = sorted({version for name in names for version in PEERS[name].versions})
    found = [one["median"] for workloads in results.values() for one in workloads.values() if one["median"]["rounds"]]
    rounds = sorted({one["rounds"] for one in found})
    lines = [f"Versions: {', '.join(versions)}."] if versions else []
    if found:
        lines.append(f"Rounds: {' to '.join(map(str, {rounds[0]: 0, rounds[-1]: 0}))}.")
        loads = sorted(one["other_cores"] for one in found)
        load = f"Other programs used {statistics.median(loads):.1f} cores in the median measurement, and at most"
        lines.append(f"{load} {loads[-1]:.1f} cores.")
    if scale != 1.0:
        lines.append(f"The workloads had {scale:.0%} of their tasks.")
    if slow := sorted(f"{title(name)} {PEERS[name].slow:.0%}" for name in names if PEERS[name].slow < 1.0):
        lines.append(f"Share of the tasks in W1, W2, and W4: {', '.join(slow)}.")
    return " ".join(lines)


def tables(document: Mapping[str, Any]) -> str:
    """Return both tables of a results file, with their caption."""
    results, scale = document["runs"], document["scale"]
    parts = [figures_table(results), caption(results, scale) + "\n", cpu_table(results)]
    return "\n".join(parts)


def write(text: str, path: Path) -> None:
    """Replace the text between the marks BEGIN and END in the file `path`."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path} has no marks {BEGIN} and {END} for the table.")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
