"""The job file: its meaning, its source digest, and the files that are generated from its schema."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from batchlab.core.installation import starter
from batchlab.core.job_definition import SPLITS, InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import FailureKind, JobId, StageName
from batchlab.core.protocol import values
from batchlab.core.retry_rule import RetryRule
from batchlab.core.task_context import File
from batchlab.jobs.job_file import load as load_file
from batchlab.jobs.job_file import source_digest
from batchlab.jobs.schema import SECTIONS, json_schema
from docs.reference import job_file
from tests.support.job_files import FOLDER, FULL, MINIMAL, WORK, compiled, load, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with code and three input files."""
    write(tmp_path, FOLDER)
    return tmp_path


# --- Meaning -------------------------------------------------------------------------------------


def test_a_minimal_file_means_the_models_defaults(folder: Path) -> None:
    jobfile = load(folder, MINIMAL)
    assert compiled(jobfile, 7.0) == JobDef(
        id=JobId("j-1"),
        name="j",
        stages=(StageDef(StageName("one"), handler="work:one", speculative_copies=True),),
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
            side_effects: true
            speculative_copies: false
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
        side_effects=True,
    )  # fmt: skip
    assert (alone.after, alone.bundle, alone.retry) == ((), None, RetryRule(attempts=1))
    assert (both.after, both.gather) == (("first", "alone"), "*")
    assert (grouped.after, grouped.gather, grouped.timeout_s) == (("both",), "state", 0.5)
    assert (chained.after, chained.gather) == (("first",), None)
    assert job.params == (("limit", 6), ("word", "x"), ("deep", {"a": [1, 2.5, None, True]}))
    assert (job.max_failures, job.max_failures_percent, job.fail_fast) == (2.5, True, True)
    assert (job.priority, job.tags) == (-3, (("year", "2024"), ("owner", "on")))
    assert job.start_at_s == 1769835600.0


def test_every_way_to_split_is_in_the_table_and_on_the_page() -> None:
    assert list(SPLITS) == list(SplitBy)
    page = (Path(__file__).parents[2] / "docs" / "job-file.md").read_text()
    assert all(f"`{way}`" in page and split.meaning in page and split.size in page for way, split in SPLITS.items())


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
def test_the_size_of_a_task_has_a_default_per_split(folder: Path, given: str, split: SplitBy, size: int) -> None:
    jobfile = load(folder, MINIMAL.replace("data/*}", f"data/*, {given}}}"))
    assert compiled(jobfile).input == InputDef(("raw/j-1/a",), split, size)


@pytest.mark.parametrize(
    ("text", "expected_s"), [("+10m", 700.0), ("+0s", 100.0), ("1970-01-01T00:10:00Z", 600.0), (None, None)]
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
        params:
          both: {<<: [&x {a: 1, b: 1}, &y {a: 2, c: 2}], b: 3}
        """,
    )
    assert jobfile.params == {"both": {"a": 1, "b": 3, "c": 2}}
    first, second = compiled(jobfile).stages
    assert (first.name, first.timeout_s, first.retry.attempts) == ("one", 5.0, 7)
    assert (second.name, second.timeout_s, second.retry.attempts) == ("two", 6.0, 7)


# --- Input and code ------------------------------------------------------------------------------


def test_globs_cross_folders_skip_hidden_files_and_may_lead_out(tmp_path: Path) -> None:
    write(
        tmp_path, {"here/work.py": WORK, "in/x/1.csv": "", "in/2.csv": "", "in/.hidden/3.csv": "", "in/[odd].csv": ""}
    )
    out = load(tmp_path / "here", MINIMAL.replace("data/*", '["../in/[odd].csv", "../in/**"]'))
    names = [tmp_path / "in" / name for name in ("[odd].csv", "2.csv", "x/1.csv")]
    assert out.input_files() == names
    assert [out.name_of(name) for name in names] == ["../in/[odd].csv", "../in/2.csv", "../in/x/1.csv"]


def test_an_absolute_pattern_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    jobfile = load(folder, MINIMAL.replace("data/*", str(tmp_path / "data" / "*.txt")))
    assert jobfile.input_files() == [tmp_path / "data" / "c.txt"]


# --- The source digest ---------------------------------------------------------------------------


def test_source_digest_changes_with_anything_that_changes_the_work(folder: Path) -> None:
    def digest(text: str = FULL, code: str = "c", **overrides: str) -> str:
        return source_digest(load(folder, text, **overrides), code)

    first = digest()
    assert digest() == first
    tagged = [digest(FULL + f"tags: {{{tags}}}\n") for tags in ("a: x, b: y", "b: y, a: x")]
    assert tagged[0] == tagged[1] != first
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


def test_the_source_digest_is_that_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    digests = set()
    for name in ("x", "y"):
        write(tmp_path / name, {"work.py": WORK, "data/a": "1"})
        os.utime(tmp_path / name / "data/a", ns=(5, 5))
        digests.add(source_digest(load(tmp_path / name, FULL), "c"))
    assert len(digests) == 1


# --- Generated files -----------------------------------------------------------------------------


def test_the_starter_job_loads_and_its_handlers_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, starter())
    jobfile = load_file(tmp_path / "job.yaml", {"min_cents": "0"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "handlers", raising=False)
    handlers = importlib.import_module("handlers")
    monkeypatch.delitem(sys.modules, "handlers")
    context = SimpleNamespace(params=dict(jobfile.params))
    [source] = jobfile.input_files()
    results = handlers.summarise(File(source), context)
    groups = [handlers.total([result]) for result in results]
    assert [(group["state"], group["claims"]) for group in groups] == [("CA", 4), ("NY", 4), ("TX", 4)]
    rows = [row.split(",") for row in starter()["data/claims.csv"].splitlines()[1:]]
    assert sum(group["cents"] for group in groups) == sum(round(float(r[2]) * 100) for r in rows)


def test_every_key_is_described_with_an_example_that_is_accepted() -> None:
    for loc, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            assert field.description, (loc, key)
            assert field.description.endswith("."), (loc, key)
            assert field.examples, (loc, key)
            needed = {
                name: (one.examples or [None])[0] for name, one in model.model_fields.items() if one.is_required()
            }
            model.model_validate({**needed, key: field.examples[0]})


def test_the_schema_is_plain_json_that_forbids_unknown_keys() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    for own in (schema, *schema["$defs"].values()):
        assert own == {} or own["additionalProperties"] is False
    assert set(schema["properties"]) >= {"name", "code", "input", "stages", "failure", "params"}
    assert '"null"' not in json.dumps(schema)


def test_the_page_names_every_placeholder_and_only_those() -> None:
    table = job_file.reference().split("## Placeholders")[1].split("##")[0]
    named = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `{")]
    assert values.check(["program", *named]) == []
    unknown = values.check(["{nonsense}"])[0].split("there are ")[1]
    assert sorted(unknown.rstrip(".").split(", ")) == sorted(named)


def test_the_page_shows_the_starter_job_as_it_is() -> None:
    shown = job_file.reference().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load(starter()["job.yaml"])
