"""Staging of outcomes and cuts as JSON lines, from which DuckDB builds the tables.

Invariants: the memory in use grows only by one byte for each task. The lines contain when, where, and how each task
ended, but not the result values. The order of the lines is arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, StageName, TaskSet
from batchlab.core.ports import Cut
from batchlab.core.protocol import json_format
from batchlab.core.protocol.mended_inputs import is_mended, mended_sha256
from batchlab.core.protocol.settlement import fingerprint
from batchlab.reports.tables.schema import types

MAX_RUN_TIMES = 8_192
"""Maximum number of tasks' run times in one line of a staged file."""
MAX_REASON_CHARS = 500

_BUNDLE = (
    "stage",
    "bundle",
    "round",
    "attempt",
    "tasks",
    "first_task",
    "last_task",
    "source",
    "losses",
    "mended_sha256",
)
_OUTCOME = ("worker", "execution", "started_s", "ended_s", "run_s", "failed_run_s")
_COUNTS = ("succeeded", "failed", "retried", "cancelled")
_FAILURE = ("stage", "task", "is_final", "run_s", "kind", "error", "reason", "exit_code", "fingerprint")
_METRICS = ("task", "cpu_s", "memory_bytes", "input_bytes", "output_bytes", "input")
_RANGE = {"stage": "VARCHAR", "start": "BIGINT", "stop": "BIGINT"}

FILES: Mapping[str, Mapping[str, str]] = {
    # If only the table `tasks` has a column of `outcomes`, the table `tasks` determines the column's type.
    "outcomes": types("bundles", "tasks", names=(*_BUNDLE, *_OUTCOME, *_COUNTS), n="BIGINT", is_void="BOOLEAN"),
    "runs": {"n": "BIGINT", "stage": "VARCHAR", "first_task": "BIGINT", "run_s": "DOUBLE[]"},
    "failures": types("attempts", names=_FAILURE, n="BIGINT"),
    "metrics": types("attempts", names=_METRICS, n="BIGINT"),
    "cancelled": {"n": "BIGINT", **_RANGE},
    "planned": types("bundles", "tasks", names=(*_BUNDLE, "ready_s")),
    "rest": _RANGE,
}
"""Columns of each staged file with DuckDB's types. The column `n` is the number of the outcome."""


def plain(text: str) -> str:
    """Replace NUL characters, because tables cannot store NUL characters. An exception's message may contain NUL
    characters.
    """
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


class Staging:
    """Writer of the staged files of one job.

    `void_before` maps each stage whose plan a retry replaced to the first round that counts. The exit of the context
    manager closes the files, so the files can be read only after the exit.
    """

    def __init__(self, folder: Path, job: JobDef, void_before: Mapping[StageName, int]) -> None:
        self._job = job
        self._void_before = void_before
        self._files: dict[str, IO[str]] = {
            name: (folder / f"{name}.ndjson").open("w", encoding="utf-8") for name in FILES
        }
        self._outcomes = 0
        self._succeeded: dict[StageName, bytearray] = {}
        self.results_twice: dict[StageName, int] = {}
        """Number of additional successes of tasks that had already succeeded, by stage."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def _put(self, file: str, **fields: Any) -> None:
        self._files[file].write(json_format.dumps(fields) + "\n")

    def outcome(self, data: bytes) -> None:
        """Stage the bytes of a committed outcome."""
        outcome = json_format.outcome_from_json(json_format.loads(data))
        n, self._outcomes = self._outcomes, self._outcomes + 1
        bundle = outcome.bundle
        is_void = bundle.round < self._void_before.get(bundle.stage, 0)
        final = sum(failure.final for failure in outcome.failed)
        self._put(
            "outcomes",
            n=n,
            **_bundle(bundle),
            worker=outcome.worker,
            execution=outcome.execution,
            started_s=outcome.started_s,
            ended_s=outcome.ended_s,
            run_s=sum(outcome.run_s),
            failed_run_s=sum(failure.run_s for failure in outcome.failed),
            succeeded=len(outcome.succeeded),
            failed=final,
            retried=len(outcome.failed) - final,
            cancelled=len(outcome.cancelled),
            is_void=is_void,
        )
        self._runs(n, bundle.stage, outcome.succeeded, outcome.run_s)
        if not is_void:
            self._mark(bundle.stage, outcome.succeeded)
        for failure in outcome.failed:
            self._put(
                "failures",
                n=n,
                stage=bundle.stage,
                task=failure.task,
                is_final=failure.final,
                run_s=failure.run_s,
                kind=failure.kind.value,
                error=plain(failure.error)[:MAX_REASON_CHARS],
                reason=plain(failure.reason)[:MAX_REASON_CHARS],
                exit_code=failure.exit_code,
                fingerprint=fingerprint(failure),
            )
        for task, metrics in outcome.metrics:
            self._put("metrics", n=n, task=task, **{**metrics._asdict(), "input": plain(metrics.input) or None})
        for start, stop in outcome.cancelled.ranges:
            self._put("cancelled", n=n, stage=bundle.stage, start=start, stop=stop)
        for follow in outcome.follows:
            ready_s = outcome.ended_s + follow.delay_s
            self._put("planned", **_bundle(follow.bundle), ready_s=ready_s)

    def _runs(self, n: int, stage: StageName, tasks: TaskSet, run_s: tuple[float, ...]) -> None:
        at = 0
        for start, stop in tasks.ranges:
            for first in range(start, stop, MAX_RUN_TIMES):
                count = min(MAX_RUN_TIMES, stop - first)
                self._put("runs", n=n, stage=stage, first_task=first, run_s=run_s[at : at + count])
                at += count

    def _mark(self, stage: StageName, tasks: TaskSet) -> None:
        marks = self._succeeded.setdefault(stage, bytearray())
        for start, stop in tasks.ranges:
            if len(marks) < stop:
                marks.extend(bytes(max(stop - len(marks), len(marks) // 2)))
            if repeated := marks.count(1, start, stop):
                self.results_twice[stage] = self.results_twice.get(stage, 0) + repeated
            marks[start:stop] = b"\x01" * (stop - start)

    def cut(self, cut: Cut, otherwise_s: float) -> None:
        """Stage the bundles of a cut. A cut without a time gets the time `otherwise_s`."""
        ready_s = otherwise_s if cut.at_s is None else cut.at_s
        for bundle in cut.bundles:
            self._put("planned", **_bundle(bundle), ready_s=ready_s)

    def rest(self, stage: StageName, tasks: TaskSet) -> None:
        """Stage the tasks of a stage that did not succeed. The caller must stage all outcomes before."""
        marks = self._succeeded.get(stage, bytearray())
        for start, stop in tasks.ranges:
            for first, last in _gaps(marks, start, stop):
                for chunk in range(first, last, MAX_RUN_TIMES):
                    end = min(chunk + MAX_RUN_TIMES, last)
                    self._put("rest", stage=stage, start=chunk, stop=end)


def _bundle(bundle: Bundle) -> dict[str, Any]:
    return {
        "stage": bundle.stage,
        "bundle": bundle.id,
        "round": bundle.round,
        "attempt": bundle.attempt,
        "tasks": len(bundle.tasks),
        "first_task": bundle.tasks.first,
        "last_task": bundle.tasks.last,
        "source": None if is_mended(bundle) else bundle.source,
        "losses": bundle.losses,
        "mended_sha256": mended_sha256(bundle.source) or None,
    }


def _gaps(marks: bytearray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges of unmarked positions within [start, stop)."""
    at = start
    while at < stop:
        first = marks.find(0, at, stop)
        if first < 0:
            first = max(at, len(marks))
        if first >= stop:
            return
        last = marks.find(1, first, stop)
        at = stop if last < 0 else last
        yield first, at


def planned_tasks(job: JobDef, cuts: Iterable[Cut], void_before: Mapping[StageName, int]) -> dict[StageName, TaskSet]:
    """Return the tasks of each planned stage, from the stage's first cut.

    A chained stage has the same tasks as the stage that it follows.
    """
    first_cuts: dict[StageName, Cut] = {}
    for cut in sorted(cuts, key=lambda cut: (cut.stage, cut.round)):
        valid = cut.round >= void_before.get(cut.stage, 0)
        if valid and cut.seq == 0 and cut.planned is not None:
            first_cuts[cut.stage] = cut
    tasks: dict[StageName, TaskSet] = {}
    for stage in job.stages:
        if stage.chained:
            if (source := tasks.get(stage.after[0])) is not None:
                tasks[stage.name] = source
        elif cut_ := first_cuts.get(stage.name):
            tasks[stage.name] = TaskSet.union([cut_.left, *(b.tasks for b in cut_.bundles)])
    return tasks
