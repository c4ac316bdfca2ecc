"""Jobs that pass every check but do not do what their user wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.system.bad_input.case import both, put, swap

HANDLERS = """\
import subprocess, sys, time
from pathlib import Path

def one(item):
    return item

def size(item):
    return item.size

def text(item):
    return Path(item).read_text()

def length(item):
    return len(item)

def fails_for_two(item):
    if item == 2:
        raise ValueError("no twos")
    return {"number": item}

def hogs(item):
    if item == 2:
        kept = [b"x" * (16 << 20) for _ in range(40)]
        time.sleep(600)
    return item

def hogs_in_a_program(item):
    if item == 2:
        code = "import time; x = b'x' * (600 << 20); time.sleep(600)"
        subprocess.run([sys.executable, "-c", code])
    return item

def keep(item, ctx):
    return ctx.save(item.path, item.name)

def name(item):
    return item.name
"""

JOB = """\
name: job
input: {files: data/*, split: items}
stages:
  - {name: one, python: "work:one", retry: 1}
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A job and its expected result. `says` is a part of the output of `batchlab run`. `kept` are the results that are
    still fetched: those of each final stage, in the order of its tasks."""

    name: str
    does: str
    says: str
    make: Callable[[Path], None]
    code: int = 1
    kept: Mapping[str, object] = field(default_factory=lambda: {"one": []})

    def scene(self, folder: Path) -> None:
        sound(folder)
        self.make(folder)


def sound(folder: Path) -> None:
    """Write a job of three items, each of which is returned."""
    (folder / "data").mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    (folder / "work.py").write_text(HANDLERS)
    (folder / ITEMS).write_text("1\n2\n3\n")


# --- Scenes --------------------------------------------------------------------------------------

ITEMS = "data/items.jsonl"
LONG = 100_000_000


def code(text: str) -> Callable[[Path], None]:
    """Return a function that writes this code and one item."""
    return both(put("work.py", text), put(ITEMS, "1\n"))


def command(text: str) -> Callable[[Path], None]:
    """Return a function that writes this command in place of the handler, and one item."""
    return both(swap('python: "work:one"', f"command: {text}"), put(ITEMS, "1\n"))


def items(content: str | bytes, split: str = "items") -> Callable[[Path], None]:
    return both(put(ITEMS, content), swap("split: items", f"split: {split}"))


def long_item(folder: Path) -> None:
    """Write a JSON text of 100 MB between two short ones."""
    items(b'1\n"' + b"x" * LONG + b'"\n[2]\n')(folder)


def long_line(folder: Path) -> None:
    """Write a line of 100 MB between two short ones."""
    items(b"1\n" + b"x" * LONG + b"\n2", "lines, size: 1")(folder)


def calls(name: str) -> Callable[[Path], None]:
    return swap("work:one", f"work:{name}")


def more(*stages: str) -> Callable[[Path], None]:
    """Return a function that adds stages to the job."""
    return swap("retry: 1}\n", "retry: 1}\n" + "".join(f"  - {{{stage}}}\n" for stage in stages))


ALL = 'name: all, python: "work:one", gather: all'

ODD = ['"', "$(touch run).csv", "%2e%2e", "'", "*", "-rf", "CON", "[a]", "a b", "a" * 200, "ü☃", "~"]
ODD.sort()
"""File names that some programs treat specially."""


def odd_names(folder: Path) -> None:
    (folder / ITEMS).unlink()
    for name in ODD:
        (folder / "data" / name).write_text(name)
    swap("split: items", "split: file")(folder)


def circles(folder: Path) -> None:
    """Add links to a parent, to themselves, and to a missing target, next to two files."""
    (folder / "data/deep").mkdir()
    (folder / "data/deep/4.jsonl").write_text("4\n")
    for name, target in (("deep/up", ".."), ("self", "self"), ("gone", "nowhere")):
        (folder / "data" / name).symlink_to(target)
    # The code folder must not contain such links.
    put("src/work.py", HANDLERS)(folder)
    swap("data/*, split: items}", "data/**/*.jsonl, split: items}\ncode: src")(folder)


# --- The table -----------------------------------------------------------------------------------

LOADING = [
    Job(
        "import raises",
        "has a module that raises when it is imported",
        "Loading work:one failed: RuntimeError: at import",
        code("raise RuntimeError('at import')\ndef one(item): ..."),
    ),
    Job(
        "import missing",
        "imports a package that the workers do not have",
        "needs the module 'numpyy': install it on the workers",
        code("import numpyy\ndef one(item): ..."),
    ),
    Job(
        "import exits",
        "calls sys.exit when the module is imported",
        "called sys.exit(3): keep what a script does under",
        code("import sys\nsys.exit(3)\ndef one(item): ..."),
    ),
    Job(
        "import dies",
        "ends the process when the module is imported",
        "Loading the handler killed its process: exit 3",
        code("import os\nos._exit(3)\ndef one(item): ..."),
    ),
    Job(
        "no attribute",
        "hopes that a star import has the handler",
        "The module work has no function 'one'",
        code("from os.path import *"),
    ),
    Job("not callable", "names a number as handler", "is not a function: its type is int", code("one = 5")),
    Job(
        "signature",
        "has a handler that takes three arguments",
        "it must take (item) or (item, ctx), and takes (a, b, c)",
        code("def one(a, b, c): ..."),
    ),
    Job(
        "no program",
        "runs a program that is not installed",
        "program 'frobnicate' is not installed on the worker",
        command("[frobnicate, '{input}']"),
    ),
    Job("folder", "runs a folder", "program '/tmp' cannot run", command("[/tmp]")),
    Job("exit 3", "runs a command that fails", "exit code 3", command("[sh, -c, 'exit 3']")),
    Job("signal", "runs a command that is killed", "exit code -9 (SIGKILL)", command("[sh, -c, 'kill -9 $$']")),
    Job(
        "no output",
        "runs a command that does not write its output",
        "The command did not write its output 'out.txt'",
        command("['true', '{output:out.txt}']"),
    ),
]

INPUT = [
    Job(
        "not JSON",
        "has a line that is no JSON",
        "items.jsonl is not JSON: expecting property name",
        items("1\n{oops}\n"),
    ),
    Job("NaN", "has a NaN in its items", "is the number nan, which JSON", items("1\nNaN\n")),
    Job("items not UTF-8", "has items in Latin-1", "Line 2 of raw/", items(b'1\n"caf\xe9"\n')),
    Job("deep item", "has an item of 100,000 lists", "nested too deeply", items("[" * 100_000)),
    Job(
        "lines not UTF-8",
        "reads a line as text that is none",
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0",
        both(items(b"good\n\xff\xfe\nfine\n", "lines, size: 1"), calls("text")),
        kept={"one": ["good\n", "fine\n"]},
    ),
    Job("zero bytes", "has a file of no bytes", "SUCCEEDED", both(items("", "file"), calls("size")), 0, {"one": [0]}),
    Job("no items", "splits a file of no bytes", "SUCCEEDED", items(""), 0),
    Job(
        "no items gathered", "gathers what comes of no items", "SUCCEEDED", both(items(""), more(ALL)), 0, {"all": [[]]}
    ),
    Job("only a header", "has a header and no lines", "SUCCEEDED", items("a,b", "lines, header: true"), 0),
    Job(
        "100 MB record",
        "has a record of 100 MB among small ones",
        "one/0 exception: TypeError: object of type 'int' has no len()",
        both(long_item, calls("length")),
        kept={"one": [LONG, 1]},
    ),
    Job(
        "100 MB line",
        "has a line of 100 MB among short ones",
        "SUCCEEDED",
        both(long_line, calls("size")),
        0,
        {"one": [2, LONG + 1, 1]},
    ),
    Job(
        "named twice",
        "names the same file twice",
        "SUCCEEDED",
        swap("data/*", f"[data/*, {ITEMS}]"),
        0,
        {"one": [1, 2, 3]},
    ),
    Job(
        "odd names",
        "has files with names that a shell would stumble over",
        "SUCCEEDED",
        both(odd_names, calls("keep")),
        0,
        {"one": [f"files/one/{i}/{name}" for i, name in enumerate(ODD)]},
    ),
    Job(
        "odd names for a command",
        "gives such files to a command",
        "SUCCEEDED",
        both(command("[cat, '{input}'], stdout: out.txt"), odd_names),
        0,
        {"one": [f"files/one/{i}/out.txt" for i in range(len(ODD))]},
    ),
    Job("circles", "has links that lead in circles", "SUCCEEDED", circles, 0, {"one": [4, 1, 2, 3]}),
]

# Without a time limit, a task can fail only for its memory, even on a busy machine.
MEMORY = [
    Job(
        name,
        "uses more memory than its limit",
        "1 task failed (1 of 3 in stage one)\n  one/1 memory: used more than its memory limit of 256 MiB",
        both(calls(name), swap("retry: 1}", "retry: 1, resources: {memory: 256 MiB}}")),
        kept={"one": [1, 3]},
    )
    for name in ("hogs", "hogs_in_a_program")
]

FAN_IN = [
    Job(
        "gather over failed",
        "gathers the results of a stage of which a task failed",
        "1 task failed (1 of 3 in stage one)\n  one/1 exception: ValueError: no twos",
        both(calls("fails_for_two"), more(ALL)),
        kept={"all": []},
    ),
    Job(
        "gather over survived",
        "does so, and allows one failure",
        "SUCCEEDED",
        both(calls("fails_for_two"), more(ALL), swap("name: job\n", "name: job\nfailure: {max_failures: 1}\n")),
        0,
        {"all": [[{"number": 1}, {"number": 3}]]},
    ),
    Job(
        "gather by",
        "gathers by a field that no result has",
        "Stage all gathers by 'region', but the result of task one/0 lacks this field",
        more(ALL.replace("gather: all", "gather: {by: region}")),
        kept={"all": []},
    ),
    Job(
        "join",
        "joins stages of different length",
        "one has 3, all has 1",
        more(ALL, 'name: both, python: "work:one", after: [one, all]'),
        kept={"both": []},
    ),
]

JOBS = [*LOADING, *INPUT, *MEMORY, *FAN_IN]
