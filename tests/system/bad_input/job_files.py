"""Invalid job files."""

from __future__ import annotations

import os
from pathlib import Path

from tests.system.bad_input.case import JOB, Case, both, job, nothing, swap


def bomb(folder: Path) -> None:
    """Write nine anchors with nine aliases each, which expand to 400 million values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    job("\n".join([*lines, JOB]))(folder)


def pipe(folder: Path) -> None:
    (folder / "job.yaml").unlink()
    os.mkfifo(folder / "job.yaml")


def folder_for_a_file(folder: Path) -> None:
    (folder / "job.yaml").unlink()
    (folder / "job.yaml").mkdir()


NOTATION = [
    Case(
        "long tag",
        "writes a tag of 10,000 letters",
        "has no meaning here",
        job(JOB + "tags: !" + "t" * 10_000 + " {}\n"),
    ),
    Case(
        "many mistakes",
        "pastes 1,000 lines of something else",
        "There are 951 more mistakes",
        job(JOB + "".join(f"key{i}: 1\n" for i in range(1001))),
    ),
    Case("no file", "names a file that is not there", "no such job file", nothing, ("job", "check", "jobs.yaml")),
    Case("a folder", "names a folder", "it is not a file", folder_for_a_file),
    Case("a pipe", "names a pipe that nobody writes to", "it is not a file", pipe),
    Case("broken", "forgets a bracket", "This is not YAML", swap("data/*", "[data/*")),
    Case("tabs", "indents with a tab", "This is not YAML", swap("  files", "\tfiles")),
    Case(
        "not UTF-8",
        "saves it in Latin-1",
        "not UTF-8 text, from byte 7 on",
        job(JOB.replace("bad", "b\xe4d").encode("latin-1")),
    ),
    Case("UTF-16", "saves it in UTF-16", "not UTF-8", job(JOB.encode("utf-16"))),
    Case("zip", "names a zip", "not UTF-8", job(b"PK\x03\x04\xff\xfe\x00\x00" * 99)),
    Case("NUL", "has a NUL in it", "This is not YAML", job(JOB + "tags: {a: \0}\n")),
    Case("empty", "saves nothing", "A job file is a mapping of keys", job("")),
    Case("comment", "leaves only a comment", "A job file is a mapping of keys", job("# later\n")),
    Case("list", "writes a list", "A job file is a mapping of keys", job("- name: bad\n")),
    Case("two", "writes two documents", "This is not YAML", job(f"{JOB}---\n{JOB}")),
    Case("long", "pastes 2 MB of data into it", "longer than", job(JOB + "# x\n" * 500_000)),
    Case("deep", "nests 10,000 lists", "nested deeper", job("params: " + "[" * 10_000)),
    Case("bomb", "multiplies anchors", "holds more than", bomb),
    Case(
        "python tag",
        "writes a tag that would run code",
        "has no meaning here",
        swap("{limit: 1}", "!!python/object/apply:os.system ['touch run']"),
    ),
    Case("key twice", "writes a key twice", "is already on line 1", job(JOB + "name: b\n")),
    Case("key list", "writes a list as a key", "A key must be a word", job(JOB + "? [a]\n: 1\n")),
]

VALUES = [
    Case("unknown key", "misspells a key", "Did you mean 'priority'?", job(JOB + "priorty: 1\n")),
    Case("missing key", "leaves out the stages", "'stages' is missing", job("name: bad\ninput: {files: data/*}\n")),
    Case("type", "writes a word for a number", "must be a whole number, not text", job(JOB + "priority: high\n")),
    Case("yes", "writes yes for true", "Write true", swap("data/*", "data/*\n  header: yes")),
    Case("name", "writes a name with spaces and dots", "cannot be '../Bad Job'", swap("name: bad", "name: ../Bad Job")),
    Case(
        "long name",
        "writes a name of 5,000 letters",
        "more than 40 characters",
        swap("name: bad", "name: " + "b" * 5000),
    ),
    Case("newline name", "writes a name with a line break", "cannot be", swap("name: bad", 'name: "b\\nd"')),
    Case(
        "unknown split",
        "splits by an unknown format",
        "'split' cannot be 'parquet'",
        swap("data/*", "data/*\n  split: parquet"),
    ),
    Case(
        "negative size",
        "wants parts of -5 lines",
        "-5 is not the size of a task",
        swap("data/*", "data/*\n  split: lines\n  size: -5"),
    ),
    Case(
        "size zero",
        "wants parts of no bytes",
        "A part of 0 bytes is empty",
        swap("data/*", "data/*\n  split: bytes\n  size: 0 MB"),
    ),
    Case(
        "size 10**30",
        "wants parts of 10^30 lines",
        "is not the size of a task",
        swap("data/*", f"data/*\n  split: lines\n  size: {10**30}"),
    ),
    Case(
        "bytes 10**30",
        "wants parts of 10^30 GiB",
        "larger than any disk",
        swap("data/*", f"data/*\n  split: bytes\n  size: {10**30} GiB"),
    ),
    Case(
        "memory unit",
        "measures memory in furlongs",
        "is not a size",
        job(JOB.replace("work:one", "work:one\n    resources: {memory: 5 furlongs}")),
    ),
    Case(
        "negative memory",
        "wants -1 GiB of memory",
        "is not a size",
        swap("work:one", "work:one\n    resources: {memory: -1 GiB}"),
    ),
    Case(
        "tiny memory",
        "wants 1 kB of memory",
        "less than the 16 MiB",
        swap("work:one", "work:one\n    resources: {memory: 1 kB}"),
    ),
    Case(
        "slots",
        "wants 10^30 slots",
        "must be at most 9999",
        swap("work:one", f"work:one\n    resources: {{slots: {10**30}}}"),
    ),
    Case(
        "timeout unit",
        "writes a time in fortnights",
        "is not a duration",
        swap("work:one", "work:one\n    timeout: 2 fortnights"),
    ),
    Case(
        "timeout 10**30",
        "wants a timeout of 10^30 days",
        "longer than a century",
        swap("work:one", f"work:one\n    timeout: {10**30} d"),
    ),
    Case(
        "negative timeout",
        "wants a timeout of -1 s",
        "is not a duration",
        swap("work:one", "work:one\n    timeout: -1"),
    ),
    Case("attempts", "wants 10^30 tries", "must be at most", swap("work:one", f"work:one\n    retry: {10**30}")),
    Case(
        "backoff",
        "multiplies waits by 10^300",
        "must be at most",
        swap("work:one", "work:one\n    retry: {factor: 1.0e300, attempts: 999}"),
    ),
    Case(
        "5,000 digits",
        "writes a number of 5,000 digits",
        "is not a valid value here",
        swap("limit: 1", "limit: " + "9" * 5000),
    ),
    Case("infinite", "writes an infinite number", "1e999 is not a valid value", swap("limit: 1", "limit: 1e999")),
    Case("failures", "allows 101 % failures", "a share such as 5%", job(JOB + "failure: {max_failures: 101%}\n")),
    Case("at", "starts it in the year 9999", "is too far in the future", job(JOB + "at: 9999-12-31T23:59:59Z\n")),
    Case(
        "no zone",
        "starts it at a time without a zone",
        "does not have a time zone",
        job(JOB + "at: 2026-01-31T06:00:00\n"),
    ),
    Case("30 February", "starts it on 30 February", "is not a start time", job(JOB + "at: 2026-02-30T06:00:00Z\n")),
    Case("surrogate", "writes half a character", "text must not contain", job(JOB + 'tags: {a: "\\ud83d"}\n')),
]

GRAPH = [
    Case(
        "cycle",
        "lets two stages follow each other",
        "The stages form a cycle: one → two → one",
        both(swap("after: []", "after: one"), swap("work:one", "work:one\n    after: two")),
    ),
    Case("itself", "lets a stage follow itself", "a cycle: two → two", swap("after: []", "after: two")),
    Case(
        "unknown stage",
        "names a stage that is not there",
        "The stage 'onne' in 'after' does not exist",
        swap("after: []", "after: onne"),
    ),
    Case("no stages", "has no stages", "'stages' is empty", job("name: bad\ninput: {files: data/*}\nstages: []\n")),
    Case("same name", "gives two stages one name", "is named 'one' already", swap("name: two", "name: one")),
    Case(
        "gather nothing",
        "gathers in the first stage",
        "nothing to gather",
        swap("work:one", "work:one\n    gather: all"),
    ),
    Case(
        "both",
        "says python and command",
        "has both python and command",
        swap("work:one", "work:one\n    command: [ls]"),
    ),
    Case("placeholder", "misspells a placeholder", "There is no placeholder {inptu}", swap("{input}", "{inptu}")),
    Case(
        "environment",
        "hopes for an environment variable",
        "There is no placeholder {env.TOKEN}",
        swap("{input}", "{env.TOKEN}"),
    ),
    Case("brace", "writes a single brace", "A single '{'", swap("{input}", "{")),
    Case(
        "parameter",
        "uses a parameter that is not declared",
        "has no parameter 'limt'",
        swap("{input}", "{params.limt}"),
    ),
    Case(
        "output leaves",
        "writes an output outside",
        "must not have empty parts, '.' or '..'",
        swap("{input}", "{output:../../etc/passwd}"),
    ),
    Case(
        "output newline",
        "puts a line break into an output's name",
        "must be printable",
        swap('"{input}"', '"{output:a\\nb}"'),
    ),
]

CASES = [*NOTATION, *VALUES, *GRAPH]
