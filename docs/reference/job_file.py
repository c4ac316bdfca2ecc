"""Reference page of the job file, made from its JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchlab.core import text
from batchlab.core.installation import starter
from batchlab.core.job_definition import SPLITS
from batchlab.jobs.schema import SECTIONS, json_schema
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

A job file is one YAML mapping. `batchlab job check` reports all mistakes at once, each with its line
and a correction, without running your code. [Concepts](concepts.md) explains jobs, stages, and tasks.
`batchlab init` creates the following job file:

```yaml
"""


def _items_of_splits() -> str:
    """Return a table row for each kind of item that a stage reads from the input."""
    ways: dict[str, list[str]] = {}
    for way, split in SPLITS.items():
        ways.setdefault(split.item, []).append(f"`{way}`")
    rows = []
    for item, (first, *more) in ways.items():
        names = [f"`split: {first[1:]}", *more]
        text = f"{', '.join(names[:-1])}, or {names[-1]}" if more else names[0]
        rows.append(f"| reads the input, {text} | {item} |")
    return "\n".join(rows)


_NOTES = f"""\
## Arguments and results of functions

The function of a Python stage has one or two parameters: the task's item, and optionally the task's context:

```python
def parse(item, ctx):
    return {{"file": item.name, "lines": item.read_text().count("\\n"), "year": ctx.params["year"]}}
```

| stage | `item` |
| --- | --- |
{_items_of_splits()}
| follows one stage | the result of that stage's function |
| follows several stages | a mapping from each stage's name to its result |
| `gather: all`, `gather: {{by: FIELD}}` | the list of all results, or of the results of one group |

A `File` has the input file's `name`, `path`, `size`, `open()`, `read_text()`, and `read_bytes()`.
`open()` reads bytes, and `open("r")` reads text, as the module `csv` needs it.
A `File` can be used as a path, as in `open(item)`.

The context `ctx` has the attributes `params`, `job`, `stage`, `task` (the index of the task),
`attempt` (from 1), and `scratch` (a folder that is removed after the task). The method
`ctx.save(content, name)` stores bytes or a file and returns a `File`.

The result of a function is a JSON value, which may contain a `File` at any place. The job's results
contain the file as `files/STAGE/TASK/NAME`. A result with a date, a set, or an object of your own
class makes the task fail. Convert such values to text.

If the function raises an exception, the attempt fails. `batchlab job logs` shows the output of the
function. The current folder of a task is empty. Use `Path(__file__).parent / "rates.csv"` to read a
file from the folder of your code. Packages that your code imports must be in the code folder, or
installed on the workers. On `local`, the workers use batchlab's own environment.

## Placeholders of a command

| placeholder | value |
| --- | --- |
| `{{input}}` | path of the file that contains the task's item |
| `{{inputs}}` | one argument for each item of the task; the placeholder must be an argument of its own |
| `{{inputs_list}}` | path of a file that contains the path of each item, one path per line |
| `{{output:NAME}}` | path for an output of the task; a `NAME` that ends with `/` is a folder |
| `{{params.KEY}}` | value of the job's parameter `KEY` |
| `{{task}}` | index of the task in its stage, from 0 |
| `{{scratch}}` | path of a folder for temporary files, which is removed after the task |
| `{{code}}` | path of the folder with your code |

Write a literal brace twice: `awk "{{{{print $1}}}}"`.

## Durations, sizes, and truth values

- A duration is {text.DURATION_FORMS}.
- A size is {text.SIZE_FORMS}. KiB, MiB, GiB, and TiB are powers of 1024; kB,
  MB, GB, and TB are powers of 1000.
- A job file is YAML 1.2: only `true` and `false` are truth values. batchlab refuses a plain `yes`,
  `no`, `on`, or `off`, unless the value of the key is always text. A mapping may not repeat a key.
  Anchors and `<<` work.

## Parameters from the command line

The option `--set KEY=VALUE` replaces the default value of a parameter. `VALUE` is one YAML scalar: `5`
is a number, `true` is a truth value, and `'"5"'` is text. If the default value is text, `VALUE` is
always text.
"""


def reference() -> str:
    """The reference page in Markdown."""
    schema = json_schema()
    pages = [_HEAD + starter()["job.yaml"] + "```\n"]
    for loc, model in SECTIONS.items():
        own = schema if loc == () else schema["$defs"][model.__name__]
        pages.append(section(_TITLES[loc], own))
    pages.append(_NOTES)
    return "\n".join(pages)


def section(title: str, schema: Mapping[str, Any]) -> str:
    """A section in Markdown with a table of the keys of `schema`."""
    lines = [f"## {title}", "", schema["description"], ""]
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
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
