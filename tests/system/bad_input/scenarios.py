"""Invalid scenarios for forecasts and replays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.support.scenarios.files import FULL, changed
from tests.system.bad_input.case import Case, nothing

CHECK = ("scenario", "check", "peak.yaml")
SIMULATE = ("scenario", "simulate", "peak.yaml")
POISSON = "poisson: {per_hour: 60, until: 1h}"


def scenario(text: str | bytes) -> Callable[[Path], None]:
    """Return a function that writes a scenario with this text."""
    content = text.encode() if isinstance(text, str) else text
    return lambda folder: _write(folder, content)


def _write(folder: Path, content: bytes) -> None:
    (folder / "peak.yaml").write_bytes(content)


def trace(text: str, columns: str = "columns: {at: at}") -> Callable[[Path], None]:
    """Return a function that writes a scenario whose arrivals are a table with this text."""

    def make(folder: Path) -> None:
        (folder / "t.csv").write_text(text)
        _write(folder, changed(POISSON, f"trace: {{file: t.csv, {columns}}}").encode())

    return make


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "peak.yaml")


def trace_of_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "t.csv")
    _write(folder, changed(POISSON, "trace: {file: t.csv, columns: {at: at}}").encode())


def a_job_file(folder: Path) -> None:
    _write(folder, (folder / "job.yaml").read_bytes())


CASES = [
    Case("scenario nowhere", "names a scenario that is not there", "no such scenario", nothing, CHECK),
    Case(
        "scenario misspelt",
        "misspells the name of a shipped scenario",
        "Did you mean 'spot-wave'?",
        nothing,
        ("scenario", "simulate", "spot-waves"),
    ),
    Case("scenario a pipe", "names a pipe as the scenario", "it is not a file", pipe, CHECK),
    Case(
        "scenario Latin-1",
        "saves a scenario in Latin-1",
        "not UTF-8 text",
        scenario(FULL.replace("peak", "Höhe").encode("latin-1")),
        CHECK,
    ),
    Case("scenario a job", "takes a job file for a scenario", "There is no key 'input' here", a_job_file, CHECK),
    Case(
        "scenario without jobs",
        "says none of the jobs that arrive",
        "'jobs' is missing",
        scenario("name: a\nabout: b\narrivals: [{job: c, at: 0s}]\npools: {default: {max: 1}}\n"),
        CHECK,
    ),
    Case(
        "scenario past",
        "lets jobs arrive before the beginning",
        "is not a duration",
        scenario(changed("at: 5m", "at: -5m")),
        SIMULATE,
    ),
    Case(
        "scenario no room",
        "gives a task more slots than an instance has",
        "it would never run",
        scenario(changed("{name: parse, task: 4s}", "{name: parse, task: 4s, slots: 3}")),
        SIMULATE,
    ),
    Case(
        "trace nowhere",
        "names a trace that is not there",
        "is not there",
        scenario(changed(POISSON, "trace: {file: last-month.swf}")),
        SIMULATE,
    ),
    Case("trace a pipe", "names a pipe as the trace", "is not there", trace_of_a_pipe, CHECK),
    Case("trace empty", "names an empty trace", "is empty", trace(""), CHECK),
    Case(
        "trace without the column",
        "maps a column that the trace has not",
        "has no column 'at'",
        trace("when\n1\n"),
        CHECK,
    ),
    Case(
        "trace of nonsense",
        "names a trace of which nothing can be used",
        "None of the 2 records",
        trace("at\nsoon\nlater\n"),
        CHECK,
    ),
]
