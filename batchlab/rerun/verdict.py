"""Whether a task did here what it did on the grid, and what was not the same here.

Invariant: a function of what `task.json` says and how the run ended. Imported by the process that
runs the task: standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchlab.model import Failure, FailureKind
from batchlab.protocol import values
from batchlab.protocol.fingerprint import fingerprint
from batchlab.rerun.folder import Ended, Told
from batchlab.worker import environment

SAME, DIFFERENT, NOT_AT_ALL = "same", "different", "not at all"
SUCCEEDED, FAILED, LEFT = "succeeded", "failed", "left"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`word`: "same" (it failed as on the grid), "different", "not at all" (it did not fail);
    "succeeded" or "failed" where it did not fail on the grid; "left" where nobody saw its end.
    `here` and `there` are fingerprints, "" where there was no failure."""

    word: str
    sentence: str
    here: str = ""
    there: str = ""
    differences: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """For a person."""
        if not self.differences:
            return [self.sentence]
        return [
            self.sentence,
            "What is known to be different here:",
            *(f"  - {one}" for one in self.differences),
        ]


def failure_of(told: dict[str, Any] | None) -> Failure | None:
    """The Failure with these fields."""
    if told is None:
        return None
    return Failure(**{"task": 0, **told, "kind": FailureKind(told["kind"])})


def judge(told: Told, ended: Ended, environ: Mapping[str, str] = os.environ) -> Verdict:
    """Hold what happened here against what happened on the grid. `environ` is the user's own
    environment: the command names the variables that it keeps back from the task."""
    differences = [*_differences(told, environ), *told.notes]
    there, here = failure_of(told.failure), failure_of(ended.failure)
    prints = (fingerprint(here) if here else "", fingerprint(there) if there else "")
    word, sentence = _word(told, ended, there, here, *prints)
    return Verdict(word, sentence, *prints, differences)


def _word(
    told: Told,
    ended: Ended,
    there: Failure | None,
    here: Failure | None,
    print_here: str,
    print_there: str,
) -> tuple[str, str]:
    name = told.name
    if ended.left:
        return LEFT, f"{name} was left before its end, so it cannot be compared."
    if here and there:
        if print_here == print_there:
            return SAME, f"{name} failed the same way as on the grid ({print_here}): {here.reason}"
        return DIFFERENT, (
            f"{name} failed differently. Here ({print_here}): {here.reason} On the grid "
            f"({print_there}): {there.reason}"
        )
    if there:
        return NOT_AT_ALL, (
            f"{name} did not fail here. On the grid it did ({print_there}): {there.reason}"
        )
    on_grid = "succeeded" if told.state == "SUCCEEDED" else "has not come to an end"
    if here:
        return FAILED, f"{name} failed here ({print_here}): {here.reason} On the grid it {on_grid}."
    if told.state != "SUCCEEDED":
        return SUCCEEDED, f"{name} succeeded here. On the grid it {on_grid}."
    return SUCCEEDED, f"{name} succeeded, as on the grid{_result(told, ended)}."


def _result(told: Told, ended: Ended) -> str:
    for value in (told.value, ended.value):
        if next(values.references(value), None) is not None or values.kind(value):
            return ""  # files and pickled objects, of which the same content has other names
    return ", with the same result" if told.value == ended.value else ", with another result"


def _differences(told: Told, environ: Mapping[str, str]) -> list[str]:
    if told.there is None:
        return []
    return environment.differences(environment.from_json(told.there), environment.here(environ))
