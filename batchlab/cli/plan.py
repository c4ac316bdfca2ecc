"""`batchlab scenario plan|compare|calibrate`: what to run, how good the forecast was, from which
numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import (
    CalibrationOption,
    HomeOption,
    JsonOption,
    LikeOption,
    ScenarioArgument,
    home_of,
    seconds_of,
)
from batchlab.cli.signals import INTERRUPTED, Stopped
from batchlab.cli.simulate import calibrated

if TYPE_CHECKING:
    from batchlab.core.pricing.price_book import PriceBook
    from batchlab.runtime.descriptor import Calibration
    from batchlab.scenarios.forecast.calibration import CalibratedValue, CalibrationResult
    from batchlab.scenarios.model.values import Scenario
    from batchlab.scenarios.planner.candidates import Goal
    from batchlab.scenarios.planner.planner import Search, SearchProgress
    from batchlab.scenarios.record import Record

RECORD = "A file that `scenario simulate` or `scenario replay` has written with --out."


def register(app: typer.Typer) -> None:
    """Add the three commands to `scenario`."""
    app.command()(plan)
    app.command()(compare)
    app.command()(calibrate)


# --- plan ----------------------------------------------------------------------------------------


def plan(
    scenario: ScenarioArgument,
    deadline: Annotated[
        str,
        typer.Option(
            "--deadline",
            metavar="TIME",
            help="When all is to be done, counted from when the first job is due, such as 6h.",
            show_default=False,
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="AMOUNT",
            help="What a run may cost, such as '12 USD'.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            metavar="N",
            min=1,
            help="How many fresh seeds confirm the answer, a run each.",
        ),
    ] = 20,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            min=1,
            help="How many runs are simulated at a time.",
            show_default="as many as CPUs",
        ),
    ] = None,
    runs: Annotated[
        int,
        typer.Option("--runs", metavar="N", min=2, help="How many runs may be simulated in all."),
    ] = 300,
    like: LikeOption = "aws",
    calibration: CalibrationOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Find the cheapest fleet and policy that has a scenario done in time.

    Searches minimum, maximum, drain target, pre-warming and Spot share in the simulator. Ctrl-C
    ends the search with what is known. Exit code 1 where nothing meets the deadline and the budget.

    \b
    Example: batchlab scenario plan long-tail --deadline 2h --budget '5 USD'
    """
    from batchlab.core.pricing import price_book
    from batchlab.runtime import factory
    from batchlab.scenarios.model import loader
    from batchlab.scenarios.planner.fast_model import FastModel
    from batchlab.scenarios.planner.planner import Search

    goal, backend = _goal(deadline, budget), factory.load(like).name
    found = loader.load(loader.find(scenario))
    measured = calibrated(calibration, backend, found.compressed)
    book = price_book.load(home_of(home).path)
    run = partial(forecast, backend=backend, calibration=measured, book=book)
    sketch = FastModel(backend, measured, book)
    search = Search(found, goal, run, seeds, jobs or os.cpu_count() or 1, runs, sketch, book)
    raise typer.Exit(carry_out(search, json=json))


def forecast(
    scenario: Scenario,
    seed: int,
    *,
    backend: str,
    calibration: Calibration | None,
    book: PriceBook | None = None,
) -> Record:
    """One simulated run, in whichever process."""
    from batchlab.runtime import factory
    from batchlab.scenarios.forecast.simulate import simulate

    return simulate(
        scenario, seed=seed, like=factory.load(backend), calibration=calibration, book=book
    )


def carry_out(search: Search, *, json: bool) -> int:
    """Search and tell; the exit code."""
    from batchlab.cli import plan_output

    interrupted = False
    try:
        with _watched(search):
            search.search()
    except (Stopped, KeyboardInterrupt):
        interrupted = True
        search.cut = "it was interrupted"
    answer = search.answer()
    if answer is None:
        output.say(
            "Nothing is known yet: it was interrupted before a first candidate had been tried."
        )
        return INTERRUPTED
    if json:
        output.show_json({**answer.to_json(), "yaml": plan_output.as_yaml(answer.planned) + "\n"})
    else:
        output.show(plan_output.text(answer))
    if interrupted:
        return INTERRUPTED
    return 0 if answer.holds else 1


def _goal(deadline: str, budget: str | None) -> Goal:
    from batchlab.core.pricing.money import parse
    from batchlab.scenarios.planner.candidates import Goal

    return Goal(seconds_of("--deadline", deadline), None if budget is None else parse(budget))


@contextmanager
def _watched(search: Search) -> Iterator[None]:
    """A bar where stderr is a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        sometimes = output.Sometimes(30.0)
        search.told = lambda progress: sometimes.say(_told(progress))
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=search.runs)

        def show(progress: SearchProgress) -> None:
            bar.update(task, completed=progress.done, description=_told(progress))

        search.told = show
        yield


def _told(progress: SearchProgress) -> str:
    from batchlab.core.pricing.money import shown

    best = progress.best
    known = ""
    if best is not None and best.finish_s < float("inf"):
        known = f"; best: {shown(best.usd)}, {output.span(best.finish_s)}"
    return f"{progress.done} of at most {progress.runs} runs, {progress.phase}{known}"


# --- compare -------------------------------------------------------------------------------------


def compare(
    forecast: Annotated[Path, typer.Argument(metavar="FORECAST", help=RECORD, show_default=False)],
    fact: Annotated[Path, typer.Argument(metavar="FACT", help=RECORD, show_default=False)],
    json: JsonOption = False,
) -> None:
    """Hold a forecast against the run that followed: every error, absolute and relative.

    \b
    Example: batchlab scenario compare forecast.json fact.json
    """
    from batchlab.cli import simulate as comparing
    from batchlab.scenarios import record
    from batchlab.scenarios.forecast import comparison

    found = comparison.compare(record.read(forecast), record.read(fact))
    if json:
        output.show_json(found.to_json())
    else:
        output.show(comparing.text(found))


# --- calibrate -----------------------------------------------------------------------------------


def calibrate(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help=RECORD, show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the numbers there, for `scenario simulate` and `scenario plan`.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Take boot times, overheads and task times from recorded runs.

    Medians, with the quartiles and how many observations each rests on.

    \b
    Example: batchlab scenario calibrate monday.json tuesday.json --out local.json
    """
    from batchlab.scenarios import record
    from batchlab.scenarios.forecast import calibration as numbers

    found = numbers.calibrate([record.read(path) for path in records])
    if out is not None:
        numbers.write(found.calibration, out)
    if json:
        output.show_json(
            {
                "backend": found.calibration.backend,
                "runs": found.calibration.runs,
                "quantities": [one.to_json() for one in found.quantities],
                "notes": list(found.notes),
            }
        )
    else:
        output.show(_calibrated(found))
    if out is not None:
        output.say(f"Written to {out}.")


def _calibrated(found: CalibrationResult) -> str:
    made = found.calibration
    rows = [
        (
            one.name,
            one.of or "-",
            _quantity(one, one.value),
            "-" if one.low is None else f"{_quantity(one, one.low)} to {_quantity(one, one.high)}",
            f"{one.observations:,} {one.what}",
            one.why and f"left out: {one.why}",
        )
        for one in found.quantities
    ]
    told = [
        f"Backend {made.backend}, from {output.count(made.runs, 'record')}",
        "",
        output.table(("what", "of", "median", "quartiles", "from", ""), rows),
    ]
    if found.notes:
        told += ["", *(f"Note: {note}." for note in found.notes)]
    return "\n".join(told)


def _quantity(one: CalibratedValue, value: float | None) -> str:
    if value is None:
        return "-"
    return f"× {value:.3f}" if one.name == "stretch" else output.span(value)
