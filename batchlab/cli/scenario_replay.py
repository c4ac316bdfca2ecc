"""Command `batchlab scenario replay`, which runs a scenario on a grid, writes the record of the run, and compares the
run with the scenario's expectations and a forecast.

Invariant: the command stops a grid that the command started, unless the user keeps the grid up. After the run, the
command writes the record before any other step, because a later step could fail.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import charts, output
from batchlab.cli.option_values import home_of, seconds_of
from batchlab.cli.options import BACKEND, CALIBRATION, ENDPOINT, HOME, JSON, SCENARIO, flag, option
from batchlab.cli.progress import LATE_S, ReplayDisplay
from batchlab.cli.scenario_records import comparison_text, load_calibration
from batchlab.client.http import Client
from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.pricing import price_book
from batchlab.runtime.home import Home
from batchlab.scenarios import verdicts
from batchlab.scenarios.forecast.comparison import Comparison, compare
from batchlab.scenarios.model.expansion import compress_scenario, expand
from batchlab.scenarios.model.values import FaultName, Scenario
from batchlab.scenarios.record import Record
from batchlab.scenarios.replay.run import INTERRUPTED

if TYPE_CHECKING:
    from batchlab.cli.session import Session
    from batchlab.runtime.descriptor import Calibration
    from batchlab.runtime.factory import Backend
    from batchlab.scenarios.faults.proxy import FaultProxy

PROXY_FAULTS = frozenset({FaultName.S3_ERRORS, FaultName.PARTITION})
"""Faults that need a proxy in front of the endpoint."""
NOTE_FROM_PROCESSES = 100
"""Number of instances above which a note warns that all instances run as processes of this machine."""
NOTE_FROM_DURATION_S = 600.0
"""Duration in seconds above which a note is printed before the start of a replay."""
SETTINGS_COMMENT = (
    "Of `batchlab scenario replay`, which takes it away when it has ended; left behind by one that "
    "was killed it may be deleted."
)


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """Arguments of the replay of a scenario."""

    scenario: str
    home: Home
    backend: str
    endpoint: str | None = None
    compress: float | None = None
    seed: int | None = None
    out: Path | None = None
    limit_s: float | None = None
    forecast: bool = True
    calibration: Path | None = None
    keep_up: bool = False


def run(request: ReplayRequest, *, json: bool) -> None:
    """Replay a scenario, and print the verdict for each expectation.

    Exit with code 1 if an expectation is red, and with code 130 after an interruption.
    """
    from batchlab.runtime import factory
    from batchlab.scenarios.model import loader

    backend = factory.load(request.backend, request.endpoint)
    if backend.capabilities.simulated:
        raise UsageError("A replay needs a real grid.", remedy="`batchlab scenario simulate` is in virtual time.")
    whole = loader.load(loader.find(request.scenario))
    factor = whole.compress if request.compress is None else request.compress
    scenario = compress_scenario(whole, factor)
    calibration = load_calibration(request.calibration, backend.name, scenario.compressed)
    if factor != 1:
        output.say(f"All times of {scenario.name} are divided by {factor:g}.")
    else:
        _note_duration(scenario, request.seed)
    _note_fleet(scenario, backend)
    if odd := sum(len(tuple(source.odd())) for source in scenario.arrivals):
        output.say(
            f"{output.count(odd, 'record')} of its traces {'is' if odd == 1 else 'are'} odd; "
            "`batchlab scenario check` shows what is."
        )
    if request.out:
        output.check_writable(request.out, folder=True)
    path = request.out or _free(request.home.records, scenario.name)
    record = _replay(request, backend, scenario, path)
    _note_late(record)
    rows = verdicts.judge(record, scenario.expect)
    comparison = None
    if request.forecast and not record.cut:
        comparison = _compare(request, backend, scenario, record, calibration)
    if json:
        output.show_json(
            {
                "record": str(path),
                "red": verdicts.is_red(rows),
                "cut": record.cut,
                "verdict": [row.to_json() for row in rows],
                "comparison": comparison.to_json() if comparison else None,
            }
        )
    else:
        if comparison:
            output.show(f"{comparison_text(comparison)}\n")
        output.show(charts.verdict_text(rows))
    output.say(f"The record is {path}.")
    if request.keep_up and request.home.settings_file.exists():
        output.say(
            f"The grid stays up, with the policy that {request.home.settings_file} says; without "
            "that file the next one has the backend's own."
        )
    if record.cut == INTERRUPTED:
        raise typer.Exit(output.INTERRUPTED)
    if verdicts.is_red(rows):
        raise typer.Exit(1)


def _note_duration(scenario: Scenario, seed: int | None) -> None:
    last_s = max((job.due_s for job in expand(scenario, seed).jobs), default=0.0)
    if last_s > NOTE_FROM_DURATION_S:
        output.say(
            f"{scenario.name} runs in real time, for at least {output.span(last_s)}; "
            "--compress 100 divides every time by a hundred."
        )


def _note_fleet(scenario: Scenario, backend: Backend) -> None:
    fleet, cores = sum(plan.pool.max_size for plan in scenario.pools), backend.usual.cores
    if cores and fleet > NOTE_FROM_PROCESSES:
        output.say(
            f"Its fleet may come to {output.count(fleet, 'instance')}, each a process of this "
            f"machine, which has {output.count(cores, 'core')}. `batchlab scenario simulate --like "
            f"{backend.name}` says what they would make of it."
        )


def _free(folder: Path, name: str) -> Path:
    """Return the path of a new record in the folder. The name of the record ends with the next free number."""
    numbers = [
        int(match[1])
        for path in folder.glob(f"{name}-*.json")
        if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)\.json", path.name))
    ]
    return folder / f"{name}-{max(numbers, default=0) + 1}.json"


# --- The run -------------------------------------------------------------------------------------


def _replay(request: ReplayRequest, backend: Backend, scenario: Scenario, path: Path) -> Record:
    from batchlab.cli.session import Session
    from batchlab.runtime import settings
    from batchlab.scenarios import record
    from batchlab.scenarios.faults import aws_stack

    home = request.home
    is_fixed = backend.capabilities.fixed_pools
    policy = {} if is_fixed else scenario.policy.settings()
    is_up = home.record() is not None
    with ExitStack() as stack:
        front = None
        if not is_up:
            if any(fault.name in PROXY_FAULTS for fault in scenario.faults):
                backend, front = stack.enter_context(_open_proxy(request, backend))
            stack.enter_context(settings.temporary_settings(home, policy, why=SETTINGS_COMMENT, keep=request.keep_up))
        pools = () if is_fixed else [plan.pool for plan in scenario.pools]
        session = stack.enter_context(Session(home, backend, pools, keep_up=request.keep_up))
        session.start()
        spot = {plan.pool.name: plan.spot for plan in scenario.pools}
        stack.enter_context(aws_stack.with_spot_shares(backend, home, spot))
        replay_record = asyncio.run(_run(request, session, scenario, front))
        # The record is written inside the `with` block, because the end of the block undoes the changes for the replay
        # and may fail.
        record.write(replay_record, path)
    return replay_record


@contextmanager
def _open_proxy(request: ReplayRequest, backend: Backend) -> Iterator[tuple[Backend, FaultProxy | None]]:
    from batchlab.scenarios.faults.proxy import with_proxy

    if backend.emulator and request.keep_up:
        raise UsageError(
            f"On {backend.name} what breaks S3 stands before its endpoint, and would go with this command.",
            remedy="Leave out --keep-up, or bring the grid up before with `batchlab grid up`.",
        )
    with with_proxy(backend, request.home, output.say) as fronted:
        yield fronted


async def _run(request: ReplayRequest, session: Session, scenario: Scenario, front: FaultProxy | None) -> Record:
    from batchlab.runtime.factory import patience
    from batchlab.scenarios.faults.fault_injection import FaultInjector, injector_for
    from batchlab.scenarios.replay import driver

    home, backend = session.home, session.backend
    manager_record = home.record()
    assert manager_record

    # A fault that ends the manager starts a new manager at the same address, so one client works with all managers.
    with Client.of(home, manager_record) as client, _stopping() as stop, ReplayDisplay() as display:

        def injector() -> FaultInjector:
            return injector_for(
                backend, home, client, pools=[plan.pool for plan in scenario.pools], parent=session.ours, front=front
            )

        return await driver.replay(
            scenario,
            home,
            backend,
            patience=patience(),
            seed=request.seed,
            limit=request.limit_s,
            injector=injector,
            stop=stop,
            progress=display.show,
        )


@contextmanager
def _stopping() -> Iterator[asyncio.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets. The second Ctrl-C or SIGTERM raises Stopped."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask() -> None:
        if stop.is_set():
            raise output.Stopped(output.INTERRUPTED)
        output.say("Stopping: what runs is cancelled, and what was measured is kept.")
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, ask)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        output.install_signal_handlers()


def _note_late(record: Record) -> None:
    late = [job.submitted_s - job.due_s for job in record.jobs]
    many = sum(late_s > LATE_S for late_s in late)
    if many:
        output.say(
            f"{output.count(many, 'job')} of {len(late):,} arrived late, up to "
            f"{output.span(max(late))}: this machine, or the manager, could not keep up."
        )


# --- The forecast --------------------------------------------------------------------------------


def _compare(
    request: ReplayRequest, backend: Backend, scenario: Scenario, record: Record, calibration: Calibration | None
) -> Comparison | None:
    """Return the comparison of a replay's record with a forecast of the same scenario.

    If the simulation of the forecast fails, print a note and return None.
    """
    from batchlab.scenarios.faults import fault_injection
    from batchlab.scenarios.forecast.simulate import ForecastOptions, simulate

    output.say("Simulating the same.")
    options = ForecastOptions(impossible=fault_injection.impossible(backend.name))
    try:
        forecast = simulate(
            scenario,
            seed=request.seed,
            like=backend,
            calibration=calibration,
            options=options,
            book=price_book.load(request.home.path),
        )
    except BatchlabError as error:
        output.say(f"There is no forecast: {error.message}")
        return None
    return compare(forecast, record)


def replay(
    scenario: str = SCENARIO,
    backend: str = BACKEND,
    compress: float | None = option(
        "Divide all times of the scenario by K. Default: the value of `compress` in the scenario file.", "K", min=0.001
    ),
    seed: int | None = option("Seed of the run, which replaces the seed in the scenario file.", "N"),
    home: Path | None = HOME,
    endpoint: str | None = ENDPOINT,
    out: Path | None = option(
        "File to which the record of the run is written. Default: a file in records/ in the grid's folder.", "FILE"
    ),
    limit: str | None = option(
        "Stop the replay after this time, such as 20m. Default: five minutes plus twice the time of the whole fleet.",
        "DURATION",
    ),
    forecast: bool = option(
        "Also simulate the scenario, and compare the simulation with the replay.",
        None,
        "--forecast/--no-forecast",
        default=True,
    ),
    calibration: Path | None = CALIBRATION,
    keep_up: bool = flag("Keep the grid running after the replay.", "--keep-up"),
    json: bool = JSON,
) -> None:
    """Run a scenario in real time, and compare the run with the scenario's expectations.

    The command starts a grid with the scenario's pools and policy, or uses a running grid with
    the same pools and policy. Tasks are stand-ins that take the declared time, or the real work
    of a job file. The exit code is 1 if the run does not meet an expectation.

    \b
    Example: batchlab scenario replay claims-month-end --compress 600
    """
    run(
        ReplayRequest(
            scenario=scenario,
            home=home_of(home),
            backend=backend,
            endpoint=endpoint,
            compress=compress,
            seed=seed,
            out=out,
            limit_s=None if limit is None else seconds_of("--limit", limit, least_s=1.0),
            forecast=forecast,
            calibration=calibration,
            keep_up=keep_up,
        ),
        json=json,
    )
