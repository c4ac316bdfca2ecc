"""`batchlab sim …`: the grid in the simulator, tried over many seeds, or one seed again.

Invariant: exit code 0 says that every promise was kept in every seed that was asked for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import JsonOption
from batchlab.cli.signals import INTERRUPTED, Stopped
from batchlab.errors import UsageError

if TYPE_CHECKING:
    from batchlab.cli.fuzzed import Campaign
    from batchlab.sim.fuzz import Tally, Tried

SHRUNK = 3
"""How many failing seeds are shrunk: a bug that breaks many seeds is the same in most of them."""
LOG_SHOWN = 20

app = typer.Typer(no_args_is_help=True)

WeatherOption = Annotated[
    str,
    typer.Option(
        "--weather",
        metavar="NAME",
        help="Which faults: all, crashes (kills only), storm, timed (all, and a schedule), "
        "lies (lying workers), storage (damaged objects), or accounts (all, and usage).",
    ),
]


@app.callback()
def sim_() -> None:
    """Try the grid's promises in simulated worlds full of faults.

    \b
    Example: batchlab sim fuzz --seeds 500
    """


@app.command()
def fuzz(
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="How many.")] = 500,
    first: Annotated[int, typer.Option("--from", metavar="SEED", min=0, help="The first.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            min=1,
            help="How many at a time.",
            show_default="as many as CPUs",
        ),
    ] = None,
    weather: WeatherOption = "all",
    stop_after: Annotated[
        int,
        typer.Option(
            "--stop-after", metavar="N", min=1, help="End when so many seeds have failed."
        ),
    ] = 10,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE", help="Also write Markdown tables.", show_default=False
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run random worlds, one per seed, and check every promise in each. What fails is shrunk to
    the fewest faults. Exit code 1 where a promise was broken.

    \b
    Example: batchlab sim fuzz --seeds 10000 --report long.md
    """
    from batchlab.cli.fuzzed import Campaign

    _known(weather)
    if report:
        output.check_writable(report)
    begun_s = time.monotonic()
    campaign = Campaign(first, seeds, weather, min(jobs or os.cpu_count() or 1, seeds))
    interrupted = False
    try:
        _try_all(campaign, stop_after)
        _shrink(campaign)
    except (Stopped, KeyboardInterrupt):
        interrupted = True
        campaign.cut = campaign.cut or "It was interrupted."
    campaign.wall_s = time.monotonic() - begun_s
    if report:
        report.write_text(campaign.markdown(), encoding="utf-8")
    if json:
        output.show_json(campaign.to_json())
    else:
        output.show(campaign.text())
    if interrupted or campaign.failures:
        raise typer.Exit(INTERRUPTED if interrupted else 1)


def _known(weather: str) -> None:
    from batchlab.sim.fuzz import WEATHERS

    if weather not in WEATHERS:
        raise UsageError(
            f"There is no weather {weather!r}.", remedy=f"There are {', '.join(WEATHERS)}."
        )


def _try_all(campaign: Campaign, stop_after: int) -> None:
    from batchlab.sim import fuzz

    seeds = range(campaign.first, campaign.first + campaign.wanted)
    tries = fuzz.campaign(seeds, campaign.weather, campaign.processes)
    with closing(tries), _watched(campaign.wanted) as show:
        for tried in tries:
            campaign.tally.add(tried)
            show(campaign.tally)
            if len(campaign.failures) >= stop_after and campaign.tally.seeds < campaign.wanted:
                campaign.cut = "It stopped there."
                return


def _shrink(campaign: Campaign) -> None:
    from batchlab.sim import fuzz

    first = campaign.failures[:SHRUNK]
    if first and sys.stderr.isatty():
        output.say(f"Shrinking {output.count(len(first), 'failure')} to the fewest faults…")
    found = fuzz.all_fewest(first, campaign.weather, campaign.processes, time.monotonic)
    with closing(found):
        for failure, shrunk in found:
            campaign.fewest[failure.seed] = shrunk


@contextmanager
def _watched(total: int) -> Iterator[Callable[[Tally], None]]:
    """A bar where stderr is a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        sometimes = output.Sometimes(30.0)
        yield lambda tally: sometimes.say(
            f"{tally.seeds:,} of {total:,} seeds, {len(tally.failures)} failed"
        )
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    begun_s = time.monotonic()
    columns = (
        TextColumn("{task.completed:,}/{task.total:,} seeds"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[failed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, rate="", failed="")

        def show(tally: Tally) -> None:
            rate = tally.seeds / (time.monotonic() - begun_s)
            failed = f"[red]{len(tally.failures)} failed[/]" if tally.failures else "none failed"
            bar.update(task, completed=tally.seeds, rate=f"{rate:.1f} seeds/s", failed=failed)

        yield show


@app.command()
def replay(
    seed: Annotated[int, typer.Argument(metavar="SEED", min=0, show_default=False)],
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="FAULTS",
            help="ACTOR:CALL:KIND,… or none, in place of what the weather draws.",
            show_default=False,
        ),
    ] = None,
    weather: WeatherOption = "all",
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", metavar="FILE", help="Write the whole event log.", show_default=False
        ),
    ] = None,
) -> None:
    """Run one seed's world again and show how it ends. Exit code 1 where a promise was broken.

    \b
    Example: batchlab sim replay 1234 --only manager-1:41:kill_after
    """
    from batchlab.sim import fuzz

    _known(weather)
    wanted = None if only is None else fuzz.read(only)
    if log:
        output.check_writable(log)
    lines: list[str] = []
    with fuzz.silence():
        tried = fuzz.replay(seed, weather, wanted, lines)
    if log:
        log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    idle = [fault for fault in wanted or () if fault not in tried.faults]
    if idle:
        output.say(f"These fitted no call and did not happen: {fuzz.written(idle)}")
    output.show(_ended(tried))
    if tried.failure:
        if log is None:
            output.show(_end_of_log(lines))
        raise typer.Exit(1)


def _ended(tried: Tried) -> str:
    faults = output.count(len(tried.faults), "fault")
    if failure := tried.failure:
        told = f"Seed {tried.seed}, after {faults}: {output.clean(failure.text)}"
        return f"{told}\n\n{failure.trace}" if failure.trace else told
    report = tried.report
    assert report is not None
    return (
        f"Seed {tried.seed} keeps every promise: {faults}, {output.count(report.tasks, 'task')}, "
        f"{output.count(report.starts, 'start')}, {output.count(report.managers, 'manager')}, "
        f"{output.span(report.virtual_s)} of virtual time; "
        f"its jobs: {', '.join(state.value for state in report.states)}"
    )


def _end_of_log(lines: list[str]) -> str:
    shown = lines[-LOG_SHOWN:]
    return "\n".join([f"The last {len(shown)} of {len(lines):,} lines of its event log:", *shown])


@app.command()
def faults(json: JsonOption = False) -> None:
    """List the kinds of faults and what they mean.

    \b
    Example: batchlab sim faults
    """
    from batchlab.sim.faults import FaultKind

    if json:
        output.show_json([{"fault": kind.value, "meaning": kind.meaning} for kind in FaultKind])
    else:
        output.show(output.table(("fault", "meaning"), [(k.value, k.meaning) for k in FaultKind]))
