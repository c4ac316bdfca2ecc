"""Invalid code folders, inputs, and command lines."""

from __future__ import annotations

import os
from pathlib import Path

from tests.system.bad_input.case import CHECK, JOB, Case, both, job, link, nothing, put, swap


def endless_code(folder: Path) -> None:
    """Write a sparse file, which uses no disk space."""
    with (folder / "huge.bin").open("wb") as file:
        file.truncate(600 << 20)


def code_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


CODE = [
    Case("no function", "names a function that is not there", "work.py has no 'won'", swap("work:one", "work:won")),
    Case("no module", "names a module that is not there", "wrok", swap("work:one", "wrok:one")),
    Case("no colon", "writes module.function", "it must be module:function", swap("work:one", "work.one")),
    Case(
        "syntax", "has a syntax error in it", "work.py line 1 cannot be read as Python", put("work.py", "def one(:\n")
    ),
    Case("deep code", "nests 9,999 brackets in it", "cannot be read as Python", put("work.py", "one = " + "(" * 9999)),
    Case("NUL in code", "has a NUL in it", "cannot be read as Python", put("work.py", b"one = 1\0")),
    Case(
        "Latin-1 code", "has code in Latin-1", "cannot be read as Python", put("work.py", "one = 'ä'".encode("latin-1"))
    ),
    Case("no folder", "names a code folder that is not there", "does not exist", job(JOB + "code: src\n")),
    Case("file for code", "names a file as code folder", "is a file", job(JOB + "code: work.py\n")),
    Case("link out", "links out of the code folder", "is a link out of the code folder", link("etc", "/etc")),
    Case("link loop", "has a link to itself", "is a link out of the code folder", link("loop", "loop")),
    Case("dangling link", "has a link to nowhere", "is a link out of the code folder", link("gone", "nowhere")),
    Case("code pipe", "has a pipe in the code folder", "is neither a file nor a folder", code_pipe),
    Case("huge code", "has 600 MB beside the code", "Move data out of it", endless_code),
    Case("backslash", "has a backslash in a name", "has a backslash in its name", put("..\\..\\evil.py", "")),
    Case("not UTF-8 name", "has a name that is not UTF-8", "not UTF-8", put(os.fsdecode(b"caf\xe9.py"), "")),
]

INPUT = [
    Case("no match", "names a pattern that matches nothing", "No file matches 'dta/*'", swap("data/*", "dta/*")),
    Case(
        "empty folder",
        "names an empty folder",
        "No file matches 'none/*'",
        both(lambda f: (f / "none").mkdir(), swap("data/*", "none/*")),
    ),
    Case("folder", "names a folder as a file", "It is a folder: write 'data/*'", swap("data/*", "data/")),
    Case(
        "gone", "has an input that has gone", "No file matches", both(link("here", "gone.csv"), swap("data/*", "here"))
    ),
    Case(
        "link circle",
        "has a link to itself",
        "No file matches",
        both(link("data/loop", "loop"), swap("data/*", "data/loop")),
    ),
    Case("newline", "has a line break in a name", "holds a control character", put("data/a\nb", "x")),
    Case("Latin-1", "has a name that is not UTF-8", "is not UTF-8", put(os.fsdecode(b"data/caf\xe9"), "x")),
    Case("staged", "has a name that stores use themselves", "ends in '#' and digits", put("data/part#1", "x")),
    Case("URL", "names a web page", "is not the URL of an S3 bucket", swap("data/*", "https://example.com/a.csv")),
    Case("long pattern", "names a pattern of 5,000 letters", "No file matches", swap("data/*", "x" * 5000)),
]

COMMANDS = [
    Case(
        "odd path",
        "names a file with a line break and colours in its name",
        "There is no such job file",
        nothing,
        ("job", "check", "red\n\x1b[31m.yaml"),
    ),
    Case("set", "writes --set without a value", "is not KEY=VALUE", nothing, (*CHECK, "--set", "limit")),
    Case("set unknown", "sets a parameter that is not there", "limt", nothing, (*CHECK, "--set", "limt=2")),
    Case(
        "set list", "sets a parameter to a list", "It is a list or a mapping", nothing, (*CHECK, "--set", "limit=[1]")
    ),
    Case(
        "set huge",
        "sets a parameter to 5,000 digits",
        "is not a valid value",
        nothing,
        (*CHECK, "--set", "limit=" + "9" * 5000),
    ),
    Case(
        "backend",
        "names a backend that is not there",
        "Unknown backend 'azure'",
        nothing,
        ("run", "job.yaml", "--backend", "azure"),
    ),
    Case(
        "endpoint",
        "names an endpoint where none is used",
        "does not use an endpoint",
        nothing,
        ("run", "job.yaml", "--endpoint", "http://127.0.0.1:9"),
    ),
    Case(
        "endpoint word",
        "names no URL as endpoint",
        "is not a URL",
        nothing,
        ("run", "job.yaml", "--backend", "ministack", "--endpoint", "localhost"),
    ),
    Case(
        "pool",
        "writes a pool of 10^30 workers",
        "is not NAME:MIN-MAXxSLOTS",
        nothing,
        ("grid", "up", "--pool", f"default:0-{10**30}x1"),
    ),
    Case(
        "pool order",
        "writes a pool with MIN over MAX",
        "needs MIN ≤ MAX",
        nothing,
        ("grid", "up", "--pool", "default:4-2x1"),
    ),
    Case("no grid", "asks a grid that is not up", "No grid is up", nothing, ("job", "list"), 3),
    Case("init twice", "makes a first job where one is", "job.yaml", nothing, ("init", ".")),
]

CASES = [*CODE, *INPUT, *COMMANDS]
