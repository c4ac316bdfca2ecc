"""The verdict on a run: each expectation against its record, green, red or not judged.

Invariant: green is said only of what was measured in a run that came to its end. Money is not
judged in a compressed run, in which an instance lives shorter than on AWS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from batchlab.core.errors import UsageError
from batchlab.scenarios.model.values import Expectation
from batchlab.scenarios.verdicts.measures import MEASURES, Measure, Unit, Unknown
from batchlab.scenarios.verdicts.record import InjectedFault, Record

ENDED = "ended"
"""The row that says whether the run came to its end."""
ARRIVALS = "arrivals"
"""The row that says whether anything has been tried."""
_SLACK = 1e-9
"""Relative: 9 h are not exceeded by the last digit of a sum."""


class Color(StrEnum):
    """What became of an expectation."""

    GREEN = "green"
    RED = "red"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One expectation and what was measured, in `unit`; `template` "" is all jobs. `measured` is
    None where nothing could be, and infinite where something never ended. `why` says why it is
    not green."""

    measure: str
    template: str
    unit: Unit
    least: float | None
    most: float | None
    measured: float | None
    colour: Color
    why: str = ""

    def to_json(self) -> dict[str, object]:
        """As JSON has no infinity, that is None too."""
        measured = self.measured
        return {
            "measure": self.measure,
            "template": self.template,
            "unit": self.unit.value,
            "least": self.least,
            "most": self.most,
            "measured": None if measured is None or math.isinf(measured) else measured,
            "verdict": self.colour.value,
            "why": self.why,
        }


def judge(record: Record, expectations: Iterable[Expectation]) -> list[VerdictRow]:
    """One row for each expectation, and before them what hangs over all: a run that was cut is
    red, a fault that could not be injected, or not as it should, leaves it open what it would have
    done. UsageError for a measure that there is not."""
    return [*_judge_run(record), *(_judge_one(record, one) for one in expectations)]


def is_red(rows: Iterable[VerdictRow]) -> bool:
    """Whether a gate shall close."""
    return any(row.colour is Color.RED for row in rows)


def _judge_run(record: Record) -> Iterator[VerdictRow]:
    if record.cut:
        yield VerdictRow(ENDED, "", Unit.NUMBER, None, None, None, Color.RED, record.cut)
    if not record.jobs:
        why = "nothing arrived, so nothing was tried"
        yield VerdictRow(ARRIVALS, "", Unit.NUMBER, 1, None, 0, Color.RED, why)
    for fault in record.faults:
        if why := uncertainty(fault):
            name = f"fault {fault.name}"
            yield VerdictRow(name, "", Unit.NUMBER, None, None, None, Color.NOT_JUDGED, why)


def uncertainty(fault: InjectedFault) -> str:
    """Why it is not known what a fault would have done; empty where it was as it should be."""
    if fault.impossible:
        return f"it could not be injected: {fault.impossible}"
    return f"it did not go as it should: {fault.trouble}" if fault.trouble else ""


def measure_of(name: str, template: str = "") -> Measure:
    """UsageError where there is none, or none of one template."""
    measure = MEASURES.get(name)
    if measure is None:
        raise UsageError(
            f"There is no measure {name!r}.", remedy=f"There are {', '.join(MEASURES)}."
        )
    if template and not measure.by_template:
        raise UsageError(
            f"{name} is of a whole run, not of one job template ({template}).",
            remedy=f"Expect {name} beside `jobs`, not in it.",
        )
    return measure


def _judge_one(record: Record, wanted: Expectation) -> VerdictRow:
    measure = measure_of(wanted.measure, wanted.template)
    measured = measure.of(record, wanted.template)
    number = None if isinstance(measured, Unknown) else measured
    colour, why = _color(record, measure, wanted, measured)
    return VerdictRow(
        wanted.measure,
        wanted.template,
        measure.unit,
        wanted.least,
        wanted.most,
        number,
        colour,
        why,
    )


def _color(
    record: Record, measure: Measure, wanted: Expectation, measured: float | Unknown
) -> tuple[Color, str]:
    if measure.unit is Unit.USD and record.compressed != 1:
        return Color.NOT_JUDGED, "money is not judged in a compressed run"
    if isinstance(measured, Unknown):
        return Color.NOT_JUDGED, measured.why
    if math.isinf(measured):
        return Color.RED, "it never ended"
    if wanted.most is not None and measured > wanted.most + _SLACK * abs(wanted.most):
        return Color.RED, "more than expected"
    if wanted.least is not None and measured < wanted.least - _SLACK * abs(wanted.least):
        # In a run that was cut it might still have grown, but then the row `ended` is red.
        return Color.RED, "less than expected"
    if record.cut:
        return Color.NOT_JUDGED, "the run was cut before it had ended"
    return Color.GREEN, ""
