"""What a client asks of schedules.

Invariant: as the client itself: cheap to import, every failure one of batchlab's own errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from batchlab.calls import Calls

if TYPE_CHECKING:
    from batchlab.jobdef import JobDef
    from batchlab.model import Json
    from batchlab.timetable import DueView, RunView, SchedulesView, ScheduleView

_ALL = "/v1/schedules"


class ScheduleCalls(Calls):
    """The part of `Client` that is about schedules."""

    def add_schedule(
        self, schedule: Mapping[str, Json], job: JobDef, *, replace: bool = False
    ) -> ScheduleView:
        """Keep a schedule, described as in POST /v1/schedules, with the job that it runs; Refused
        where another one has its name, unless it is to `replace` that."""
        from batchlab.protocol import wire

        body = {"schedule": schedule, "job": wire.job_to_json(job), "replace": replace}
        return cast("ScheduleView", self._call("POST", _ALL, body=body))

    def schedules(self) -> SchedulesView:
        """All schedules by name, each with its last run, and what was missed."""
        return cast("SchedulesView", self._call("GET", _ALL))

    def schedule(self, name: str) -> ScheduleView:
        """One schedule with its runs."""
        return cast("ScheduleView", self._call("GET", _of(name)))

    def coming(self, name: str, *, count: int = 10) -> list[DueView]:
        """Its next due times."""
        return cast("list[DueView]", self._call("GET", _of(name, "/next"), count=count)["times"])

    def pause_schedule(self, name: str) -> ScheduleView:
        """Start nothing until it is resumed."""
        return cast("ScheduleView", self._call("POST", _of(name, "/pause")))

    def resume_schedule(self, name: str) -> ScheduleView:
        """Go on with what falls due from now on."""
        return cast("ScheduleView", self._call("POST", _of(name, "/resume")))

    def remove_schedule(self, name: str) -> ScheduleView:
        """Forget it; a job of it that runs is finished."""
        return cast("ScheduleView", self._call("POST", _of(name, "/remove")))

    def run_schedule(self, name: str, token: str) -> RunView:
        """Run it now; the same token again is the same run."""
        return cast("RunView", self._call("POST", _of(name, "/run"), body={"token": token}))


def _of(name: str, what: str = "") -> str:
    return f"{_ALL}/{quote(name, safe='')}{what}"
