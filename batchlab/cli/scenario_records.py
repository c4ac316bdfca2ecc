"""Commands `batchlab scenario record`, `compare`, and `calibrate`, which read records of past runs.

Invariant: `batchlab scenario record` does not change the grid's folder, whether the grid is up or down.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import bills, output
from batchlab.cli.charts import AREA, LINE, Chart, number
from batchlab.cli.option_values import connect, home_of
from batchlab.cli.options import HOME, JSON, argument, option
from batchlab.core.api_types import pool_of
from batchlab.core.errors import NotFound, Refused, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import ENDED, JobId
from batchlab.runtime.home import Home
from batchlab.scenarios.forecast.comparison import Comparison, CurvePair, Difference, sample_curve
from batchlab.scenarios.model.values import PoolPlan

if TYPE_CHECKING:
    from batchlab.core.api_types import JobView
    from batchlab.core.fair_share import SharePolicy
    from batchlab.runtime.descriptor import Calibration
    from batchlab.runtime.factory import Backend
    from batchlab.scenarios.forecast.calibration import CalibratedValue, CalibrationResult
    from batchlab.scenarios.replay.measurements import Measurements
    from batchlab.scenarios.replay.recording import RecordedWorkload

RECORD = "Record of a run, which `scenario simulate` or `scenario replay` wrote with --out."


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """Arguments of `scenario record`."""

    jobs: tuple[str, ...]
    record: Path | None
    out: Path | None
    name: str | None
    home: Home


def write_scenario(request: RecordRequest, *, json: bool) -> None:
    """Write a scenario file of past jobs and the file of the scenario's trace, and print a summary of both files."""
    from batchlab.scenarios.replay import recording

    if request.jobs and request.record:
        raise UsageError("Jobs and --from exclude each other.", remedy="Leave out --from, or the jobs.")
    past = _of_record(request) if request.record else _of_jobs(request)
    path = request.out or Path(f"{past.name}.yaml")
    if path.exists() and request.out is None:
        raise Refused(f"The file {path} exists already.", remedy="Name another file with --out.")
    # The trace is written next to the scenario file, and could overwrite a record with the same name.
    if request.record and request.record.resolve() in {path.resolve(), path.with_suffix(".jsonl").resolve()}:
        raise UsageError(f"{path} would overwrite the record {request.record}.", remedy="Name another file with --out.")
    written = recording.write(past, path)
    places = {"scenario": str(written.scenario), "trace": str(written.trace)}
    jobs, tasks = output.count(written.jobs, "job"), output.count(written.tasks, "task")
    output.answer(
        json,
        {**places, **output.attributes(written, "jobs", "tasks", "task_s", "left_out")},
        f"{written.scenario} has {jobs} with {tasks} of {output.span(written.task_s)} in all. "
        f"The arrivals are in {written.trace}.",
    )
    if written.left_out and not json:
        output.say(f"Left out: {output.count(written.left_out, 'job')} without complete records.")


def _of_record(request: RecordRequest) -> RecordedWorkload:
    from batchlab.scenarios import record as records
    from batchlab.scenarios.replay import recording

    assert request.record
    record = records.read(request.record)
    return recording.from_record(record, _name(request.name or f"{record.scenario}-recorded"))


def _of_jobs(request: RecordRequest) -> RecordedWorkload:
    from batchlab.runtime import factory
    from batchlab.scenarios.replay import recording

    home = request.home
    facts = [bills.facts_of(home, text) for text in request.jobs or ("last",)]
    views: dict[str, JobView] = {fact.job["id"]: fact.job for fact in facts}
    for view in views.values():
        if view["state"] not in ENDED:
            remedy = "Wait for the end of the job with `batchlab job watch`, or cancel the job."
            raise UsageError(f"The job {view['id']} has not ended.", remedy=remedy)
    backend = factory.load(facts[0].backend)
    jobs, measured, shares = asyncio.run(_measure(backend, home, views))
    pools, policy = _fleet(home, backend)
    first = min(views.values(), key=lambda view: view["submitted_s"])
    name = _name(request.name or f"{first['name']}-recorded")
    return recording.from_jobs(jobs, measured, name, pools, policy, shares)


async def _measure(
    backend: Backend, home: Home, views: Mapping[str, JobView]
) -> tuple[list[tuple[JobView, JobDef]], dict[str, Measurements], SharePolicy | None]:
    """Return the definitions and the measurements of the jobs, and the fair-share policy of the grid."""
    from batchlab.core.protocol import object_keys
    from batchlab.jobs.attempts import definition
    from batchlab.manager.fair_share import policy_of
    from batchlab.runtime.factory import patience
    from batchlab.scenarios.replay.measurements import ObservedJob, measure

    objects = backend.open_objects(home)
    jobs, measured = [], {}
    for job, view in views.items():
        jobs.append((view, await definition(objects, JobId(job), patience())))
        measured[job] = await measure([ObservedJob(view["name"], view)], 0, objects, patience())
    shares = None
    with suppress(NotFound):  # a grid without a policy may lack the object
        shares = policy_of(await patience()(partial(objects.get, object_keys.SHARES)))
    return jobs, measured, shares


def _fleet(home: Home, backend: Backend) -> tuple[list[PoolPlan], Mapping[str, float]]:
    """Return the pools and the policy of the running grid, or of the last grid in the folder."""
    from batchlab.adapters.local.state_files import StateFile
    from batchlab.fleet import saved_state
    from batchlab.runtime import settings

    if home.record():
        with connect(home) as client:
            grid = client.grid()
        return [PoolPlan(pool_of(view)) for view in grid["pools"]], grid["settings"]
    state = StateFile(home.fleet / "groups.json").load()
    groups = saved_state.decode(state)[0] if state else {}
    pool_plans = [PoolPlan(group.pool) for group in groups.values()]
    policy = asdict(settings.with_home_settings(backend, home).manager)
    return pool_plans or [PoolPlan(pool) for pool in backend.pools], policy


def _name(text: str) -> str:
    """Return a valid name of a scenario that resembles `text`."""
    name = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:40]
    return name or "recorded"


def record(
    job: list[str] | None = argument("Ended job.", "JOB", default=None),
    from_: Path | None = option("Record of a `scenario replay`, which replaces the arguments JOB.", "RECORD", "--from"),
    out: Path | None = option(
        "Scenario file to write. The trace has the same name, with the suffix .jsonl. Default: NAME.yaml.", "FILE"
    ),
    name: str | None = option("Name of the scenario. Default: the name of the job."),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Write a scenario from past jobs, with their arrivals, sizes, and measured task times.

    A run of this scenario has the same jobs, tasks, and total run time.

    \b
    Example: batchlab scenario record last --out march.yaml
    """
    request = RecordRequest(tuple(job or ()), from_, out, name, home_of(home))
    write_scenario(request, json=json)


def compare(
    forecast: Path = argument(RECORD, "FORECAST"), fact: Path = argument(RECORD, "FACT"), json: bool = JSON
) -> None:
    """Compare a forecast of a scenario with a real run, and show all absolute and relative errors of the forecast.

    The command also compares two forecasts, A and B, such as forecasts of two policies.

    \b
    Example: batchlab scenario compare forecast.json fact.json
    """
    from batchlab.scenarios import record
    from batchlab.scenarios.forecast import comparison

    result = comparison.compare(record.read(forecast), record.read(fact))
    output.answer(json, result.to_json(), comparison_text(result))


def calibrate(
    records: list[Path] = argument(RECORD, "RECORD"),
    out: Path | None = option(
        "File to which the computed values are written, for `scenario simulate` and `scenario plan`.", "FILE"
    ),
    json: bool = JSON,
) -> None:
    """Compute boot times, overheads, and task times from recorded runs.

    Each computed value is a median with its quartiles and the number of observations.

    \b
    Example: batchlab scenario calibrate monday.json tuesday.json --out local.json
    """
    from batchlab.scenarios import record
    from batchlab.scenarios.forecast import calibration

    result = calibration.calibrate([record.read(path) for path in records])
    if out is not None:
        calibration.write(result.calibration, out)
    document = {
        **output.attributes(result.calibration, "backend", "runs"),
        "quantities": [quantity.to_json() for quantity in result.quantities],
        "notes": list(result.notes),
    }
    output.answer(json, document, _calibration_text(result))
    if out is not None:
        output.say(f"The calibration is in {out}.")


def _calibration_text(result: CalibrationResult) -> str:
    rows = []
    for quantity in result.quantities:
        values = (quantity.value, quantity.low, quantity.high)
        median, low, high = (_quantity_text(quantity, value) for value in values)
        quartiles = "-" if quantity.low is None else f"{low} to {high}"
        source, problem = f"{quantity.observations:,} {quantity.what}", quantity.why and f"left out: {quantity.why}"
        rows.append((quantity.name, quantity.of or "-", median, quartiles, source, problem))
    source = f"Backend {result.calibration.backend}, from {output.count(result.calibration.runs, 'record')}"
    lines = [source, "", output.table(("what", "of", "median", "quartiles", "from", ""), rows)]
    if result.notes:
        lines += ["", *(f"Note: {note}." for note in result.notes)]
    return "\n".join(lines)


def _quantity_text(quantity: CalibratedValue, value: float | None) -> str:
    if value is None:
        return "-"
    return f"× {value:.3f}" if quantity.name == "stretch" else output.span(value)


def comparison_text(comparison: Comparison) -> str:
    """Return the comparison of a forecast with a real run as text, for `scenario compare` and `scenario replay`."""
    rows = [
        _row(difference)
        for difference in comparison.differences
        if (difference.forecast, difference.fact) != (None, None)
    ]
    first, second = comparison.names
    columns = ("measure", "jobs", first, second, comparison.error, "relative")
    at = "" if comparison.compressed == 1 else f", times divided by {comparison.compressed:g}"
    sides = f"{first} ({comparison.forecast_backend}) against {second} ({comparison.fact_backend})"
    rule = f"{comparison.error.capitalize()} is {first} minus {second}"
    lines = [f"Scenario {comparison.scenario}: {sides}{at}. {rule}", ""]
    lines.append(output.table(columns, rows))
    for curves in comparison.curves:
        lines += ["", _draw(curves, first, second)]
    if comparison.notes:
        lines += ["", *(f"Note: {note}." for note in comparison.notes)]
    return "\n".join(lines)


def _row(difference: Difference) -> tuple[str, ...]:
    unit, error, relative = difference.unit, difference.absolute, difference.relative
    error_text = "-" if error is None else f"{'-' if error < 0 else '+'}{number(abs(error), unit)}"
    relative_text = "-" if relative is None else f"{relative:+.1%}"
    values = (number(difference.forecast, unit), number(difference.fact, unit))
    return (difference.measure, difference.template or "all", *values, error_text, relative_text)


def _draw(curves: CurvePair, first: str, second: str) -> str:
    most = max((level for _, level in (*curves.forecast, *curves.fact)), default=0.0)
    relative = "" if curves.relative is None else f", {curves.relative:.1%} of the mean of {second}"
    title = f"{curves.what} ({LINE} {first}, {AREA} {second}); on average {curves.mean_error:,.3g} apart{relative}"
    if not most:
        return f"{curves.what}: none at any time in either"
    chart = Chart(curves.until_s, most)
    chart.area(sample_curve(curves.fact, curves.until_s, chart.width))
    chart.line(sample_curve(curves.forecast, curves.until_s, chart.width))
    return f"{title}\n{chart.text(output.span, lambda value: f'{value:,.4g}')}"


def load_calibration(file: Path | None, backend: str, compressed: float) -> Calibration | None:
    """Return the content of a calibration file, or None if `file` is None.

    Raise UsageError if the calibration belongs to another backend. Print a note if the numbers of the calibration may
    not fit the scenario's compression of time.
    """
    from batchlab.scenarios.forecast import calibration as calibrate

    if file is None:
        return None
    calibration = calibrate.read(file)
    if note := calibrate.check_fit(calibration, backend, compressed):
        output.say(f"Note: {note}.")
    return calibration
