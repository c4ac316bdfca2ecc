"""The job file: what it means, and how its mistakes are told."""

from __future__ import annotations

import importlib
import json
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchlab import spec
from batchlab.errors import JobFileError, UsageError
from batchlab.model import (
    FailureKind,
    InputDef,
    JobDef,
    JobId,
    RetryRule,
    SplitBy,
    StageDef,
    StageName,
)
from batchlab.protocol import placeholders
from batchlab.spec.schema import SECTIONS
from batchlab.task import File

ROOT = Path(__file__).resolve().parent.parent.parent

MINIMAL = """\
name: j
input: {files: data/*}
stages:
  - {name: one, python: "work:one"}
"""

WORK = "def one(item): ...\ndef two(item): ...\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with code and three input files."""
    write(tmp_path, {"work.py": WORK, "data/b.csv": "2", "data/a.csv": "1", "data/c.txt": "3"})
    return tmp_path


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def load(folder: Path, text: str, **overrides: str) -> spec.JobFile:
    (folder / "job.yaml").write_text(textwrap.dedent(text))
    return spec.load(folder / "job.yaml", overrides)


def refused(folder: Path, text: str, **overrides: str) -> list[JobFileError]:
    """The mistakes of the file, after checking that each has all that a person needs."""
    with pytest.raises(spec.JobFileErrors) as caught:
        load(folder, text, **overrides)
    lines = len(textwrap.dedent(text).splitlines()) + 1
    for error in caught.value.errors:
        assert error.file == str(folder / "job.yaml")
        assert error.line is None or 1 <= error.line <= lines
        assert error.message.endswith(".")
        assert error.remedy.endswith((".", "?"))
        assert f"{error.file}:" in str(error)
    return list(caught.value.errors)


def told(errors: list[JobFileError]) -> list[tuple[int | None, str]]:
    return [(error.line, f"{error.message} {error.remedy}") for error in errors]


def compiled(jobfile: spec.JobFile, submitted_s: float = 0.0) -> JobDef:
    return spec.compile(
        jobfile,
        job_id=JobId("j-1"),
        token="t",
        code_key="code/abc.zip",
        input_keys=["raw/j-1/a"],
        submitted_s=submitted_s,
    )


# --- What it means -------------------------------------------------------------------------------


def test_a_minimal_file_means_the_models_defaults(folder: Path) -> None:
    jobfile = load(folder, MINIMAL)
    assert compiled(jobfile, 7.0) == JobDef(
        id=JobId("j-1"),
        name="j",
        stages=(StageDef(StageName("one"), handler="work:one"),),
        submitted_s=7.0,
        input=InputDef(("raw/j-1/a",)),
        code="code/abc.zip",
        token="t",
    )
    assert jobfile.code == folder
    assert jobfile.input_files() == [folder / "data" / n for n in ("a.csv", "b.csv", "c.txt")]


def test_every_key_reaches_the_job(folder: Path) -> None:
    write(folder, {"src/pkg/steps.py": "async def fold(item): ..."})
    jobfile = load(
        folder,
        """\
        name: all-keys
        code: src
        input:
          files: ["data/*.csv", "s3://bucket/prefix/", "data/*"]
          split: bytes
          size: 2 MiB
          header: true
        params: {limit: 5, word: x, deep: {a: [1, 2.5, null, true]}}
        stages:
          - name: first
            command: [tool, -n, 007, 1.50, yes, "{input}", "{output:out/a.csv}", "{params.limit}"]
            stdout: log.txt
            timeout: 1h30m
            retry: {attempts: 5, backoff: 500ms, factor: 1.5, max_backoff: 2m, jitter: 0.1,
                    on: [exit, crash], exit_codes: [75, -9]}
            resources: {slots: 2, memory: 1.5 GiB}
            bundle: 50
            pool: big
          - {name: alone, python: "pkg.steps:fold", after: [], bundle: auto, retry: 1}
          - {name: both, python: "pkg.steps:fold", after: [first, alone], gather: all}
          - {name: grouped, python: "pkg.steps:fold", gather: {by: state}, timeout: 0.5}
          - {name: chained, python: "pkg.steps:fold", after: first}
        failure: {max_failures: 2.5%, then: stop}
        priority: -3
        tags: {year: 2024, owner: on}
        at: 2026-01-31T06:00:00+01:00
        """,
        limit="6",
    )
    job = compiled(jobfile)
    assert jobfile.input_files() == [
        folder / "data/a.csv",
        folder / "data/b.csv",
        "s3://bucket/prefix/",
        folder / "data/c.txt",
    ]
    assert job.input == InputDef(("raw/j-1/a",), SplitBy.BYTES, 2 * 1024**2, header=True)
    first, alone, both, grouped, chained = job.stages
    assert first == StageDef(
        name=StageName("first"),
        command=(
            "tool", "-n", "007", "1.50", "yes", "{input}", "{output:out/a.csv}", "{params.limit}",
        ),
        stdout="log.txt",
        timeout_s=5400.0,
        retry=RetryRule(
            5, 0.5, 1.5, 120.0, 0.1, (FailureKind.EXIT, FailureKind.CRASH), exit_codes=(75, -9)
        ),
        slots=2,
        memory_bytes=3 * 1024**3 // 2,
        bundle=50,
        pool="big",
    )  # fmt: skip
    assert (alone.after, alone.bundle, alone.retry) == ((), None, RetryRule(attempts=1))
    assert (both.after, both.gather) == (("first", "alone"), "*")
    assert (grouped.after, grouped.gather, grouped.timeout_s) == (("both",), "state", 0.5)
    assert (chained.after, chained.gather) == (("first",), None)
    assert job.params == (("limit", 6), ("word", "x"), ("deep", {"a": [1, 2.5, None, True]}))
    assert (job.max_failures, job.max_failures_percent, job.fail_fast) == (2.5, True, True)
    assert (job.priority, job.tags) == (-3, (("year", "2024"), ("owner", "on")))
    assert job.start_at_s == 1769835600.0


@pytest.mark.parametrize(
    ("given", "split", "size"),
    [
        ("split: lines", SplitBy.LINES, 1000),
        ("split: bytes", SplitBy.BYTES, 8 * 1024**2),
        ("split: items", SplitBy.ITEMS, 1),
        ("split: bytes, size: 5000", SplitBy.BYTES, 5000),
        ("split: bytes, size: 5 kB", SplitBy.BYTES, 5000),
        ("split: items, size: 20", SplitBy.ITEMS, 20),
    ],
)
def test_the_size_of_a_task_has_a_default_per_split(
    folder: Path, given: str, split: SplitBy, size: int
) -> None:
    jobfile = load(folder, MINIMAL.replace("data/*}", f"data/*, {given}}}"))
    assert compiled(jobfile).input == InputDef(("raw/j-1/a",), split, size)


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [("+10m", 700.0), ("+0s", 100.0), ("1970-01-01T00:10:00Z", 600.0), (None, None)],
)
def test_a_start_time_counts_from_the_submission_or_is_absolute(
    folder: Path, text: str | None, expected_s: float | None
) -> None:
    jobfile = load(folder, MINIMAL + (f"at: {text}\n" if text else ""))
    assert compiled(jobfile, 100.0).start_at_s == expected_s


def test_yaml_is_read_as_version_1_2_and_keys_are_words(folder: Path) -> None:
    text = MINIMAL.replace('"work:one"}', '"work:one", retry: {on: timeout}}')
    jobfile = load(folder, text + "params: {a: 010, b: 0x1f, c: 1:30, d: 2024-01-01, on: on_}\n")
    assert compiled(jobfile).stages[0].retry.kinds == (FailureKind.TIMEOUT,)
    assert jobfile.params == {"a": 10, "b": 31, "c": "1:30", "d": "2024-01-01", "on": "on_"}


def test_anchors_and_merge_keys_work_and_own_keys_win(folder: Path) -> None:
    jobfile = load(
        folder,
        """\
        name: j
        input: {files: data/*}
        stages:
          - &base {name: one, python: "work:one", timeout: 5s, retry: 7}
          - {<<: *base, name: two, timeout: 6s}
        """,
    )
    first, second = compiled(jobfile).stages
    assert (first.name, first.timeout_s, first.retry.attempts) == ("one", 5.0, 7)
    assert (second.name, second.timeout_s, second.retry.attempts) == ("two", 6.0, 7)


# --- Input and code ------------------------------------------------------------------------------


def test_globs_cross_folders_skip_hidden_files_and_may_lead_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "here/work.py": WORK,
            "in/x/1.csv": "",
            "in/2.csv": "",
            "in/.hidden/3.csv": "",
            "in/[odd].csv": "",
        },
    )
    out = load(tmp_path / "here", MINIMAL.replace("data/*", '["../in/[odd].csv", "../in/**"]'))
    names = [tmp_path / "in" / name for name in ("[odd].csv", "2.csv", "x/1.csv")]
    assert out.input_files() == names
    assert [out.name_of(name) for name in names] == [
        "../in/[odd].csv",
        "../in/2.csv",
        "../in/x/1.csv",
    ]


def test_an_absolute_pattern_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    jobfile = load(folder, MINIMAL.replace("data/*", str(tmp_path / "data" / "*.txt")))
    assert jobfile.input_files() == [tmp_path / "data" / "c.txt"]


@pytest.mark.parametrize(
    "source",
    [
        "def go(item): ...",
        "async def go(item): ...",
        "class go: ...",
        "go = lambda item: item",
        "go: object = print",
        "a, go = 1, print",
        "from json import loads as go",
        "import json.decoder as go",
        "import go.inner",
        "if True:\n    def go(item): ...",
        "try:\n    import a\nexcept ImportError:\n    def go(item): ...",
        "match 1:\n    case 1:\n        go = print",
        "from other import *",
        "from .other import *",
        "from elsewhere_not_here import *",
        "def __getattr__(name): ...",
    ],
)
def test_a_handler_is_found_in_every_form_it_can_have(folder: Path, source: str) -> None:
    write(
        folder, {"pkg/deep.py": source, "pkg/other.py": "def go(item): ...", "other.py": "go = 1"}
    )
    assert load(folder, MINIMAL.replace("work:one", "pkg.deep:go"))


@pytest.mark.parametrize(
    "source",
    [
        "def other(): go = 1",
        "class A:\n    def go(self): ...",
        "go.x = 1",
        "print('go')",
        "from other import *",
        "",
    ],
)
def test_a_handler_that_does_not_exist_is_refused_before_anything_is_queued(
    folder: Path, source: str
) -> None:
    """Pain 1: without this, the job would be accepted and every task would fail."""
    write(folder, {"deep.py": source, "other.py": "_go = 1\ngo_ = 2\nfrom deep import *"})
    [(line, text)] = told(refused(folder, MINIMAL.replace("work:one", "deep:go")))
    assert line == 4
    assert "The handler does not exist: deep.py has no 'go'." in text


def test_checking_a_handler_runs_none_of_the_users_code(folder: Path) -> None:
    boom = "raise SystemExit('the module was run')\n"
    write(folder, {"work.py": boom + WORK, "pkg/__init__.py": boom, "pkg/sub.py": boom + WORK})
    sys.path.insert(0, str(folder))
    try:
        assert load(folder, MINIMAL)
        text = MINIMAL.replace("work:one", "pkg.sub:one") + "code: data\n"
        assert load(folder, text)  # found as an installed module
    finally:
        sys.path.remove(str(folder))
    assert not {"work", "pkg", "pkg.sub"} & set(sys.modules)


@pytest.mark.parametrize("handler", ["json:loads", "json.decoder:JSONDecoder", "math:sqrt"])
def test_a_handler_may_be_in_an_installed_module(folder: Path, handler: str) -> None:
    assert compiled(load(folder, MINIMAL.replace("work:one", handler))).stages[0].handler == handler


def test_the_current_folder_does_not_count_as_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    [error] = refused(folder, MINIMAL + "code: data\n")
    assert "There is no module 'work'" in error.message


@pytest.mark.parametrize(
    ("handler", "remedy"),
    [
        ("wrok:one", "Write work:one."),
        ("work:oen", "Did you mean 'work:one'?"),
        ("json:laods", "Did you mean 'json:loads'?"),
        ("pkg.absent:one", "Create pkg/absent.py there, or set 'code' to its folder."),
        ("work.one:one", "Write work:one."),
        ("bad:one", "Mend the module."),
    ],
)
def test_the_remedy_for_a_missing_handler_names_the_nearest(
    folder: Path, handler: str, remedy: str
) -> None:
    write(folder, {"bad.py": "def one(:\n"})
    [error] = refused(folder, MINIMAL.replace("work:one", handler))
    assert (error.line, error.remedy) == (4, remedy)


# --- Mistakes ------------------------------------------------------------------------------------

FULL = """\
name: j
input:
  files: data/*
params: {limit: 1}
stages:
  - name: one
    python: work:one
  - name: two
    command: [wc, "{input}"]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("name: j", "nmae: j", 1, "There is no key 'nmae' here. Did you mean 'name'?"),
        ("name: j\n", "", 1, "'name' is missing. Write for example `name: month-end-claims`."),
        ("name: j", "name:", 1, "'name' has no value."),
        ("name: j", "name: Month End!", 1, "Write month-end."),
        ("name: j", "name: " + "j" * 41, 1, "more than 40 characters"),
        ("name: j", "name: [j]", 1, "'name' must be text, not a list."),
        ("  files: data/*", "  files: nothing/*", 3, "No file matches 'nothing/*', looked for in"),
        ("  files: data/*", "  files: data/", 3, "It is a folder: write 'data/*'."),
        ("  files: data/*", "  files: []", 3, "'files' is empty. Write for example"),
        ("  files: data/*", "  files: http://x/y", 3, "is no URL of an S3 bucket"),
        ("  files: data/*", "  files: [data/*,\n    nope]", 4, "No file matches 'nope'"),
        ("  files: data/*", "  files: data/*\n  split: line", 4, "Did you mean 'lines'?"),
        ("  files: data/*", "  files: data/*\n  size: 5", 4, "size has no meaning"),
        ("  files: data/*", "  files: data/*\n  split: lines\n  size: 8 MiB", 5, "counts lines"),
        ("  files: data/*", "  files: data/*\n  split: lines\n  size: 0", 5, "0 is no size"),
        ("  files: data/*", "  files: data/*\n  split: bytes\n  size: 0 MiB", 5, "no bytes"),
        ("  files: data/*", "  files: data/*\n  split: bytes\n  size: 8 MB/s", 5, "or with split:"),
        ("  files: data/*", "  files: data/*\n  header: true", 4, "no header line"),
        ("  files: data/*", "  files: data/*\n  header: 1", 4, "must be true or false, not a num"),
        ("  files: data/*", "  files: data/*\n  header: yes", 4, "Write true, or 'yes' in quotes."),
        ("params: {limit: 1}", "params: {li-mit: 1}", 4, "'li-mit' is no name for a parameter"),
        ("params: {limit: 1}", "params: {limit: no}", 4, "no is text in YAML 1.2 but false"),
        ("params: {limit: 1}", "params: {limit: 1e999}", 4, "1e999 is no value of a job file"),
        ("params: {limit: 1}", "params: [1]", 4, "'params' must be a mapping of keys, not a list"),
        ("params: {limit: 1}", "priority: high", 4, "must be a whole number, not text"),
        ("params: {limit: 1}", "priority: true", 4, "must be a whole number, not true or false"),
        ("params: {limit: 1}", "priority: 5000", 4, "must be at most 1000, not 5000"),
        ("params: {limit: 1}", "failure: {max_failures: -1}", 4, "Write 0, a number of tasks,"),
        ("params: {limit: 1}", "failure: {max_failures: 101%}", 4, "a share such as 5%"),
        ("params: {limit: 1}", "failure: {then: contnue}", 4, "Write one of the values: carry_on"),
        ("params: {limit: 1}", "at: 2026-01-31T06:00:00", 4, "has no time zone"),
        ("params: {limit: 1}", "at: tomorrow", 4, "Write +10m or a time with its zone"),
        ("params: {limit: 1}", "code: nowhere", 4, "nowhere does not exist"),
        ("params: {limit: 1}", "tags: {a: [1]}", 4, "must be text, not a list"),
        ("    python: work:one", "    python: work.one", 7, "it takes module:function"),
        ("    python: work:one\n", "", 6, "Stage 'one' does not say what to run."),
        ("    python: work:one", "    python: work:one\n    command: [a]", 8, "both python and co"),
        ("    python: work:one", "    python: work:one\n    stdout: a", 8, "goes with a command"),
        ("    python: work:one", "    python: work:one\n    gather: all", 8, "nothing to gather"),
        ("    python: work:one", "    python: work:one\n    bundle: 0", 8, "at least 1, not 0"),
        ("    python: work:one", "    python: work:one\n    timeout: 5", None, ""),
        (
            "    python: work:one",
            "    python: work:one\n    timeout: 5 x",
            8,
            "Write 30s, 5m, 1h30",
        ),
        ("    python: work:one", "    python: work:one\n    timeout: 0", 8, "no time to run"),
        ("    python: work:one", "    python: work:one\n    timeout: -1", 8, "is not a duration"),
        ("    python: work:one", "    python: work:one\n    timeout: .inf", 8, "not a duration"),
        ("    python: work:one", "    python: work:one\n    retry: 0", 8, "at least 1, not 0"),
        ("    python: work:one", "    python: work:one\n    retry: often", 8, "a mapping of keys"),
        (
            "    python: work:one",
            "    python: work:one\n    retry:\n      on: [exit]\n      exceptions: [OSError]",
            10,
            "no effect while 'on' leaves out 'exception'",
        ),
        (
            "    python: work:one",
            "    python: work:one\n    retry:\n      on: [tiemout]",
            9,
            "'on' cannot be 'tiemout'. Did you mean 'timeout'?",
        ),
        (
            "    python: work:one",
            "    python: work:one\n    resources:\n      memory: 15 MiB",
            9,
            "less than the 16 MiB",
        ),
        (
            "    python: work:one",
            "    python: work:one\n    resources:\n      memory: 512",
            9,
            "512 is less than",
        ),
        (
            "    python: work:one",
            "    python: work:one\n    resources:\n      memory: 512 M",
            9,
            "Write 512 MiB, 8 GiB, 100 MB or a number of bytes.",
        ),
        ("  - name: two", "  - name: one", 8, "Stage 1 is named 'one' already."),
        ("  - name: two", "  - name: two\n    after: oen", 9, "Did you mean 'one'?"),
        ("  - name: two", "  - name: two\n    after: [one, one]", 9, "'one' is named twice"),
        ("  - name: two", "  - name: two\n    after: two", 9, "circle: two → two."),
        ("  - name: two", "  - name: two\n    gather: every", 9, "Write 'all' or {by: FIELD}."),
        ("  - name: two", "  - name: two\n    gather: {by: '*'}", 9, "no name of a field"),
        ("  - name: two", "  - name: two\n    gather: {bye: a}", 9, "Did you mean 'by'?"),
        ("  - name: two", "  - name: two\n    pool: Big", 9, "Write big."),
        ("  - name: two", "  - name: two\n    stdout: ../a", 9, "must not have empty parts"),
        ("{input}", "{params.limt}", 9, "no parameter 'limt' for {params.limt}. Did you mean 'lim"),
        ("{input}", "{inptu}", 9, "There is no placeholder {inptu}"),
        ("{input}", "{print $1}", 9, "Write a brace of your own twice"),
        ("{input}", "{output:../a}", 9, "must not have empty parts"),
        ('"{input}"', '"{output:a}", "{output:a/}"', 9, "'a' and 'a/' are one place"),
        ('"{input}"]', '"{output:a/b}"]\n    stdout: a', 10, "'a/b' and 'a' are one place"),
        ('[wc, "{input}"]', "[]", 9, "'command' is empty."),
        ('[wc, "{input}"]', "wc -l", 9, "'command' must be a list, not text. Write for example `c"),
        ("name: j", "name: j\nname: k", 2, "'name' is already on line 1."),
        ("name: j", "name: !!python/name:os.system j", 1, "The tag tag:yaml.org"),
        ("name: j", "name: j\n[a]: 1", 2, "A key must be a word."),
        ("name: j", "name: j\n<<: 5", 2, "'<<' merges mappings only."),
        ("name: j", "name: j\n\tx: 1", 2, "This is not YAML"),
        ("name: j", "name: 'j", 10, "This is not YAML"),
        ("name: j", "name: *nowhere", 1, "undefined alias"),
        ("name: j", "name: j\n---\nname: k", 2, "but found another document"),
        ("name: j", "name: j\x01", 1, "This is not YAML"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_a_remedy(
    folder: Path, old: str, new: str, line: int | None, words: str
) -> None:
    assert FULL.count(old) >= 1
    text = FULL.replace(old, new, 1)
    if not words:
        assert load(folder, text)
        return
    errors = told(refused(folder, text))
    assert len(errors) == 1, errors
    assert errors[0][0] == line
    assert words in errors[0][1]


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines(folder: Path) -> None:
    errors = refused(
        folder,
        """\
        name: j
        input:
          files: none/*
          sise: 5
        parms: {x: 1}
        stages:
          - name: one
            python: work:nope
            timeout: soon
          - name: Two
            command: ["{params.x}", "{oops}"]
            after: zero
          - python: work:two
          - name: four
            gather: all
        """,
    )
    assert [error.line for error in errors] == [3, 4, 5, 8, 9, 10, 11, 13, 14]
    assert "'sise' here. Did you mean 'size'?" in str(errors[1])
    assert "Did you mean 'params'?" in str(errors[2])
    assert "has no 'nope'" in str(errors[3])


def test_what_depends_on_a_mistake_is_not_told_as_a_second_one(folder: Path) -> None:
    text = FULL.replace("params:", "parms:").replace("{input}", "{params.limit}")
    [error] = refused(folder, text.replace("- name: two", "- name: two\n    after: one"))
    assert error.message == "There is no key 'parms' here."
    errors = refused(folder, FULL.replace("name: one", "nam: one") + "    after: one\n")
    assert [error.message for error in errors] == ["There is no key 'nam' here."]


def test_the_text_of_the_exception_shows_each_mistake_on_its_own_line(folder: Path) -> None:
    (folder / "job.yaml").write_text("nmae: j\nstages: []\ninput: {files: data/*}\n")
    with pytest.raises(UsageError) as caught:
        spec.load(folder / "job.yaml")
    path = folder / "job.yaml"
    assert str(caught.value).splitlines() == [
        f"{path}:1: There is no key 'nmae' here. Did you mean 'name'?",
        f"{path}:2: 'stages' is empty. "
        "Write for example `stages: [{name: total, python: handlers:total}]`.",
    ]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "[]", "5", "# only a comment", "&a [*a]"])
def test_a_file_that_is_no_mapping_is_refused(folder: Path, text: str) -> None:
    [error] = refused(folder, text)
    assert "mapping" in error.message or "nested" in error.message


def test_a_missing_or_unreadable_file_is_refused(folder: Path) -> None:
    with pytest.raises(JobFileError, match="no such job file"):
        spec.load(folder / "jbo.yaml")
    with pytest.raises(JobFileError, match="cannot be read"):
        spec.load(folder)
    (folder / "job.yaml").write_bytes(b"name: \xff")
    with pytest.raises(JobFileError, match="cannot be read"):
        spec.load(folder / "job.yaml")


def test_a_cycle_is_shown_in_the_direction_of_the_data(folder: Path) -> None:
    text = FULL.replace("  - name: one", "  - name: one\n    after: three")
    three = "  - {name: three, python: 'work:one', after: two}\n"
    beside = "  - {name: four, python: 'work:one', after: [three, one]}\n"
    [error] = refused(folder, text + three + beside)
    assert error.message == "The stages run in a circle: one → two → three → one."
    assert error.line == 7


@pytest.mark.parametrize(
    "bomb",
    [
        "\n".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)
        ),
        "\n".join(
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" if i else "a0: &a0 {x: 1}"
            for i in range(12)
        ),
        "a: &a {<<: *a}",
        "a: &a {b: *a}",
        "[" * 5000,
        "{a: " * 5000,
        "x" * 1_100_000,
    ],
)
def test_a_text_that_would_grow_without_bound_is_refused(folder: Path, bomb: str) -> None:
    errors = refused(folder, bomb)
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("5", 5),
        ("-2.5", -2.5),
        ("true", True),
        ("null", None),
        ("", ""),
        ("'5'", "5"),
        ("a b: c", None),
        ("*.csv", "*.csv"),
        ("s3://b/k", "s3://b/k"),
        ("no", None),
        ("[1]", None),
    ],
)
def test_an_override_is_one_yaml_scalar(folder: Path, given: str, expected: Any) -> None:
    if expected is None and given != "null":
        [error] = refused(folder, FULL, limit=given)
        assert error.message.startswith("--set limit:")
        assert error.line is None
    else:
        assert load(folder, FULL, limit=given).params == {"limit": expected}


def test_an_override_of_text_stays_text(folder: Path) -> None:
    jobfile = load(folder, FULL.replace("limit: 1", "limit: abc"), limit="007")
    assert jobfile.params == {"limit": "007"}


def test_an_override_of_an_unknown_parameter_names_the_nearest(folder: Path) -> None:
    [error] = refused(folder, FULL, limt="5")
    assert error.remedy == "Did you mean 'limit'?"


# --- The fingerprint -----------------------------------------------------------------------------


def test_the_fingerprint_changes_with_whatever_changes_the_work(folder: Path) -> None:
    def digest(text: str = FULL, code: str = "c", **overrides: str) -> str:
        return spec.fingerprint(load(folder, text, **overrides), code)

    first = digest()
    assert digest() == first
    assert digest("# a comment\n" + FULL.replace("data/*", "'data/*'")) == first
    seen = {
        first,
        digest(code="d"),
        digest(limit="2"),
        digest(FULL.replace("limit: 1", "limit: 1.0")),
        digest(FULL.replace("work:one", "work:two")),
        digest(FULL.replace("data/*", "data/*.csv")),
        digest(FULL.replace("data/*", "s3://bucket/key")),
    }
    assert len(seen) == 7
    os.utime(folder / "data/a.csv", ns=(1, 1))
    changed = digest()
    assert changed not in seen
    (folder / "data/a.csv").write_text("22")
    os.utime(folder / "data/a.csv", ns=(1, 1))
    assert digest() not in {*seen, changed}


def test_the_fingerprint_is_that_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    digests = set()
    for name in ("x", "y"):
        write(tmp_path / name, {"work.py": WORK, "data/a": "1"})
        os.utime(tmp_path / name / "data/a", ns=(5, 5))
        digests.add(spec.fingerprint(load(tmp_path / name, FULL), "c"))
    assert len(digests) == 1


# --- What comes with it --------------------------------------------------------------------------


def test_the_starter_job_loads_and_its_handlers_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, spec.starter())
    jobfile = spec.load(tmp_path / "job.yaml", {"min_cents": "0"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "handlers", raising=False)
    handlers = importlib.import_module("handlers")
    monkeypatch.delitem(sys.modules, "handlers")
    context = SimpleNamespace(params=dict(jobfile.params))
    [source] = jobfile.input_files()
    results = handlers.summarise(File(source), context)
    groups = [handlers.total([result]) for result in results]
    assert [(one["state"], one["claims"]) for one in groups] == [("CA", 4), ("NY", 4), ("TX", 4)]
    rows = [row.split(",") for row in spec.starter()["data/claims.csv"].splitlines()[1:]]
    assert sum(one["cents"] for one in groups) == sum(round(float(r[2]) * 100) for r in rows)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_done_to_a_file_it_loads_or_is_refused_with_lines_and_remedies(
    folder: Path, data: st.DataObject
) -> None:
    lines = (FULL + "    retry: {attempts: 3, on: [exit]}\nfailure: {then: stop}\n").splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(lines) - 1))
        at = data.draw(st.integers(0, len(lines[i])))
        scrap = data.draw(
            st.sampled_from([*":{}[],-#&*!|>'\"%@ \t", "<<:", "null", "1e9", "é", ""])
        )
        lines[i] = data.draw(
            st.sampled_from([lines[i][:at] + scrap + lines[i][at + 1 :], scrap, lines[i - 1]])
        )
    try:
        load(folder, "\n".join(lines))
    except spec.JobFileErrors as errors:
        for error in errors.errors:
            assert error.remedy, error
            assert error.line is not None, error
            assert error.line <= len(lines) + 1


def test_every_key_is_described_with_an_example_that_is_accepted() -> None:
    for loc, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            assert field.description, (loc, key)
            assert field.description.endswith("."), (loc, key)
            assert field.examples, (loc, key)
            needed = {
                name: (one.examples or [None])[0]
                for name, one in model.model_fields.items()
                if one.is_required()
            }
            model.model_validate({**needed, key: field.examples[0]})


def test_the_schema_is_plain_json_that_forbids_unknown_keys() -> None:
    schema = spec.json_schema()
    assert json.loads(json.dumps(schema)) == schema
    for own in (schema, *schema["$defs"].values()):
        assert own == {} or own["additionalProperties"] is False
    assert set(schema["properties"]) >= {"name", "code", "input", "stages", "failure", "params"}
    assert '"null"' not in json.dumps(schema)


def test_the_committed_reference_page_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "job-file.md").read_text()
    assert page == spec.reference(), "make docs/job-file.md again: its first lines say how"


def test_the_page_names_every_placeholder_and_only_those() -> None:
    table = spec.reference().split("## Placeholders")[1].split("##")[0]
    named = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `{")]
    assert placeholders.check(["program", *named]) == []
    unknown = placeholders.check(["{nonsense}"])[0].split("there are ")[1]
    assert sorted(unknown.rstrip(".").split(", ")) == sorted(named)


def test_the_page_shows_the_starter_job_as_it_is() -> None:
    shown = spec.reference().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load(spec.starter()["job.yaml"])
