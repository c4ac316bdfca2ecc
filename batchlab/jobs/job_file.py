"""Functions that load a job file and convert the job file into the job that the grid runs.

Invariants: a JobFile has passed every check. The content of a job file, its files, and the arguments alone determine
the job.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchlab.core import text as units
from batchlab.core.job_definition import SPLITS, InputDef, JobDef, StageDef
from batchlab.core.model import JobId, Json, StageName
from batchlab.core.pricing import price_book
from batchlab.jobs import checks, handler_lookup, yaml_source
from batchlab.jobs.schema import SHAPE, JobSpec, StageSpec, is_text
from batchlab.jobs.validation import validate
from batchlab.jobs.yaml_source import Problem, suggest

_NONE = "Write its path, or make one with `batchlab init`."


@dataclass(frozen=True, slots=True)
class JobFile:
    """Job file that has passed every check, with absolute paths and final parameters."""

    path: Path
    job: JobSpec
    code: Path
    """Folder of the user's code."""
    params: Mapping[str, Json]
    """Parameters of the job, with the overrides of the command line applied."""
    files: tuple[Path | str, ...]
    """Input files of the job in task order: local files, and S3 URLs as the user wrote the URLs."""

    def input_files(self) -> list[Path | str]:
        """Return the input files of the job in task order: local files, and S3 URLs as the user wrote the URLs."""
        return list(self.files)

    @property
    def urls(self) -> list[str]:
        """S3 URLs of the input, as the user wrote the URLs."""
        return [file for file in self.files if isinstance(file, str)]

    def name_of(self, file: Path) -> str:
        """Return a local input file's name relative to the job file, with "/" on every system."""
        return Path(os.path.relpath(file, self.path.parent)).as_posix()


def load(path: Path, overrides: Mapping[str, str] | None = None, *, needs_input: bool = True) -> JobFile:
    """Read and check the job file at `path`.

    `overrides` (`--set`) replace parameters. A missing input file is a mistake only with `needs_input`. Raise
    JobFileErrors with all mistakes of the file. The function does not run the user's code.
    """
    path = handler_lookup.absolute(path)
    document = yaml_source.parse(yaml_source.text_of(path, SHAPE.what, _NONE), is_text)
    if isinstance(document.data, dict) and {"jobs", "arrivals"} <= document.data.keys():
        raise yaml_source.wrong_kind(
            path,
            "There is no key 'jobs' here: this is a scenario, not a job file.",
            "`batchlab scenario check` checks it, `batchlab scenario simulate` estimates its cost, "
            "and `batchlab scenario replay` runs it.",
        )
    problems = list(document.problems)
    job: JobSpec | None = None
    params: dict[str, Json] = {}
    if document.data is not None or not problems:
        structure = validate(document.data, SHAPE, {problem.loc for problem in problems})
        problems += structure.problems
        problems += checks.run(structure, path.parent, needs_input=needs_input)
        job = structure.whole
        if job is not None and structure.sound(("params",)):
            params, refused = _override(job.params, overrides or {})
            problems += refused
    if problems or job is None:
        raise yaml_source.errors(path, document, problems)
    return JobFile(path, job, checks.Subject(job, path.parent).code, params, _files(job, path.parent))


def compile_job(
    jobfile: JobFile, *, job_id: JobId, token: str, code_key: str | None, input_keys: Sequence[str], submitted_s: float
) -> JobDef:
    """Return the definition of the job in the form that the grid runs.

    `input_keys` are the keys of the objects with the input files, in order. A start time such as `+10m` is relative to
    `submitted_s` (epoch seconds).
    """
    job = jobfile.job
    allowance = job.failure.max_failures
    return JobDef(
        id=job_id,
        name=job.name,
        stages=tuple(_stage(stage, job.upstream(i)) for i, stage in enumerate(job.stages)),
        submitted_s=submitted_s,
        input=InputDef(tuple(input_keys), job.input.split, task_size(job), job.input.header),
        code=code_key,
        params=tuple(jobfile.params.items()),
        max_failures=float(allowance.strip(" %")) if isinstance(allowance, str) else allowance,
        max_failures_percent=isinstance(allowance, str),
        fail_fast=job.failure.then == "stop",
        priority=job.priority,
        share=job.share or "",
        tags=tuple(job.tags.items()),
        token=token,
        max_cost_usd=None if job.max_cost is None else price_book.parse(job.max_cost),
        notify=tuple(map(checks.notify_def, job.notify)),
        start_at_s=None if job.at is None else units.start_s(job.at, submitted_s),
    )


def source_digest(jobfile: JobFile, code_digest: str) -> str:
    """Return a SHA-256 of everything that determines the results of the job.

    The source digest covers the keys of the job file, the parameters, the code, and the name, size, and time of each
    local input file.
    """
    facts: list[Json] = []
    for file in jobfile.files:
        if isinstance(file, Path):
            stat = file.stat()
            facts.append([jobfile.name_of(file), stat.st_size, stat.st_mtime_ns])
        else:
            facts.append([file])
    # The keys in `apart` do not affect the results of the job.
    apart = {"max_cost", "cron", "timezone", "notify", "share"}
    content = jobfile.job.model_dump(mode="json", exclude=apart)
    whole = [content, dict(jobfile.params), code_digest, facts]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _override(declared: Mapping[str, Json], overrides: Mapping[str, str]) -> tuple[dict[str, Json], list[Problem]]:
    params: dict[str, Json] = dict(declared)
    problems = []
    for key, text in overrides.items():
        if key not in declared:
            remedy = suggest(key, declared, "parameters")
            problems.append(Problem(None, f"--set {key}: there is no parameter '{key}'.", remedy))
            continue
        try:
            # If the default of a parameter is text, the value of the parameter stays text, so that 007 stays 007.
            as_text = isinstance(declared[key], str)
            params[key] = yaml_source.plain_text(text) if as_text else yaml_source.scalar(text)
        except yaml_source.ScalarRefused as refused:
            problems.append(Problem(None, f"--set {key}: {refused}", refused.remedy))
    return params, problems


def _files(job: JobSpec, folder: Path) -> tuple[Path | str, ...]:
    files: dict[Path | str, None] = {}
    for pattern in job.input.files:
        if checks.is_url(pattern):
            files[pattern] = None
        else:
            files.update((file, None) for file in handler_lookup.matches(pattern, folder))
    return tuple(files)


def task_size(job: JobSpec) -> int:
    """Return the amount of input per task in lines, bytes, or items."""
    size = job.input.size
    return SPLITS[job.input.split].default_size if size is None else units.size_bytes(size)


def _stage(stage: StageSpec, upstream: Sequence[str]) -> StageDef:
    return StageDef(
        name=StageName(stage.name),
        after=tuple(StageName(name) for name in upstream),
        gather=None if stage.gather is None else stage.gather.by,
        handler=stage.python,
        command=tuple(stage.command or ()),
        stdout=stage.stdout,
        timeout_s=stage.timeout,
        retry=stage.retry.rule(),
        slots=stage.resources.slots,
        gpus=stage.resources.gpus,
        memory_bytes=stage.resources.memory,
        bundle=stage.bundle,
        pool=stage.pool,
        side_effects=stage.side_effects,
        speculative_copies=stage.speculative_copies,
    )
