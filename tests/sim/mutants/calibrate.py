"""Search for a seed that shows each planted bug, for CI to try first, and write the table of the docs.

    python -m tests.sim.mutants.calibrate [--afresh] [WORD…]

The seed that shows a mutant depends on every draw of the simulator. Run this program again after a change of the
simulator. WORDs select mutants whose names contain one of the words. Without --afresh, a seed that still shows
its mutant is kept. The search begins with the smallest worlds, because CI runs the found seed often. The exit code is
1 if no seed shows a mutant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from batchlab.sim.fuzz import WEATHERS
from batchlab.sim.plans import LIMIT_S, Plan
from batchlab.sim.trial import plan_of
from tests.sim.mutants import MUTANTS
from tests.sim.mutants.kit import ENOUGH, KNOWN, Known, Mutant, hunt, known
from tests.support import ROOT

PAGE = ROOT / "docs" / "contributing" / "planted-bugs.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def rows(found: dict[str, Known]) -> str:
    """Return the table of planted bugs as Markdown."""
    lines = ["| mutant | what is broken | promise | seed |", "| --- | --- | --- | ---: |"]
    for mutant in MUTANTS:
        one = found[mutant.name]
        seed = f"{one.seed}" if mutant.weather == "all" else f"{one.seed} {mutant.weather}"
        lines.append(f"| {mutant.name} | {mutant.broken} | {one.promise} | {seed} |")
    return "\n".join(lines)


def table_in(page: str) -> str:
    """Return the table in the text of the page."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def _smallest_first(mutant: Mutant) -> list[int]:
    weather = WEATHERS[mutant.weather]
    return sorted(range(ENOUGH), key=lambda seed: _size(plan_of(seed, weather)))


def _size(plan: Plan) -> tuple[bool, int]:
    """Return whether the world lasts long, and the number of its tasks."""
    return plan.limit_s > LIMIT_S, sum((job.items or 0) * len(job.stages) for job in plan.jobs)


def _calibrated(mutant: Mutant, before: Known | None) -> Known | None:
    kept = [] if before is None else [before.seed]
    for seeds in (kept, _smallest_first(mutant)):
        found = hunt(mutant, seeds)
        if found.caught:
            return Known(found.caught.seed, found.caught.promise)
        for other in found.others[:3]:
            print(f"  {mutant.name}, seed {other.seed}: {other.text}", flush=True)
    return None


def main(arguments: Sequence[str]) -> int:
    words = [word for word in arguments if word != "--afresh"]
    found, missed = known(), 0
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        one = _calibrated(mutant, None if "--afresh" in arguments else found.get(mutant.name))
        print(f"{mutant.name}: {f'seed {one.seed}, {one.promise}' if one else 'NONE'}", flush=True)
        if one is None:
            missed += 1
            continue
        found[mutant.name] = one
        # The results are written after each mutant, so that an interrupted search is not lost.
        kept = {m.name: asdict(found[m.name]) for m in MUTANTS if m.name in found}
        KNOWN.write_text(json.dumps(kept, indent=1) + "\n")
    if len(known()) == len(MUTANTS):
        page = PAGE.read_text()
        PAGE.write_text(page.replace(table_in(page), rows(known())))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
