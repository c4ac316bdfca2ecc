"""`batchlab scenario`: the group, and its commands `list`, `check`, and `schema`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from batchlab.cli import charts, output
from batchlab.cli.options import JSON, SCENARIO, option
from batchlab.core.errors import UsageError
from batchlab.scenarios.model.expansion import Curve
from batchlab.scenarios.model.values import Scenario, Schedule

if TYPE_CHECKING:
    from batchlab.scenarios.model.expansion import Curve
    from batchlab.scenarios.model.values import Anomaly, Scenario, Schedule

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `scenario` to the root command."""
    from batchlab.cli import scenario_plan, scenario_records, scenario_replay, scenario_simulate

    for module in (scenario_simulate, scenario_replay, scenario_plan, scenario_records):
        module.register(app)
    root.add_typer(app, name="scenario")


@app.callback()
def scenario_() -> None:
    """Check, forecast, replay, and judge load scenarios.

    \b
    Example: batchlab scenario check claims-month-end
    """


ODD_SHOWN = 10
"""Most kinds of odd records that are listed."""


@app.command("list")
def list_(json: bool = JSON) -> None:
    """List the shipped scenarios.

    \b
    Example: batchlab scenario list
    """
    from batchlab.scenarios.model import loader

    shipped_scenarios = loader.shipped_scenarios()
    if json:
        output.show_json(
            [
                {"name": shipped_scenario.name, "teaches": shipped_scenario.teaches, "file": str(shipped_scenario.path)}
                for shipped_scenario in shipped_scenarios
            ]
        )
        return
    output.show(
        output.table(
            ("name", "teaches"),
            [(shipped_scenario.name, shipped_scenario.teaches) for shipped_scenario in shipped_scenarios],
        )
    )


@app.command()
def check(
    name: str = SCENARIO,
    seed: int | None = option("Seed of the arrivals instead of the scenario's.", "N", min=0),
    json: bool = JSON,
) -> None:
    """Check a scenario and chart its arrivals.

    The command reads all traces and runs nothing.

    \b
    Example: batchlab scenario check claims-month-end
    """
    from batchlab.scenarios.model import expansion, loader
    from batchlab.scenarios.model.expansion import expand

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
    if told := list(_traces(scenario)):
        output.show("\n".join(told) + "\n")
    output.show(charts.text(scenario, curve, fancy=_fancy()))
    if doubts:
        output.say("\nIs this meant?")
    for line in (*(f"  {doubt}" for doubt in doubts), *_odd(schedule.odd)):
        output.say(line)


def _fancy() -> bool:
    """Whether stdout accepts more than ASCII."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def _traces(scenario: Scenario) -> Iterator[str]:
    """Yield the usable records of each trace, and its clock time at the scenario's start."""
    from batchlab.scenarios.traces.source import Trace

    for source in scenario.arrivals:
        if isinstance(source, Trace):
            read = source.reading()
            of = f"{len(read.rows):,} of {output.count(read.records, 'record')} can be used"
            begins = source.begins()
            clock = f"; the scenario begins at {begins} of its clock" if begins else ""
            yield f"Trace {source.path.name}: {of}{clock}"


def _odd(odd: Sequence[Anomaly]) -> Iterator[str]:
    """Yield the kinds of odd records in traces, each with its first record."""
    from batchlab.scenarios.traces.rows import summarize

    kinds = summarize(odd)
    if kinds:
        yield f"\n{output.count(len(odd), 'odd record')} in traces:"
    for kind in kinds[:ODD_SHOWN]:
        yield f"  {kind.file}:{kind.first_line}: {kind.what}: {kind.done}" + (
            f", and {kind.count - 1:,} more such" if kind.count > 1 else ""
        )
    if len(kinds) > ODD_SHOWN:
        yield f"  {len(kinds) - ODD_SHOWN} more kinds; --json lists every record."


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


@app.command()
def schema() -> None:
    """Print the JSON Schema of the scenario file, for editors.

    \b
    Example: batchlab scenario schema > scenario.schema.json
    """
    from batchlab.scenarios.model.schema import json_schema

    output.show_json(json_schema())


def warnings(scenario: Scenario, schedule: Schedule, curve: Curve) -> Iterator[str]:
    """Yield a sentence for each part of a scenario that changes nothing, which may be a mistake."""
    arrived = {job.template.name for job in schedule.jobs}
    for name in scenario.jobs:
        if name not in arrived:
            yield f"No job '{name}' arrives."
    used = {stage.pool for name in arrived for stage in scenario.jobs[name].stages}
    for plan in scenario.pools:
        if plan.pool.name not in used:
            yield f"Nothing that arrives runs in the pool '{plan.pool.name}'."
    # Work that arrives late in a column is done in the next column.
    done_s = max((ask.idle_from_s for ask in curve.asks), default=0.0) + curve.width_s
    done = f"comes when all work could be done, after {charts.span(done_s)}"
    for fault in scenario.faults:
        if fault.at_s >= done_s:
            yield f"The fault {fault.name.value} at {charts.span(fault.at_s)} {done}."
    for prewarm in scenario.prewarm:
        if prewarm.at_s >= done_s:
            yield f"The prewarm of '{prewarm.pool}' at {charts.span(prewarm.at_s)} {done}."
