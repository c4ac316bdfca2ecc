"""`scenario simulate`: a scenario in virtual time, and the verdict on what would happen.

Invariant: exit code 0 says that no expectation was missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import CalibrationOption, JsonOption, LikeOption, ScenarioArgument
from batchlab.cli.signals import Stopped

if TYPE_CHECKING:
    from batchlab.forecast.simulate import Progress as Seen
    from batchlab.scenario.model import Calibration
    from batchlab.scenario.record import Record
    from batchlab.scenario.verdict import Row

SOMETIMES_S = 10.0
"""Where stderr is no terminal, progress is told so often."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(simulate)


def simulate(
    scenario: ScenarioArgument,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="Draw everything from this seed in place of the scenario's.",
            show_default=False,
        ),
    ] = None,
    compress: Annotated[
        float,
        typer.Option(
            "--compress", metavar="K", help="Divide all times by K first, as a replay does."
        ),
    ] = 1.0,
    like: LikeOption = "aws",
    calibration: CalibrationOption = None,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", metavar="FILE", help="Write the whole event log.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the record, for `scenario compare` and for programs.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run a scenario and its faults on the simulated grid, in virtual time, and judge it. The same
    scenario and seed give the same result. Exit code 1 where an expectation was missed.

    \b
    Example: batchlab scenario simulate claims-month-end --seed 7
    """
    from batchlab import backends
    from batchlab.forecast.simulate import simulate as run
    from batchlab.scenario import loader, record, verdict
    from batchlab.scenario.expand import compressed
    from batchlab.sim.actors import let_the_dead_rest

    found = compressed(loader.load(loader.find(scenario)), compress)
    backend = backends.load(like)
    measured = calibrated(calibration, backend.name, found.compressed)
    for file in (log, out):
        if file:
            output.check_writable(file)
    lines: list[str] | None = [] if log else None
    try:
        with _watched() as progress:
            made = run(
                found, seed=seed, like=backend, calibration=measured, log=lines, progress=progress
            )
    except Stopped:
        let_the_dead_rest()
        output.say("Stopped: a forecast that is not finished says nothing, and nothing is kept.")
        raise
    if log and lines is not None:
        log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if out:
        record.write(made, out)
    rows = verdict.judge(made, found.expect)
    if json:
        output.show_json(_facts(made, rows))
    else:
        output.show(_text(made, rows))
    if verdict.is_red(rows):
        raise typer.Exit(1)


def calibrated(file: Path | None, backend: str, compressed: float) -> Calibration | None:
    """The numbers in the file, where there is one, and a word to whom they may not fit; UsageError
    where they are another backend's."""
    from batchlab.forecast import calibrate

    if file is None:
        return None
    found = calibrate.read(file)
    if note := calibrate.fitting(found, backend, compressed):
        output.say(f"Note: {note}.")
    return found


def _facts(made: Record, rows: list[Row]) -> dict[str, object]:
    from batchlab.scenario import verdict

    return {
        "scenario": made.scenario,
        "seed": made.seed,
        "like": made.backend,
        "compressed": made.compressed,
        "red": verdict.is_red(rows),
        "verdict": [row.to_json() for row in rows],
        "measures": _measures(made),
        "faults": [
            {
                "fault": one.name,
                "at_s": one.at_s,
                "targets": list(one.targets),
                "evidence": one.evidence,
                "impossible": one.impossible,
            }
            for one in made.faults
        ],
        "jobs": len(made.jobs),
        "tasks": sum(job.planned for job in made.jobs),
        "cut": made.cut,
        "usd_items": dict(made.usd_items),
        "log_digest": made.log_digest,
        "wall_s": made.wall_s,
    }


def _measures(made: Record) -> dict[str, float | None]:
    """All measures of the whole run; None where the record does not say one, or it has no end."""
    from math import isinf

    from batchlab.scenario.measures import MEASURES, Unknown

    found: dict[str, float | None] = {}
    for name, measure in MEASURES.items():
        value = measure.of(made, "")
        found[name] = None if isinstance(value, Unknown) or isinf(value) else value
    return found


def _text(made: Record, rows: list[Row]) -> str:
    from batchlab.cli import verdicts
    from batchlab.scenario.measures import MEASURES, Unknown

    tasks = sum(job.planned for job in made.jobs)
    head = (
        f"{made.scenario}, seed {made.seed}, as on {made.backend}: "
        f"{output.count(len(made.jobs), 'job')}, {output.count(tasks, 'task')}, simulated in "
        f"{output.span(made.wall_s)}"
    )
    measured = [
        (name, verdicts.number(value, measure.unit), measure.meaning)
        for name, measure in MEASURES.items()
        if not isinstance(value := measure.of(made, ""), Unknown)
    ]
    parts = [head, output.table(("measure", "all jobs", "meaning"), measured)]
    if made.faults:
        told = [
            (one.name, output.span(one.at_s), one.evidence or f"impossible: {one.impossible}")
            for one in made.faults
        ]
        parts.append(output.table(("fault", "at", "what was seen of it"), told))
    parts.append(verdicts.text(rows))
    return "\n\n".join(parts)


@contextmanager
def _watched() -> Iterator[Callable[[Seen], None]]:
    """A bar of jobs where stderr is a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        sometimes = output.Sometimes(SOMETIMES_S)
        yield lambda seen: sometimes.say(
            f"{output.span(seen.at_s)}: {seen.ended:,} of {output.count(seen.jobs, 'job')} ended"
        )
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.completed:,}/{task.total:,} jobs"),
        BarColumn(),
        TextColumn("{task.fields[at]} simulated"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, at="0 s")
        shown_s = 0.0

        def show(seen: Seen) -> None:
            nonlocal shown_s
            now_s = time.monotonic()
            if now_s - shown_s >= 0.1:
                shown_s = now_s
                bar.update(task, total=seen.jobs, completed=seen.ended, at=output.span(seen.at_s))

        yield show
