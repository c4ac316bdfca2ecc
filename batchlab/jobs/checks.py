"""Checks that concern several keys of a job file.

Invariants: a valid job file names only existing stages, handlers, parameters, and files. The stages of a valid job file
form a graph without a cycle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from batchlab.core import notifications, text
from batchlab.core.job_definition import SPLITS, NotifyDef, SplitBy
from batchlab.core.protocol import values
from batchlab.jobs import field_types, handler_lookup
from batchlab.jobs.field_types import NotifySpec
from batchlab.jobs.schema import JobSpec, StageSpec
from batchlab.jobs.validation import Structure
from batchlab.jobs.yaml_source import Loc, Problem, suggest


@dataclass(frozen=True, slots=True)
class Subject:
    """Job to check, and the folder to which the job's paths are relative."""

    job: JobSpec
    folder: Path

    @property
    def code(self) -> Path:
        return handler_lookup.absolute(self.folder / self.job.code)

    def stages(self) -> Iterator[tuple[Loc, StageSpec]]:
        for i, stage in enumerate(self.job.stages):
            yield ("stages", i), stage


def run(structure: Structure[JobSpec], folder: Path, *, needs_input: bool = True) -> list[Problem]:
    """Run the checks of a job file whose keys are valid, and return the problems that the checks find.

    A missing input file is a problem only with `needs_input`.
    """
    if structure.whole is None:
        return []
    subject = Subject(structure.whole, folder)
    problems: list[Problem] = []
    for check, places in _CHECKS:
        if structure.sound(*places) and (needs_input or check is not _input_files):
            problems.extend(check(subject))
    return problems


_OBJECT_URL = re.compile(r"s3://([a-z0-9][a-z0-9._-]+)(?:/(.*))?", re.DOTALL)


def is_url(pattern: str) -> bool:
    """Return whether an input is the URL of an object and not a pattern of local files."""
    return "://" in pattern


def bucket_and_key(url: str) -> tuple[str, str] | None:
    """Return BUCKET and KEY of a text with the form s3://BUCKET/KEY, or None for any other text.

    The scheme of input URLs is s3 on every backend. BUCKET is the bucket of the grid.
    """
    match = _OBJECT_URL.fullmatch(url)
    return (match[1], match[2] or "") if match else None


def _one_action(subject: Subject) -> Iterator[Problem]:
    for loc, stage in subject.stages():
        if stage.python is None and stage.command is None:
            message = f"Stage '{stage.name}' does not define what to run."
            remedy = "Write `python: module:function` or `command: [program, …]`."
            yield Problem(loc, message, remedy)
        elif stage.python is not None and stage.command is not None:
            message = f"Stage '{stage.name}' has both python and command."
            yield Problem((*loc, "command"), message, "Delete one of the two.", at_key=True)
        elif stage.stdout is not None and stage.command is None:
            message = "stdout is only for a command. A Python stage returns its result."
            yield Problem((*loc, "stdout"), message, "Delete stdout.", at_key=True)


def _code(subject: Subject) -> Iterator[Problem]:
    if not handler_lookup.is_folder(subject.code):
        what = "is a file" if handler_lookup.is_file(subject.code) else "does not exist"
        message = f"The code folder {subject.code} {what}."
        yield Problem(("code",), message, "Write a folder relative to the job file.")


def _handlers(subject: Subject) -> Iterator[Problem]:
    if not handler_lookup.is_folder(subject.code):
        return
    broken: set[str] = set()
    for loc, stage in subject.stages():
        module = (stage.python or "").partition(":")[0]
        if stage.python is None or module in broken:
            continue
        if problem := handler_lookup.missing(stage.python, subject.code):
            yield Problem((*loc, "python"), *problem)
            if problem[1] == handler_lookup.MEND:
                # Report a broken module only once, even if several stages use the module.
                broken.add(module)


def _placeholders(subject: Subject) -> Iterator[Problem]:
    for loc, stage in subject.stages():
        for i, argument in enumerate(stage.command or ()):
            # The first argument of a command is the program, for which a special rule applies.
            for message in values.check([argument] if i == 0 else ["program", argument]):
                remedy = "Write a literal brace twice, as in {{ and }}."
                yield Problem((*loc, "command", i), message, remedy)


def _params(subject: Subject) -> Iterator[Problem]:
    declared = subject.job.params
    for loc, stage in subject.stages():
        for i, argument in enumerate(stage.command or ()):
            for name in values.used_keys([argument]):
                key = name.removeprefix("params.")
                if key not in (name, "") and key not in declared:
                    message = f"The job has no parameter '{key}' for {{{name}}}."
                    remedy = suggest(key, declared, "parameters")
                    yield Problem((*loc, "command", i), message, remedy)


def _outputs(subject: Subject) -> Iterator[Problem]:
    for loc, stage in subject.stages():
        names = values.outputs(stage.command or ()) + ([stage.stdout] if stage.stdout else [])
        places = [f"{name.rstrip('/')}/" for name in names]
        for i, place in enumerate(places):
            clash = next((j for j in range(i) if place.startswith(places[j])), None)
            clash = next((j for j in range(i) if places[j].startswith(place)), clash)
            if clash is not None:
                message = f"The outputs '{names[clash]}' and '{names[i]}' have the same path."
                key = "stdout" if names[i] is stage.stdout else "command"
                yield Problem((*loc, key), message, "Give one of them another name.")


def _retries(subject: Subject) -> Iterator[Problem]:
    for loc, stage in subject.stages():
        for key, message, remedy in stage.retry.problems():
            yield Problem((*loc, "retry", key), message, remedy, at_key=True)


def _input_size(subject: Subject) -> Iterator[Problem]:
    split, size = subject.job.input.split, subject.job.input.size
    rules = SPLITS[split]
    if size is not None and not rules.size:
        message = f"With split: {split}, size has no meaning, because a task gets {rules.meaning.replace('`', '')}."
        remedy = f"Delete size, or write split: {_splits(other for other in SPLITS if SPLITS[other].size)}."
        yield Problem(("input", "size"), message, remedy, at_key=True)
    elif isinstance(size, str) and not rules.in_bytes:
        message = f"With split: {split}, size counts {split}, not bytes."
        yield Problem(("input", "size"), message, "Write a number such as 1000.")
    elif size is not None and text.size_bytes(size) < 1:
        yield Problem(("input", "size"), "A part of 0 bytes is empty.", "Write for example 8 MiB.")
    if subject.job.input.header and not rules.has_header:
        message = f"With split: {split}, a part cannot begin with a header line."
        remedy = f"Delete header, or write split: {_splits(other for other in SPLITS if SPLITS[other].has_header)}."
        yield Problem(("input", "header"), message, remedy, at_key=True)


def _splits(ways: Iterable[SplitBy]) -> str:
    *names, last = ways
    return f"{', '.join(names)} or {last}"


def _times(subject: Subject) -> Iterator[Problem]:
    if subject.job.at is not None and subject.job.cron is not None:
        message = "The job has both at, for one run, and cron, for repeated runs."
        yield Problem(("cron",), message, "Delete one of the two.", at_key=True)
    if subject.job.timezone != "UTC" and subject.job.cron is None:
        message = "timezone applies to cron, and the job does not have cron."
        yield Problem(("timezone",), message, "Delete it, or write cron.", at_key=True)


def _input_files(subject: Subject) -> Iterator[Problem]:
    for i, pattern in enumerate(subject.job.input.files):
        loc = ("input", "files", i)
        if is_url(pattern):
            if bucket_and_key(pattern) is None:
                remedy = "Write s3://bucket/prefix, or a local pattern."
                what = text.show_value(pattern)
                yield Problem(loc, f"{what} is not the URL of an S3 bucket.", remedy)
        else:
            yield from _matches(loc, pattern, subject.folder)


def _matches(loc: Loc, pattern: str, folder: Path) -> Iterator[Problem]:
    paths = handler_lookup.matches(pattern, folder)
    if not paths:
        message = f"No file matches {text.show_value(pattern)}, looked for in {folder}."
        remedy = "Write a pattern relative to the job file, such as data/*.csv."
        if pattern and handler_lookup.is_folder(folder / pattern):
            remedy = f"It is a folder: write '{pattern.rstrip('/')}/*'."
        yield Problem(loc, message, remedy)
    # Report only the first file name that cannot be in a key, because several such names usually have the same reason.
    unfit = next((path for path in paths if handler_lookup.unfit(path.name)), None)
    if unfit is not None:
        message = f"The name of the input file {str(unfit)!r} {handler_lookup.unfit(unfit.name)}."
        yield Problem(loc, message, "Rename it, or write a pattern that leaves it out.")


def _notify(subject: Subject) -> Iterator[Problem]:
    for i, notify_spec in enumerate(subject.job.notify):
        loc: Loc = ("notify", i)
        if sum(address is not None for address in (notify_spec.webhook, notify_spec.sns, notify_spec.target)) != 1:
            message = "A target of notify has exactly one of webhook, sns, and target."
            yield Problem(loc, message, "Write one of the three.")
            continue
        if problem := notifications.problem(notify_def(notify_spec)):
            yield Problem(loc, problem, "Correct it, or delete it.")


def notify_def(spec: NotifySpec) -> NotifyDef:
    """Return the notification target in the form that the grid uses."""
    ways = (("webhook", spec.webhook), ("sns", spec.sns), (notifications.NAMED, spec.target))
    # The default ("", "") is never used, because `_notify` refuses a target without an address.
    kind, to = next(((kind, to) for kind, to in ways if to is not None), ("", ""))
    return NotifyDef(kind, to, tuple(spec.on), spec.secret or "", spec.failures, spec.stuck_after)


_ANY = ("stages", "*")

_CHECKS: tuple[tuple[Callable[[Subject], Iterator[Problem]], tuple[Loc, ...]], ...] = (
    (_one_action, ((*_ANY, "python"), (*_ANY, "command"), (*_ANY, "stdout"))),
    (lambda subject: field_types.unique_names(subject.job.stages, ("stages",)), ((*_ANY, "name"),)),
    (lambda subject: field_types.order(subject.job.stages, ("stages",)), ((*_ANY, "name"), (*_ANY, "after"))),
    (lambda subject: field_types.gathers(subject.job.stages, ("stages",)), ((*_ANY, "after"), (*_ANY, "gather"))),
    (_code, (("code",),)),
    (_handlers, (("code",), (*_ANY, "python"))),
    (_placeholders, ((*_ANY, "command"),)),
    (_params, ((*_ANY, "command"), ("params",))),
    (_outputs, ((*_ANY, "command"), (*_ANY, "stdout"))),
    (_retries, ((*_ANY, "retry"),)),
    (_input_size, (("input", "split"), ("input", "size"), ("input", "header"))),
    (_times, (("at",), ("cron",), ("timezone",))),
    (_input_files, (("input", "files"),)),
    (_notify, (("notify",),)),
)
