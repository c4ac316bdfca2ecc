"""`batchlab scenario simulate` and `faults`.

Invariant: exit code 0 of `simulate` means that no expectation was missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import options, output
from batchlab.cli.options import CALIBRATION, HOME, JSON, LIKE, SCENARIO, home_of, option
from batchlab.cli.output import Stopped
from batchlab.cli.progress import bar
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.runtime.descriptor import Calibration
    from batchlab.scenarios.forecast.simulate import SimulationProgress as Seen
    from batchlab.scenarios.model.values import Scenario
    from batchlab.scenarios.record import Record
    from batchlab.scenarios.verdicts import VerdictRow

LINE_EVERY_S = 10.0
TASKS_A_S = 500
"""Tasks that one core simulates per second at least.

Measured on the shipped scenarios: 400 to 600 single tasks, and about ten times as many in bundles.
"""
MANY_TASKS = 120 * TASKS_A_S
"""A note is printed before a forecast of so many tasks."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(simulate)
    app.command()(faults)


def simulate(
    scenario: str = SCENARIO,
    seed: int | None = option("Seed instead of the scenario's.", "N", min=0),
    compress: float = option("Divide all times by K, like a replay.", "K", default=1.0),
    like: str = LIKE,
    calibration: Path | None = CALIBRATION,
    home: Path | None = HOME,
    log: Path | None = option("Write the whole event log.", "FILE"),
    out: Path | None = option("Write the record for `scenario compare` and programs.", "FILE"),
    json: bool = JSON,
) -> None:
    """Run a scenario and its faults on the simulated grid, in virtual time, and judge it.

    The same scenario and seed give the same result. The exit code is 1 if an expectation is missed.

    \b
    Example: batchlab scenario simulate claims-month-end --seed 7
    """
    from batchlab.core.pricing import price_book
    from batchlab.runtime import factory
    from batchlab.scenarios import record, verdicts
    from batchlab.scenarios.forecast.simulate import simulate as run
    from batchlab.scenarios.model import loader
    from batchlab.scenarios.model.expansion import compress_scenario
    from batchlab.sim.actors import silence_killed_actors

    found = compress_scenario(loader.load(loader.find(scenario)), compress)
    backend = factory.load(like)
    measured = calibrated(calibration, backend.name, found.compressed)
    book = price_book.load(home_of(home).path)
    for file in (log, out):
        if file:
            output.check_writable(file)
    _note_duration(found, seed)
    lines: list[str] | None = [] if log else None
    try:
        with _progress() as progress:
            made = run(found, seed=seed, like=backend, calibration=measured, log=lines, progress=progress, book=book)
    except Stopped:
        silence_killed_actors()
        output.say("Stopped: an unfinished forecast has no result, so nothing is kept.")
        raise
    if log and lines is not None:
        log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if out:
        record.write(made, out)
    rows = verdicts.judge(made, found.expect)
    if json:
        output.show_json(_facts(made, rows))
    else:
        output.show(_text(made, rows))
        _suggest_plan(scenario, made, rows)
    if verdicts.is_red(rows):
        raise typer.Exit(1)


def calibrated(file: Path | None, backend: str, compressed: float) -> Calibration | None:
    """Read a calibration file, if given; raise UsageError if it is of another backend.

    Print a note if its numbers may not fit.
    """
    from batchlab.scenarios.forecast import calibration as calibrate

    if file is None:
        return None
    calibration = calibrate.read(file)
    if note := calibrate.check_fit(calibration, backend, compressed):
        output.say(f"Note: {note}.")
    return calibration


def _note_duration(scenario: Scenario, seed: int | None) -> None:
    """Print a note before a long simulation, which a mistake in a trace can cause."""
    from batchlab.scenarios.model.expansion import expand, stage_sizes

    jobs = expand(scenario, seed).jobs
    tasks = sum(sum(stage_sizes(job.template, job.tasks).values()) for job in jobs)
    if tasks >= MANY_TASKS:
        output.say(
            f"{output.count(tasks, 'task')} take up to about {output.span(tasks / TASKS_A_S)} "
            "to simulate; Ctrl-C ends it. A trace's from, until and limit take a part of it."
        )


def _suggest_plan(scenario: str, made: Record, rows: list[VerdictRow]) -> None:
    """Suggest `scenario plan` if the fleet was too slow."""
    from batchlab.cli.charts import duration
    from batchlab.scenarios.verdicts import Color

    late = [row for row in rows if row.colour is Color.RED and row.measure in ("makespan", "late")]
    if late:
        # The deadline of a compressed run is compressed, but a plan is for real time.
        most_s = next((row.most for row in rows if row.measure == "makespan" and row.most), None)
        deadline = "TIME" if most_s is None or made.compressed != 1 else duration(most_s)
        output.say(f"`batchlab scenario plan {scenario} --deadline {deadline}` looks for a fleet that is in time.")


def _facts(made: Record, rows: list[VerdictRow]) -> dict[str, object]:
    from batchlab.scenarios import verdicts

    return {
        "scenario": made.scenario,
        "seed": made.seed,
        "like": made.backend,
        "compressed": made.compressed,
        "red": verdicts.is_red(rows),
        "verdict": [row.to_json() for row in rows],
        "measures": _measures(made),
        "faults": [
            {
                "fault": fault.name,
                "at_s": fault.at_s,
                "targets": list(fault.targets),
                "evidence": fault.evidence,
                "impossible": fault.impossible,
            }
            for fault in made.faults
        ],
        "jobs": len(made.jobs),
        "tasks": sum(job.planned for job in made.jobs),
        "cut": made.cut,
        "usd_items": dict(made.usd_items),
        "log_digest": made.log_digest,
        "wall_s": made.wall_s,
    }


def _measures(made: Record) -> dict[str, float | None]:
    """Return all measures of the run. Unknown and infinite values are None."""
    from math import isinf

    from batchlab.scenarios.verdicts import MEASURES, Unknown

    found: dict[str, float | None] = {}
    for name, measure in MEASURES.items():
        value = measure.of(made, "")
        found[name] = None if isinstance(value, Unknown) or isinf(value) else value
    return found


def _text(made: Record, rows: list[VerdictRow]) -> str:
    from batchlab.cli import charts
    from batchlab.scenarios.verdicts import MEASURES, Unknown

    tasks = sum(job.planned for job in made.jobs)
    head = (
        f"{made.scenario}, seed {made.seed}, as on {made.backend}: "
        f"{output.count(len(made.jobs), 'job')}, {output.count(tasks, 'task')}, simulated in "
        f"{output.span(made.wall_s)}"
    )
    measured = [
        (name, charts.number(value, measure.unit), measure.meaning)
        for name, measure in MEASURES.items()
        if not isinstance(value := measure.of(made, ""), Unknown)
    ]
    parts = [head, output.table(("measure", "all jobs", "meaning"), measured)]
    if made.faults:
        told = [
            (fault.name, output.span(fault.at_s), fault.evidence or f"impossible: {fault.impossible}")
            for fault in made.faults
        ]
        parts.append(output.table(("fault", "at", "what was seen of it"), told))
    parts.append(charts.verdict_text(rows))
    return "\n\n".join(parts)


@contextmanager
def _progress() -> Iterator[Callable[[Seen], None]]:
    with bar(LINE_EVERY_S) as show:
        yield lambda seen: show(
            seen.ended, seen.jobs, f"{output.span(seen.at_s)}: {seen.ended:,} of {output.count(seen.jobs, 'job')} ended"
        )


def faults(
    backend: str | None = option("Only this backend.", "NAME", autocompletion=options.backends), json: bool = JSON
) -> None:
    """List the faults of scenarios, and how each backend injects them or why it cannot.

    The simulator has all faults.

    \b
    Example: batchlab scenario faults --backend localstack
    """
    from batchlab.scenarios.faults.fault_injection import BACKENDS, rows
    from batchlab.scenarios.model.values import FaultName

    if backend is not None and backend not in BACKENDS:
        raise UsageError(
            f"Nothing is replayed on a backend {backend!r}.",
            remedy=f"There are {', '.join(BACKENDS)}; the simulator knows every fault.",
        )
    found = list(rows((backend,) if backend else BACKENDS))
    if json:
        output.show_json(
            [
                {
                    "fault": fault.value,
                    "meaning": fault.meaning,
                    "backend": there,
                    "possible": cell.possible,
                    "how": cell.how,
                    "why_not": cell.why_not,
                }
                for fault, there, cell in found
            ]
        )
        return
    if backend:
        table = output.table(
            ("fault", "there", "how, or why not"),
            [(fault.value, "yes" if cell.possible else "no", cell.how or cell.why_not) for fault, _, cell in found],
        )
    else:
        yes = {(fault, there): cell.possible for fault, there, cell in found}
        table = output.table(
            ("fault", *BACKENDS, "what happens"),
            [
                (fault.value, *("yes" if yes[fault, one] else "no" for one in BACKENDS), fault.meaning)
                for fault in FaultName
            ],
        )
    output.show(table)
    if not backend and sys.stdout.isatty():
        output.say("`batchlab scenario faults --backend NAME` says how each is done, or why not.")
