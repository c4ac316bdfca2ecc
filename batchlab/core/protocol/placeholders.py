"""Placeholders in the command of a job file, and their values.

Invariant: `expand` can expand every command that `check` accepts, and an output name never leads
out of the task's folder. A literal brace is written twice.

    {input}           path of the task's item        {output:NAME}   path to write an output to
    {inputs}          one argument per item          {params.KEY}    a parameter of the job
    {inputs_list}     a file with a path per line    {task}          index of the task
    {scratch}         the task's own folder          {code}          the job's code folder
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from batchlab.core.task_context import name_problem

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SINGLE = ("input", "inputs_list", "task", "scratch", "code")
_KNOWN = (*(f"{{{name}}}" for name in (*_SINGLE, "inputs")), "{output:NAME}", "{params.KEY}")


def check(template: Sequence[str], params: Collection[str] | None = None) -> list[str]:
    """Return the problems of a command, one sentence each. `params` are the existing keys."""
    problems = [] if template else ["The command is empty."]
    for argument in template:
        for token in _TOKEN.finditer(argument):
            if problem := _problem(argument, token, params):
                problems.append(problem)  # noqa: PERF401 - a comprehension hides the two loops
    if template and "{inputs}" in template[0]:
        problems.append("The program itself cannot be {inputs}.")
    return problems


def _problem(argument: str, token: re.Match[str], params: Collection[str] | None) -> str | None:
    text, name = token[0], token[1]
    if text in ("{{", "}}"):
        return None
    if name is None:
        return f"A single '{text}' in {argument!r}: write it twice to mean the character."
    if name == "inputs":
        return None if text == argument else f"{{inputs}} must stand alone, not in {argument!r}."
    if name.startswith("output:"):
        output = name.removeprefix("output:")
        problem = name_problem(output.removesuffix("/"))
        return f"The output name {output!r} {problem}." if problem else None
    if name.startswith("params."):
        key = name.removeprefix("params.")
        known = params is None or key in params
        return None if key and known else f"The job has no parameter {key!r} for {text}."
    if name in _SINGLE:
        return None
    return f"There is no placeholder {text}; there are {', '.join(_KNOWN)}."


def used(template: Sequence[str]) -> list[str]:
    """Return the placeholders in a command without their braces, in order, each once."""
    return list(dict.fromkeys(_names(template)))


def outputs(template: Sequence[str]) -> list[str]:
    """Return the names of the outputs in a command, in order, each once.

    The name of a folder ends in a slash.
    """
    names = (name.removeprefix("output:") for name in used(template) if name.startswith("output:"))
    return list(names)


def _names(template: Sequence[str]) -> Iterator[str]:
    for argument in template:
        for token in _TOKEN.finditer(argument):
            if token[1] is not None:
                yield token[1]


def expand(
    template: Sequence[str],
    values: Mapping[str, str],
    inputs: Sequence[str],
    output: Callable[[str], str],
) -> list[str]:
    """Return the arguments of a command.

    `values` has the values of the other placeholders by name. Raise KeyError if one is missing.
    """

    def one(token: re.Match[str]) -> str:
        if token[1] is None:
            return token[0][0]
        name = token[1]
        return output(name.removeprefix("output:")) if name.startswith("output:") else values[name]

    arguments: list[str] = []
    for argument in template:
        if argument == "{inputs}":
            arguments.extend(inputs)
        else:
            arguments.append(_TOKEN.sub(one, argument))
    return arguments
