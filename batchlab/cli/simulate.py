"""`scenario simulate`: a scenario in virtual time, and the verdict on what would happen.

Invariant: exit code 0 says that no expectation was missed.

`scenario faults`: what a scenario can break, and how that comes about on each backend.

Forecast against fact for a person: the numbers with their errors, and the curves drawn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import completion, output
from batchlab.cli.charts import AREA, LINE, Chart, number
from batchlab.cli.options import (
    CalibrationOption,
    HomeOption,
    JsonOption,
    LikeOption,
    ScenarioArgument,
    home_of,
)
from batchlab.cli.signals import Stopped
from batchlab.core.errors import UsageError
from batchlab.scenarios.forecast.comparison import Comparison, CurvePair, Difference, sample_curve
from batchlab.scenarios.verdicts import Unit

if TYPE_CHECKING:
    from batchlab.runtime.descriptor import Calibration
    from batchlab.scenarios.forecast.simulate import SimulationProgress as Seen
    from batchlab.scenarios.model.values import Scenario
    from batchlab.scenarios.record import Record
    from batchlab.scenarios.verdicts import VerdictRow

SOMETIMES_S = 10.0
"""Where stderr is no terminal, progress is told so often."""
TASKS_A_S = 500
"""What one core simulates at the least, as measured on the shipped scenarios: 400 to 600 tasks a
second where each travels alone, some ten times as many in bundles."""
MANY_TASKS = 120 * TASKS_A_S
"""From so many on a forecast takes long enough to say so before it begins."""


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
    home: HomeOption = None,
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
    from batchlab.core.pricing import price_book
    from batchlab.runtime import factory
    from batchlab.scenarios import record, verdicts
    from batchlab.scenarios.forecast.simulate import simulate as run
    from batchlab.scenarios.model import loader
    from batchlab.scenarios.model.expansion import compress_scenario
    from batchlab.sim.actors import let_the_dead_rest

    found = compress_scenario(loader.load(loader.find(scenario)), compress)
    backend = factory.load(like)
    measured = calibrated(calibration, backend.name, found.compressed)
    book = price_book.load(home_of(home).path)
    for file in (log, out):
        if file:
            output.check_writable(file)
    _tell_long(found, seed)
    lines: list[str] | None = [] if log else None
    try:
        with _watched() as progress:
            made = run(
                found,
                seed=seed,
                like=backend,
                calibration=measured,
                log=lines,
                progress=progress,
                book=book,
            )
    except Stopped:
        let_the_dead_rest()
        output.say("Stopped: a forecast that is not finished says nothing, and nothing is kept.")
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
        _tell_next(scenario, made, rows)
    if verdicts.is_red(rows):
        raise typer.Exit(1)


def calibrated(file: Path | None, backend: str, compressed: float) -> Calibration | None:
    """The numbers in the file, where there is one, and a word to whom they may not fit; UsageError
    where they are another backend's."""
    from batchlab.scenarios.forecast import calibration as calibrate

    if file is None:
        return None
    found = calibrate.read(file)
    if note := calibrate.check_fit(found, backend, compressed):
        output.say(f"Note: {note}.")
    return found


def _tell_long(scenario: Scenario, seed: int | None) -> None:
    """A word before what would keep somebody waiting for long, which may be a slip in a trace."""
    from batchlab.scenarios.model.expansion import expand, stage_sizes

    jobs = expand(scenario, seed).jobs
    tasks = sum(sum(stage_sizes(job.template, job.tasks).values()) for job in jobs)
    if tasks >= MANY_TASKS:
        output.say(
            f"{output.count(tasks, 'task')} take up to about {output.span(tasks / TASKS_A_S)} "
            "to simulate; Ctrl-C ends it. A trace's from, until and limit take a part of it."
        )


def _tell_next(scenario: str, made: Record, rows: list[VerdictRow]) -> None:
    """Who looks for a fleet that is in time, where this one is not."""
    from batchlab.cli.plan_output import duration
    from batchlab.scenarios.verdicts import Color

    late = [row for row in rows if row.colour is Color.RED and row.measure in ("makespan", "late")]
    if late:
        # Of a compressed run it is a compressed one, and a plan is made for the whole time.
        most_s = next((row.most for row in rows if row.measure == "makespan" and row.most), None)
        deadline = "TIME" if most_s is None or made.compressed != 1 else duration(most_s)
        output.say(
            f"`batchlab scenario plan {scenario} --deadline {deadline}` looks for a fleet that is "
            "in time."
        )


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
            (one.name, output.span(one.at_s), one.evidence or f"impossible: {one.impossible}")
            for one in made.faults
        ]
        parts.append(output.table(("fault", "at", "what was seen of it"), told))
    parts.append(charts.text_verdicts(rows))
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


def register_faulting(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(faults)


def faults(
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Tell of this one only.",
            show_default=False,
            autocompletion=completion.backends,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List what a scenario can break, how that is done on each backend, or why it cannot be.

    In the simulator there is every fault.

    \b
    Example: batchlab scenario faults --backend localstack
    """
    from batchlab.scenarios.faults.fault_table import BACKENDS, rows
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
            [
                (fault.value, "yes" if cell.possible else "no", cell.how or cell.why_not)
                for fault, _, cell in found
            ],
        )
    else:
        yes = {(fault, there): cell.possible for fault, there, cell in found}
        table = output.table(
            ("fault", *BACKENDS, "what happens"),
            [
                (
                    fault.value,
                    *("yes" if yes[fault, one] else "no" for one in BACKENDS),
                    fault.meaning,
                )
                for fault in FaultName
            ],
        )
    output.show(table)
    if not backend and sys.stdout.isatty():
        output.say("`batchlab scenario faults --backend NAME` says how each is done, or why not.")


def text(comparison: Comparison) -> str:
    """All of it: `scenario compare` prints it, and a replay that was forecast."""
    told_of = (one for one in comparison.differences if (one.forecast, one.fact) != (None, None))
    rows = [_row(one) for one in told_of]
    columns = ("measure", "jobs", "forecast", "fact", "error", "relative")
    compressed = comparison.compressed
    at = "" if compressed == 1 else f", times divided by {compressed:g}"
    told = [
        f"Scenario {comparison.scenario}: forecast ({comparison.forecast_backend}) against fact "
        f"({comparison.fact_backend}){at}; an error is forecast minus fact",
        "",
        output.table(columns, rows),
        *(drawn for curves in comparison.curves for drawn in ("", _drawn(curves))),
    ]
    if comparison.notes:
        told += ["", *(f"Note: {note}." for note in comparison.notes)]
    return "\n".join(told)


def _row(one: Difference) -> tuple[str, ...]:
    relative = one.relative
    return (
        one.measure,
        one.template or "all",
        number(one.forecast, one.unit),
        number(one.fact, one.unit),
        _signed(one.absolute, one.unit),
        "-" if relative is None else f"{relative:+.1%}",
    )


def _signed(value: float | None, unit: Unit) -> str:
    if value is None:
        return "-"
    return f"{'-' if value < 0 else '+'}{number(abs(value), unit)}"


def _drawn(curves: CurvePair) -> str:
    most = max((level for _, level in (*curves.forecast, *curves.fact)), default=0.0)
    relative = "" if curves.relative is None else f", {curves.relative:.1%} of the fact's mean"
    title = (
        f"{curves.what} ({LINE} forecast, {AREA} fact); on average {curves.mean_error:,.3g} "
        f"apart{relative}"
    )
    if not most:
        return f"{curves.what}: none at any time in either"
    chart = Chart(curves.until_s, most)
    chart.area(sample_curve(curves.fact, curves.until_s, chart.width))
    chart.line(sample_curve(curves.forecast, curves.until_s, chart.width))
    return f"{title}\n{chart.text(output.span, lambda value: f'{value:,.4g}')}"
