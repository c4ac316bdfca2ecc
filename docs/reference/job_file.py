"""Reference page of the job file, made from its JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchlab.core import units
from batchlab.jobs.json_schema import json_schema
from batchlab.jobs.schema import SECTIONS
from batchlab.jobs.starter import JOB
from batchlab.jobs.yaml_source import Loc

_TITLES: dict[Loc, str] = {
    (): "The job",
    ("input",): "`input`",
    ("stages", "*"): "`stages`: each one",
    ("stages", "*", "gather"): "`gather` of a stage",
    ("stages", "*", "retry"): "`retry` of a stage",
    ("stages", "*", "resources"): "`resources` of a stage",
    ("failure",): "`failure`",
    ("notify", "*"): "`notify`: each one",
}

_HEAD = """\
<!-- Made from batchlab/jobs/schema.py. To make it again: python -m docs.reference docs -->

# The job file

A job file is one YAML mapping. Every mistake in it is reported at once, each with its line and
what to write instead, before anything is queued; none of your code is run for that. This is the
file that `batchlab init` writes:

```yaml
"""

_NOTES = f"""\
## What a function gets, and gives back

A function of a Python stage takes its item, or the item and the task's context:

```python
def parse(item, ctx):
    return {{"file": item.name, "lines": item.read_text().count("\\n"), "year": ctx.params["year"]}}
```

| stage | `item` |
| --- | --- |
| reads the input, `split: file`, `lines` or `bytes` | a `File` that holds the task's part |
| reads the input, `split: items` | the JSON value, or a list of `size` of them |
| follows a stage | what that stage's function has returned |
| follows several | a mapping: what each has returned, by the stage's name |
| `gather: all`, `gather: {{by: FIELD}}` | the list of all results, or of one group's |

A `File` has the input file's `name`, `path`, `size`, `open()`, `read_text()`, `read_bytes()`, and
can stand for a path, as in `open(item)`.

`ctx` has `params`, `job`, `stage`, `task` (its index), `attempt` (from 1), `scratch` (a folder that
is removed after the task) and `save(content, name)`, which keeps bytes or a file and returns a
`File`.

The result is a JSON value: null, true, false, numbers, text, lists, dicts, and a `File` wherever a
value may stand. The next stage is given that file, and with the job's results it lies in
`files/STAGE/TASK/NAME`. A date, a set or an object of your own fails the task: write it as text.

An exception fails the task's attempt. What is printed goes to the task's log, which `batchlab job
logs` shows. The current folder is an empty one; a file beside your code is
`Path(__file__).parent / "rates.csv"`. A package that your code imports lies in the code folder,
or is installed where the workers are: on `local` in batchlab's own environment.

## Placeholders of a command

| written | becomes |
| --- | --- |
| `{{input}}` | path of the task's item |
| `{{inputs}}` | one argument per item; stands alone |
| `{{inputs_list}}` | path of a file with a path per line |
| `{{output:NAME}}` | path to write an output to; a `NAME` that ends in `/` is a folder |
| `{{params.KEY}}` | a parameter of the job |
| `{{task}}` | index of the task in its stage, from 0 |
| `{{scratch}}` | a folder of the task's own, removed after it |
| `{{code}}` | the folder of your code |

A brace of your own is written twice: `awk "{{{{print $1}}}}"`.

## Durations, sizes and plain words

- A duration is {units.DURATION_FORMS}.
- A size is {units.SIZE_FORMS}; KiB, MiB, GiB and TiB count in 1024, kB, MB, GB and TB in 1000.
- The file is YAML 1.2: only `true` and `false` are truth values. A plain `yes`, `no`, `on` or
  `off` is refused where it could be taken for one. Keys may not repeat. Anchors and `<<` work.

## Parameters from the command line

`--set KEY=VALUE` replaces the default of a parameter that the file declares. The value is read as
one YAML scalar: `5` is a number, `true` a truth value, `'"5"'` text. Where the default is text,
the value stays text as it is written.
"""


def reference() -> str:
    """The reference page in Markdown."""
    schema = json_schema()
    pages = [_HEAD + JOB + "```\n"]
    for loc, model in SECTIONS.items():
        own = schema if loc == () else schema["$defs"][model.__name__]
        pages.append(section(_TITLES[loc], own))
    pages.append(_NOTES)
    return "\n".join(pages)


def section(title: str, schema: Mapping[str, Any]) -> str:
    """A section in Markdown with a table of the keys of `schema`."""
    lines = [f"## {title}", "", schema["description"], ""]
    lines += ["| key | value | unless said | meaning |", "| --- | --- | --- | --- |"]
    for key, field in schema["properties"].items():
        needed = key in schema.get("required", ())
        default = "required" if needed else _default(field)
        cells = [f"`{key}`", _form(field), default, field["description"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if field.get("title") == "duration" and default is not None:
        return f"`{default:g}s`"
    if default in (None, ""):
        return ""
    # YAML's true and false; a name, as of a time zone, is written as it is.
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _form(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return "mapping"
    if "title" in schema and "anyOf" in schema and "pattern" in schema["anyOf"][-1]:
        return str(schema["title"])
    if "anyOf" in schema:
        forms = [_form(one) for one in schema["anyOf"]]
        if forms[-1] == f"list of {forms[0]}":
            return f"{forms[0]}; one or a list"
        return " or ".join(dict.fromkeys(forms))
    for word in ("const", "enum"):
        if word in schema:
            values = schema[word] if word == "enum" else [schema[word]]
            return ", ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {_form(schema['items'])}"
    return _WORDS[schema["type"]] + _bounds(schema)


_WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "object": "mapping",
}


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return ""
    return f" from {low}" if high is None else f" from {low} to {high}"
