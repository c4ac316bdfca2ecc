"""Command group `batchlab scenario`, with the commands `list`, `check`, `simulate`, and `faults`.

Invariant: `batchlab scenario simulate` exits with code 1 if an expectation of the scenario has the verdict red.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import charts, output
from batchlab.cli.charts import duration
from batchlab.cli.groups import command_group
from batchlab.cli.option_values import home_of
from batchlab.cli.options import CALIBRATION, HOME, JSON, LIKE, NO_SHARES, SCENARIO, backends, flag, option
from batchlab.cli.output import Stopped
from batchlab.cli.progress import bar
from batchlab.cli.scenario_plan import plan
from batchlab.cli.scenario_records import calibrate, compare, load_calibration, record
from batchlab.cli.scenario_replay import replay
from batchlab.core import task_sizes
from batchlab.core.errors import UsageError
from batchlab.core.fair_share import DEFAULT_SHARE
from batchlab.core.pricing import price_book
from batchlab.scenarios import verdicts
from batchlab.scenarios.model.expansion import Curve, compress_scenario, expand, stage_sizes, task_times
from batchlab.scenarios.model.values import Anomaly, FaultName, Job, Scenario, Schedule
from batchlab.scenarios.record import Record, write
from batchlab.scenarios.verdicts import MEASURES, Color, Unknown, VerdictRow
from batchlab.sim.actors import silence_killed_actors

if TYPE_CHECKING:
    from batchlab.scenarios.forecast.simulate import SimulationProgress

app = command_group("scenario")


@app.callback()
def scenario_() -> None:
    """Check, simulate, and replay load scenarios, and compare their runs with expectations.

    \b
    Example: batchlab scenario check claims-month-end
    """


MAX_ODD_KINDS = 10
"""Maximum number of kinds of anomalies in traces that are listed."""


@app.command("list")
def list_(json: bool = JSON) -> None:
    """List the installed scenarios.

    \b
    Example: batchlab scenario list
    """
    from batchlab.scenarios.model import loader

    shipped = loader.shipped_scenarios()
    output.answer(
        json,
        [{"name": one.name, "teaches": one.teaches, "file": str(one.path)} for one in shipped],
        output.table(("name", "teaches"), [(one.name, one.teaches) for one in shipped]),
    )


@app.command()
def check(
    name: str = SCENARIO,
    seed: int | None = option("Seed of the arrivals, which replaces the seed in the scenario file.", "N", min=0),
    json: bool = JSON,
) -> None:
    """Check a scenario file, and show a chart of the scenario's arrivals.

    The command reads all traces of the scenario, and does not run the scenario.

    \b
    Example: batchlab scenario check claims-month-end
    """
    from batchlab.scenarios.model import expansion, loader

    path = loader.find(name)
    scenario = loader.load(path)
    schedule = expand(scenario, seed)
    if not schedule.jobs:
        raise UsageError(
            f"Nothing arrives in the scenario {path}.",
            remedy="Give its arrivals a higher rate or a later until, or another --seed; from, "
            "until and limit may leave nothing of a trace.",
        )
    curve = expansion.build_curve(scenario, schedule.jobs)
    doubts = list(warnings(scenario, schedule, curve))
    if json:
        output.show_json({**_facts(scenario, schedule, curve), "doubts": doubts})
        return
    tasks = sum(column.tasks for column in curve.columns)
    output.show(
        f"{path} {'can be run' if doubts else 'is fine'}: scenario {scenario.name}, "
        f"{output.count(len(schedule.jobs), 'job')}, {output.count(tasks, 'task')}, "
        f"{output.span(curve.work_s)} of work\n\n"
        f"{output.visible(scenario.about)}\n"
    )
    if lines := list(_traces(scenario)):
        output.show("\n".join(lines) + "\n")
    output.show(charts.text(scenario, curve, fancy=_fancy()))
    if doubts:
        output.say("\nIs this meant?")
    for line in (*(f"  {doubt}" for doubt in doubts), *_odd(schedule.odd)):
        output.say(line)


def _fancy() -> bool:
    """Return whether stdout accepts characters outside ASCII."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def _traces(scenario: Scenario) -> Iterator[str]:
    """Yield a sentence for each trace of the scenario. The sentence contains the number of usable records, and the time
    in the trace at which the scenario starts.
    """
    from batchlab.scenarios.traces.source import Trace

    for source in scenario.arrivals:
        if isinstance(source, Trace):
            read = source.reading()
            of = f"{len(read.rows):,} of {output.count(read.records, 'record')} can be used"
            begins = source.begins()
            clock = f"; the scenario begins at {begins} of its clock" if begins else ""
            yield f"Trace {source.path.name}: {of}{clock}"


def _odd(odd: Sequence[Anomaly]) -> Iterator[str]:
    """Yield a line for each kind of anomaly in the records of traces. Each line names the first record with the
    anomaly.
    """
    from batchlab.scenarios.traces.rows import summarize

    kinds = summarize(odd)
    if kinds:
        yield f"\n{output.count(len(odd), 'odd record')} in traces:"
    for kind in kinds[:MAX_ODD_KINDS]:
        yield f"  {kind.file}:{kind.first_line}: {kind.what}: {kind.done}" + (
            f", and {kind.count - 1:,} more such" if kind.count > 1 else ""
        )
    if len(kinds) > MAX_ODD_KINDS:
        yield f"  {len(kinds) - MAX_ODD_KINDS} more kinds; --json lists every record."


def _facts(scenario: Scenario, schedule: Schedule, seen: Curve) -> dict[str, object]:
    from batchlab.scenarios.traces.source import Trace

    return {
        "name": scenario.name,
        "about": scenario.about,
        "digest": scenario.digest,
        "jobs": len(schedule.jobs),
        "tasks": sum(column.tasks for column in seen.columns),
        "work_slot_s": seen.work_s,
        "column_s": seen.width_s,
        "columns": [asdict(column) for column in seen.columns],
        "pools": [
            {
                "pool": ask.pool,
                "slots": ask.slots,
                "peak_slots": ask.peak,
                "behind_s": ask.behind_s,
                "behind_at_s": ask.behind_at_s,
                "idle_from_s": ask.idle_from_s,
            }
            for ask in seen.asks
        ],
        "faults": [asdict(fault) for fault in scenario.faults],
        "traces": [
            {
                "file": str(source.path),
                "records": source.reading().records,
                "used": len(source.reading().rows),
                "begins": source.begins() or None,
            }
            for source in scenario.arrivals
            if isinstance(source, Trace)
        ],
        "odd": [asdict(odd) for odd in schedule.odd],
    }


def warnings(scenario: Scenario, schedule: Schedule, curve: Curve) -> Iterator[str]:
    """Yield a sentence for each part of a scenario that does not affect the run.

    A part that does not affect the run may be a mistake of the scenario's author.
    """
    arrived = {job.template.name for job in schedule.jobs}
    for name in scenario.jobs:
        if name not in arrived:
            yield f"No job '{name}' arrives."
    used = {stage.pool for name in arrived for stage in scenario.jobs[name].stages}
    for pool_plan in scenario.pools:
        if pool_plan.pool.name not in used:
            yield f"Nothing that arrives runs in the pool '{pool_plan.pool.name}'."
    # Add the width of a chart column, because work that arrives late in a column is done in the next column.
    done_s = max((ask.idle_from_s for ask in curve.asks), default=0.0) + curve.width_s
    done = f"comes when all work could be done, after {charts.span(done_s)}"
    for fault in scenario.faults:
        if fault.at_s >= done_s:
            yield f"The fault {fault.name.value} at {charts.span(fault.at_s)} {done}."
    shares = {scenario.jobs[name].share for name in arrived}
    if scenario.shares is None and any(shares):
        yield f"The jobs have shares ({', '.join(sorted(shares - {''}))}), and the scenario has no fair-share policy."
    for entry in scenario.shares.shares if scenario.shares else ():
        if not any(entry.covers(share or DEFAULT_SHARE) for share in shares):
            yield f"No job that arrives belongs to the share '{entry.identifier}'."
    for prewarm in scenario.prewarm:
        if prewarm.at_s >= done_s:
            yield f"The prewarm of '{prewarm.pool}' at {charts.span(prewarm.at_s)} {done}."


LINE_EVERY_S = 10.0
MIN_TASKS_PER_S = 500
"""Assumed number of tasks that one core simulates per second, for an upper bound of a simulation's duration.

In the installed scenarios, one core simulates 400 to 600 single tasks per second, and about ten times as many tasks in
bundles.
"""
NOTE_FROM_TASKS = 120 * MIN_TASKS_PER_S
"""Minimum number of tasks of a scenario for which a note is printed before the forecast."""


@app.command()
def simulate(
    scenario: str = SCENARIO,
    seed: int | None = option("Seed of the run, which replaces the seed in the scenario file.", "N", min=0),
    compress: float = option("Divide all times of the scenario by K, as in a replay.", "K", default=1.0),
    like: str = LIKE,
    calibration: Path | None = CALIBRATION,
    no_shares: bool = NO_SHARES,
    home: Path | None = HOME,
    log: Path | None = option("File to which the complete event log of the simulation is written.", "FILE"),
    out: Path | None = option(
        "File to which the record of the run is written, for `scenario compare` and programs.", "FILE"
    ),
    json: bool = JSON,
) -> None:
    """Run a scenario and its faults on a simulated grid in virtual time, and compare the run with the scenario's
    expectations.

    Two simulations with the same scenario and seed have the same result. The exit code is 1 if the
    run does not meet an expectation.

    \b
    Example: batchlab scenario simulate claims-month-end --seed 7
    """
    from batchlab.runtime import factory
    from batchlab.scenarios.forecast.simulate import simulate as run
    from batchlab.scenarios.model import loader

    spec = compress_scenario(loader.load(loader.find(scenario)), compress)
    if no_shares:
        spec = replace(spec, shares=None)
    backend = factory.load(like)
    measured = load_calibration(calibration, backend.name, spec.compressed)
    book = price_book.load(home_of(home).path)
    for file in (log, out):
        if file:
            output.check_writable(file)
    jobs = expand(spec, seed).jobs
    _note_duration(jobs)
    size_warnings = task_sizes.size_warnings(task_times(spec, jobs))
    output.show_warnings(size_warnings)
    lines: list[str] | None = [] if log else None
    try:
        with _progress() as progress:
            result = run(spec, seed=seed, like=backend, calibration=measured, log=lines, progress=progress, book=book)
    except Stopped:
        silence_killed_actors()
        output.say("Stopped: an unfinished forecast has no result, so nothing is kept.")
        raise
    if log and lines is not None:
        log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if out:
        write(result, out)
    rows = verdicts.judge(result, spec.expect)
    if json:
        output.show_json({**_forecast_json(result, rows), "warnings": [one.to_json() for one in size_warnings]})
    else:
        output.show(_forecast_text(result, rows))
        _suggest_plan(scenario, result, rows)
    if verdicts.is_red(rows):
        raise typer.Exit(1)


def _note_duration(jobs: Sequence[Job]) -> None:
    """Print a note before a simulation of many tasks, because a mistake in a trace can cause a very long simulation."""
    tasks = sum(sum(stage_sizes(job.template, job.tasks).values()) for job in jobs)
    if tasks >= NOTE_FROM_TASKS:
        output.say(
            f"{output.count(tasks, 'task')} take up to about {output.span(tasks / MIN_TASKS_PER_S)} "
            "to simulate; Ctrl-C ends it. A trace's from, until and limit take a part of it."
        )


def _suggest_plan(scenario: str, record: Record, rows: list[VerdictRow]) -> None:
    """Suggest the command `scenario plan` if the scenario's fleet was too slow."""
    late = [row for row in rows if row.verdict is Color.RED and row.measure in ("makespan", "late")]
    if late:
        # `scenario plan` needs a deadline in uncompressed time, so a time of a compressed run cannot be the deadline.
        most_s = next((row.most for row in rows if row.measure == "makespan" and row.most), None)
        deadline = "TIME" if most_s is None or record.compressed != 1 else duration(most_s)
        output.say(f"`batchlab scenario plan {scenario} --deadline {deadline}` looks for a fleet that is in time.")


def _forecast_json(record: Record, rows: list[VerdictRow]) -> dict[str, object]:
    return {
        "scenario": record.scenario,
        "seed": record.seed,
        "like": record.backend,
        "compressed": record.compressed,
        "red": verdicts.is_red(rows),
        "verdict": [row.to_json() for row in rows],
        "measures": _measures(record),
        "faults": [
            {
                "fault": fault.name,
                "at_s": fault.at_s,
                "targets": list(fault.targets),
                "evidence": fault.evidence,
                "impossible": fault.impossible,
            }
            for fault in record.faults
        ],
        "jobs": len(record.jobs),
        "tasks": sum(job.planned for job in record.jobs),
        "cut": record.cut,
        "usd_items": dict(record.usd_items),
        "log_digest": record.log_digest,
        "wall_s": record.wall_s,
    }


def _measures(record: Record) -> dict[str, float | None]:
    """Return the values of all measures of a run by the measure's name. An unknown or infinite value is None."""
    values: dict[str, float | None] = {}
    for name, measure in MEASURES.items():
        value = measure.of(record, "")
        values[name] = None if isinstance(value, Unknown) or isinf(value) else value
    return values


def _forecast_text(record: Record, rows: list[VerdictRow]) -> str:
    tasks = sum(job.planned for job in record.jobs)
    head = (
        f"{record.scenario}, seed {record.seed}, as on {record.backend}: "
        f"{output.count(len(record.jobs), 'job')}, {output.count(tasks, 'task')}, simulated in "
        f"{output.span(record.wall_s)}"
    )
    measured = [
        (name, charts.number(value, measure.unit), measure.meaning)
        for name, measure in MEASURES.items()
        if not isinstance(value := measure.of(record, ""), Unknown)
    ]
    parts = [head, output.table(("measure", "all jobs", "meaning"), measured)]
    if record.faults:
        fault_rows = [
            (fault.name, output.span(fault.at_s), fault.evidence or f"impossible: {fault.impossible}")
            for fault in record.faults
        ]
        parts.append(output.table(("fault", "at", "what was seen of it"), fault_rows))
    parts.append(charts.verdict_text(rows))
    return "\n\n".join(parts)


@contextmanager
def _progress() -> Iterator[Callable[[SimulationProgress], None]]:
    with bar(LINE_EVERY_S) as show:
        yield lambda seen: show(
            seen.ended, seen.jobs, f"{output.span(seen.at_s)}: {seen.ended:,} of {output.count(seen.jobs, 'job')} ended"
        )


@app.command()
def faults(
    backend: str | None = option(
        "Name of the backend whose faults are listed. Default: all backends.", "NAME", autocompletion=backends
    ),
    simulator: bool = flag("List the faults of `sim fuzz`, instead of the faults of scenarios.", "--simulator"),
    json: bool = JSON,
) -> None:
    """List the faults of scenarios, and how each backend injects each fault, or why the backend cannot inject the
    fault.

    The simulator can inject all faults.

    \b
    Example: batchlab scenario faults --backend localstack
    """
    from batchlab.scenarios.faults.fault_injection import BACKENDS, rows

    if simulator:
        if backend is not None:
            raise UsageError("--simulator and --backend exclude each other.", remedy="Leave one of them out.")
        _show_simulator_faults(json)
        return
    if backend is not None and backend not in BACKENDS:
        raise UsageError(
            f"Nothing is replayed on a backend {backend!r}.",
            remedy=f"There are {', '.join(BACKENDS)}; the simulator knows every fault.",
        )
    cells = list(rows((backend,) if backend else BACKENDS))
    if json:
        output.show_json(
            [
                {
                    "fault": fault.value,
                    "meaning": fault.meaning,
                    "backend": name,
                    "possible": cell.possible,
                    "how": cell.how,
                    "why_not": cell.why_not,
                }
                for fault, name, cell in cells
            ]
        )
        return
    if backend:
        table = output.table(
            ("fault", "there", "how, or why not"),
            [(fault.value, "yes" if cell.possible else "no", cell.how or cell.why_not) for fault, _, cell in cells],
        )
    else:
        yes = {(fault, name): cell.possible for fault, name, cell in cells}
        table = output.table(
            ("fault", *BACKENDS, "what happens"),
            [
                (fault.value, *("yes" if yes[fault, name] else "no" for name in BACKENDS), fault.meaning)
                for fault in FaultName
            ],
        )
    output.show(table)
    if not backend and sys.stdout.isatty():
        output.say("`batchlab scenario faults --backend NAME` says how each is done, or why not.")


def _show_simulator_faults(json: bool) -> None:
    from batchlab.sim.faults import FaultKind

    output.answer(
        json,
        [{"fault": kind.value, "meaning": kind.meaning} for kind in FaultKind],
        output.table(("fault", "meaning"), [(kind.value, kind.meaning) for kind in FaultKind]),
    )


for _command in (replay, plan, record, compare, calibrate):
    app.command()(_command)
