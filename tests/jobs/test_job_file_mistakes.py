"""Mistakes in a job file, all of which are reported at once, with the line and the correction of each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from batchlab.core.errors import JobFileError, UsageError
from batchlab.jobs import job_file
from batchlab.jobs.yaml_source import JobFileErrors
from tests.support.job_files import FOLDER, FULL, MINIMAL, load, refused, told, write
from tests.support.mistakes import altered, complete, mangled


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with code and three input files."""
    write(tmp_path, FOLDER)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("name: j", "nmae: j", 1, "There is no key 'nmae' here. Did you mean 'name'?"),
        ("name: j\n", "", 1, "'name' is missing. Write for example `name: month-end-claims`."),
        ("name: j", "name:", 1, "'name' has no value."),
        ("name: j", "name: Month End!", 1, "Write month-end."),
        ("name: j", "name: " + "j" * 41, 1, "more than 40 characters"),
        ("name: j", "name: [j]", 1, "'name' must be text, not a list."),
        ("name: j", "name: j\ncron: hourly", 2, "has 1 field, not 5"),
        ("name: j", "name: j\ncron: 5", 2, "has 1 field, not 5"),
        ("name: j", "name: j\ncron: 99 * * * *", 2, "Bad minute"),
        ("name: j", "name: j\ncron: 0 1 * * *\ntimezone: Mars", 3, "time zone 'Mars' does not exist"),
        ("name: j", "name: j\ntimezone: Europe/Berlin", 2, "does not have cron"),
        ("name: j", "name: j\nat: +1h\ncron: 0 1 * * *", 3, "both at, for one run, and cron"),
        ("  files: data/*", "  files: nothing/*", 3, "No file matches 'nothing/*', looked for in"),
        ("  files: data/*", "  files: data/", 3, "It is a folder: write 'data/*'."),
        ("  files: data/*", "  files: []", 3, "'files' is empty. Write for example"),
        ("  files: data/*", "  files: http://x/y", 3, "is not the URL of an S3 bucket"),
        ("  files: data/*", "  files: [data/*,\n    nope]", 4, "No file matches 'nope'"),
        ("  files: data/*", "  files: data/*\n  split: line", 4, "Did you mean 'lines'?"),
        ("  files: data/*", "  files: data/*\n  size: 5", 4, "size has no meaning"),
        ("  files: data/*", "  files: data/*\n  split: lines\n  size: 8 MiB", 5, "counts lines"),
        ("  files: data/*", "  files: data/*\n  split: lines\n  size: 0", 5, "0 is not the size"),
        ("  files: data/*", "  files: data/*\n  split: bytes\n  size: 0 MiB", 5, "A part of 0 bytes is empty"),
        ("  files: data/*", "  files: data/*\n  split: bytes\n  size: 8 MB/s", 5, "or with split:"),
        ("  files: data/*", "  files: data/*\n  header: true", 4, "cannot begin with a header line"),
        ("  files: data/*", "  files: data/*\n  header: 1", 4, "must be true or false, not 1"),
        ("  files: data/*", "  files: data/*\n  header: yes", 4, "Write true, or 'yes' in quotes."),
        ("params: {limit: 1}", "params: {li-mit: 1}", 4, "A name in 'params' cannot be 'li-mit'"),
        ("params: {limit: 1}", "params: {limit: no}", 4, "no is text in YAML 1.2 but false"),
        ("params: {limit: 1}", "params: {limit: 1e999}", 4, "1e999 is not a valid value here"),
        ("params: {limit: 1}", "params: [1]", 4, "'params' must be a mapping of keys, not a list"),
        ("params: {limit: 1}", "priority: high", 4, "must be a whole number, not text"),
        ("params: {limit: 1}", "priority: true", 4, "must be a whole number, not true or false"),
        ("params: {limit: 1}", "priority: 5000", 4, "must be at most 1000, not 5000"),
        ("params: {limit: 1}", "failure: {max_failures: -1}", 4, "Write 0, a number of tasks,"),
        ("params: {limit: 1}", "failure: {max_failures: 101%}", 4, "a share such as 5%"),
        ("params: {limit: 1}", "share: my team", 4, "'share' cannot be 'my team': it must be letters and digits."),
        ("params: {limit: 1}", "failure: {then: contnue}", 4, "Write one of the values: carry_on"),
        ("params: {limit: 1}", "at: 2026-01-31T06:00:00", 4, "does not have a time zone"),
        ("params: {limit: 1}", "at: tomorrow", 4, "Write +10m or a time with its zone"),
        ("params: {limit: 1}", "code: nowhere", 4, "nowhere does not exist"),
        ("params: {limit: 1}", "tags: {a: [1]}", 4, "must be text, not a list"),
        ("    python: work:one", "    python: work.one", 7, "it must be module:function"),
        ("    python: work:one\n", "", 6, "Stage 'one' does not define what to run."),
        ("    python: work:one", "    python: work:one\n    command: [a]", 8, "both python and co"),
        ("    python: work:one", "    python: work:one\n    stdout: a", 8, "stdout is only for a command"),
        ("    python: work:one", "    python: work:one\n    gather: all", 8, "nothing to gather"),
        ("    python: work:one", "    python: work:one\n    bundle: big", 8, "Write auto, or a num"),
        ("    python: work:one", "    python: work:one\n    bundle: 0", 8, "at least 1, not 0"),
        ("    python: work:one", "    python: work:one\n    timeout: 5", None, ""),
        ("    python: work:one", "    python: work:one\n    timeout: 5 x", 8, "Write 30s, 5m, 1h30"),
        ("    python: work:one", "    python: work:one\n    timeout: 0", 8, "no time to run"),
        ("    python: work:one", "    python: work:one\n    timeout: -1", 8, "is not a duration"),
        ("    python: work:one", "    python: work:one\n    timeout: .inf", 8, "not a duration"),
        ("    python: work:one", "    python: work:one\n    retry: 0", 8, "at least 1, not 0"),
        ("    python: work:one", "    python: work:one\n    retry: often", 8, "a mapping of keys"),
        (
            "    python: work:one",
            "    python: work:one\n    retry:\n      on: [exit]\n      exceptions: [OSError]",
            10,
            "no effect, because 'on' does not contain 'exception'",
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
        ("    python: work:one", "    python: work:one\n    resources:\n      memory: 512", 9, "512 is less than"),
        (
            "    python: work:one",
            "    python: work:one\n    resources:\n      memory: 512 M",
            9,
            "Write 512 MiB, 8 GiB, 100 MB or a number of bytes.",
        ),
        ("  - name: two", "  - name: one", 8, "Stage 1 is named 'one' already."),
        ("  - name: two", "  - name: two\n    after: oen", 9, "Did you mean 'one'?"),
        ("  - name: two", "  - name: two\n    after: [one, one]", 9, "'one' is named twice"),
        ("  - name: two", "  - name: two\n    after: two", 9, "cycle: two → two."),
        ("  - name: two", "  - name: two\n    gather: every", 9, "Write 'all' or {by: FIELD}."),
        ("  - name: two", "  - name: two\n    gather: {by: '*'}", 9, "not the name of a field"),
        ("  - name: two", "  - name: two\n    gather: {bye: a}", 9, "Did you mean 'by'?"),
        ("  - name: two", "  - name: two\n    pool: Big", 9, "Write big."),
        ("  - name: two", "  - name: two\n    stdout: ../a", 9, "must not have empty parts"),
        ("{input}", "{params.limt}", 9, "no parameter 'limt' for {params.limt}. Did you mean 'lim"),
        ("{input}", "{inptu}", 9, "There is no placeholder {inptu}"),
        ("{input}", "{print $1}", 9, "Write a literal brace twice"),
        ("{input}", "{output:../a}", 9, "must not have empty parts"),
        ('"{input}"', '"{output:a}", "{output:a/}"', 9, "'a' and 'a/' have the same path"),
        ('"{input}"]', '"{output:a/b}"]\n    stdout: a', 10, "'a/b' and 'a' have the same path"),
        ('"{input}"', "[x]", 9, "An entry of 'command' must be text, not a list."),
        ('[wc, "{input}"]', "[]", 9, "'command' is empty."),
        ('[wc, "{input}"]', "wc -l", 9, "'command' must be a list, not text. Write for example `c"),
        ("name: j", "name: j\nname: k", 2, "'name' is already on line 1."),
        ("name: j", "name: !!python/name:os.system j", 1, "The tag tag:yaml.org"),
        ("params: {limit: 1}", 'params: {limit: "\\ud800"}', 4, "a character that text must not contain"),
        ('"{input}"', '"a\\0"', 9, "a character that text must not contain"),
        ("  files: data/*", "  files: " + "x" * 300, 3, "No file matches"),
        ("params: {limit: 1}", "code: " + "x" * 300, 4, "does not exist"),
        ("python: work:one", f"python: {'x' * 300}:one", 7, "there is no module"),
        ("name: j", "name: j\n[a]: 1", 2, "A key must be a word."),
        ("name: j", "name: j\n<<: 5", 2, "'<<' merges mappings only."),
        ("name: j", "name: j\n\tx: 1", 2, "This is not YAML"),
        ("name: j", "name: 'j", 10, "This is not YAML"),
        ("name: j", "name: *nowhere", 1, "undefined alias"),
        ("name: j", "name: j\n---\nname: k", 2, "but found another document"),
        ("name: j", "name: j\x01", 1, "This is not YAML"),
    ],
)
def test_mistake_has_its_line_and_a_remedy(folder: Path, old: str, new: str, line: int | None, words: str) -> None:
    assert FULL.count(old) >= 1
    text = FULL.replace(old, new, 1)
    if not words:
        assert load(folder, text)
        return
    errors = told(refused(folder, text))
    assert len(errors) == 1, errors
    assert errors[0][0] == line
    assert words in errors[0][1]


def test_all_mistakes_are_reported_in_line_order(folder: Path) -> None:
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


def test_consequences_of_a_mistake_are_not_reported(folder: Path) -> None:
    text = FULL.replace("params:", "parms:").replace("{input}", "{params.limit}")
    [error] = refused(folder, text.replace("- name: two", "- name: two\n    after: one"))
    assert error.message == "There is no key 'parms' here."
    errors = refused(folder, FULL.replace("name: one", "nam: one") + "    after: one\n")
    assert [error.message for error in errors] == ["There is no key 'nam' here."]


def test_a_wrong_value_deep_inside_does_not_hide_the_checks_across_keys(folder: Path) -> None:
    text = FULL.replace("work:one", "work:absent") + "    gather: {by: 3}\n"
    assert [error.line for error in refused(folder, text)] == [7, 10]


def test_mistake_in_an_anchor_is_reported_once(folder: Path) -> None:
    text = FULL.replace("  - name: one", "  - &base\n    name: one\n    timeout: soon")
    [error] = refused(folder, text + "  - {<<: *base, name: three}\n")
    assert error.line == 8


def test_overrides_are_not_held_against_a_broken_list_of_parameters(folder: Path) -> None:
    [error] = refused(folder, FULL.replace("{limit: 1}", "limit"), limit="2")
    assert error.line == 4


def test_a_byte_order_mark_is_passed_over(folder: Path) -> None:
    (folder / "job.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert job_file.load(folder / "job.yaml").job.name == "j"


def test_the_text_of_the_exception_shows_each_mistake_on_its_own_line(folder: Path) -> None:
    (folder / "job.yaml").write_text("nmae: j\nstages: []\ninput: {files: data/*}\n")
    with pytest.raises(UsageError) as caught:
        job_file.load(folder / "job.yaml")
    path = folder / "job.yaml"
    assert str(caught.value).splitlines() == [
        f"{path}:1: There is no key 'nmae' here. Did you mean 'name'?",
        f"{path}:2: 'stages' is empty. Write for example `stages: [{{name: total, python: handlers:total}}]`.",
    ]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "[]", "5", "# only a comment", "&a [*a]"])
def test_file_that_is_not_a_mapping_is_refused(folder: Path, text: str) -> None:
    [error] = refused(folder, text)
    assert "mapping" in error.message or "nested" in error.message


def test_a_missing_or_unreadable_file_is_refused(folder: Path) -> None:
    with pytest.raises(JobFileError, match="no such job file"):
        job_file.load(folder / "jbo.yaml")
    with pytest.raises(JobFileError, match="cannot be read"):
        job_file.load(folder)
    (folder / "job.yaml").write_bytes(b"name: \xff")
    with pytest.raises(JobFileError, match="cannot be read"):
        job_file.load(folder / "job.yaml")


def test_a_cycle_is_shown_in_the_direction_of_the_data(folder: Path) -> None:
    text = FULL.replace("  - name: one", "  - name: one\n    after: three")
    three = "  - {name: three, python: 'work:one', after: two}\n"
    beside = "  - {name: four, python: 'work:one', after: [three, one]}\n"
    [error] = refused(folder, text + three + beside)
    assert error.message == "The stages form a cycle: one → two → three → one."
    assert error.line == 7


@pytest.mark.parametrize(
    "bomb",
    [
        "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)),
        "\n".join(
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" if i else "a0: &a0 {x: 1}" for i in range(12)
        ),
        "a: &a {<<: *a}",
        "a: &a {b: *a}",
        "[" * 5000,
        "{a: " * 5000,
        f"params: {'{a: ' * 60}1{'}' * 60}",
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
        ("\udc80", None),
    ],
)
def test_an_override_is_one_yaml_scalar(folder: Path, given: str, expected: Any) -> None:
    if expected is None and given != "null":
        [error] = refused(folder, FULL, limit=given)
        assert error.message.startswith("--set limit:")
        assert error.line is None
    else:
        assert load(folder, FULL, limit=given).params == {"limit": expected}


def test_text_override_stays_text(folder: Path) -> None:
    jobfile = load(folder, FULL.replace("limit: 1", "limit: abc"), limit="007")
    assert jobfile.params == {"limit": "007"}


def test_an_override_of_an_unknown_parameter_names_the_nearest(folder: Path) -> None:
    [error] = refused(folder, FULL, limt="5")
    assert error.remedy == "Did you mean 'limit'?"


SPOILT = FULL + "    retry: {attempts: 3, on: [exit]}\nfailure: {then: stop}\n"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=mangled(SPOILT) | altered(SPOILT))
def test_mutated_file_loads_or_is_refused_with_lines_and_remedies(folder: Path, text: str) -> None:
    try:
        load(folder, text)
    except JobFileErrors as errors:
        for error in complete(errors.errors, folder / "job.yaml", text):
            assert error.line is not None, error
