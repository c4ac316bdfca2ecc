"""`scenario list`, `scenario check`, `scenario schema`: scenarios looked at, and nothing run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import JsonOption, ScenarioArgument
from batchlab.errors import UsageError

if TYPE_CHECKING:
    from batchlab.scenario.curve import Curve
    from batchlab.scenario.model import Odd, Scenario, Schedule

ODD_SHOWN = 10
"""Odd records that are told one by one: who has many has one reason for most."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_)
    app.command()(check)
    app.command()(schema)


def list_(json: JsonOption = False) -> None:
    """List the shipped scenarios.

    \b
    Example: batchlab scenario list
    """
    from batchlab.scenario import loader

    found = loader.shipped()
    if json:
        output.show_json(
            [{"name": one.name, "teaches": one.teaches, "file": str(one.path)} for one in found]
        )
        return
    output.show(output.table(("name", "teaches"), [(one.name, one.teaches) for one in found]))


def check(
    name: ScenarioArgument,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="Draw the arrivals from this seed in place of the scenario's.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a scenario, and draw what arrives when.

    Its traces are read whole, and nothing of it is run.

    \b
    Example: batchlab scenario check claims-month-end
    """
    from batchlab.scenario import curve, loader
    from batchlab.scenario.expand import expand

    path = loader.find(name)
    scenario = loader.load(path)
    schedule = expand(scenario, seed)
    if not schedule.jobs:
        raise UsageError(
            f"Nothing arrives in the scenario {path}.",
            remedy="Give its arrivals a higher rate or a later until, or another --seed; from, "
            "until and limit may leave nothing of a trace.",
        )
    seen = curve.of(scenario, schedule.jobs)
    from batchlab.cli import curves, doubts

    doubtful = list(doubts.of(scenario, schedule, seen))
    if json:
        output.show_json({**_facts(scenario, schedule, seen), "doubts": doubtful})
        return
    tasks = sum(column.tasks for column in seen.columns)
    output.show(
        f"{path} {'can be run' if doubtful else 'is fine'}: scenario {scenario.name}, "
        f"{output.count(len(schedule.jobs), 'job')}, {output.count(tasks, 'task')}, "
        f"{output.span(seen.work_s)} of work\n\n"
        f"{output.visible(scenario.about)}\n"
    )
    if told := list(_traces(scenario)):
        output.show("\n".join(told) + "\n")
    output.show(curves.text(scenario, seen, fancy=_fancy()))
    if doubtful:
        output.say("\nIs this meant?")
    for line in (*(f"  {one}" for one in doubtful), *_odd(schedule.odd)):
        output.say(line)


def _fancy() -> bool:
    """Whether whoever reads it can show more than ASCII."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def _traces(scenario: Scenario) -> Iterator[str]:
    """How much of each trace can be used, and what time it was when the scenario begins."""
    from batchlab.scenario.traces import Trace

    for source in scenario.arrivals:
        if isinstance(source, Trace):
            read = source.reading()
            of = f"{len(read.rows):,} of {output.count(read.records, 'record')} can be used"
            begins = source.begins()
            clock = f"; the scenario begins at {begins} of its clock" if begins else ""
            yield f"Trace {source.path.name}: {of}{clock}"


def _odd(odd: Sequence[Odd]) -> Iterator[str]:
    """What is odd in the traces, by kind, with the first record of each."""
    from batchlab.scenario.traces import summary

    kinds = summary(odd)
    if kinds:
        yield f"\n{output.count(len(odd), 'odd record')} in traces:"
    for kind in kinds[:ODD_SHOWN]:
        yield f"  {kind.file}:{kind.first_line}: {kind.what}: {kind.done}" + (
            f", and {kind.count - 1:,} more such" if kind.count > 1 else ""
        )
    if len(kinds) > ODD_SHOWN:
        yield f"  {len(kinds) - ODD_SHOWN} more kinds; --json lists every record."


def _facts(scenario: Scenario, schedule: Schedule, seen: Curve) -> dict[str, object]:
    from batchlab.scenario.traces import Trace

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


def schema() -> None:
    """Print the JSON Schema of the scenario file, for editors.

    \b
    Example: batchlab scenario schema > scenario.schema.json
    """
    from batchlab.scenario.schema import json_schema

    output.show_json(json_schema())
