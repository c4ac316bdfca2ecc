"""The page docs/traces.md: its examples run, its mappings read the real files, and its list of oddities is complete."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab.scenarios import traces
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Schedule
from batchlab.scenarios.traces import formats
from batchlab.scenarios.traces.rows import describe
from tests.support import ROOT

PAGE = (ROOT / "docs" / "traces.md").read_text()
FILES = dict(re.findall(r"`([\w.-]+)`[^\n`]*:\n\n```\w+\n(.*?)```", PAGE, re.S))
EXAMPLES = sorted(name for name in FILES if name.endswith(".yaml"))
MAPS = PAGE.split("```yaml\n")[-1].split("```")[0]


def after(name: str) -> str:
    """Return the text of the page after a file, up to the next file."""
    rest = PAGE.split(FILES[name], 1)[1]
    return re.split(r"`[\w.-]+`[^\n`]*:\n\n```|\n##", rest, maxsplit=1)[0]


def scheduled(folder: Path, name: str) -> Schedule:
    for file, text in FILES.items():
        (folder / file).write_text(text)
    return expand(loader.load(folder / name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_gives_the_documented_result(tmp_path: Path, name: str) -> None:
    schedule = scheduled(tmp_path, name)
    rows = re.findall(r"^\| (\d.*) \|$", after(name), re.M)
    shown = [
        " | ".join(
            [
                f"{job.due_s:g}",
                job.template.name,
                str(job.tasks),
                "" if job.task_s is None else f"{job.task_s:g}",
                job.label,
                job.tenant,
            ]
        )
        for job in schedule.jobs
    ]
    if name != "requests.yaml":
        assert rows == shown
    (block,) = re.findall(r"```text\n(.*?)```", after(name), re.S)
    assert block.splitlines() == [describe(odd).replace(f"{tmp_path}/", "") for odd in schedule.odd]


def test_documented_counts_are_right(tmp_path: Path) -> None:
    jobs = scheduled(tmp_path, "requests.yaml").jobs
    columns = [sum(300 * i <= job.due_s < 300 * (i + 1) for job in jobs) for i in range(6)]
    assert columns == [9, 6, 12, 0, 0, 3]
    assert "30 jobs arrive: 9 in the first five minutes, then 6, 12, none for ten minutes" in PAGE
    assert len(jobs) == 30


def test_the_examples_are_all_formats() -> None:
    assert len(EXAMPLES) == 5
    assert set(re.findall(r"`(\w+)`", PAGE.split("The names of the 18 fields", 1)[1])) >= set(formats.SWF_FIELDS)


def test_the_maps_read_the_real_files(tmp_path: Path, shared_data: Path) -> None:
    kept = {
        "NASA-iPSC-1993-3.1-cln.swf.gz": 18_239,
        "hpc2n-2002-head.swf": 3145,
        "FB-2009_samples_24_times_1hr_0.tsv": 5894,
        "AzureLLMInferenceTrace_conv.csv": 19_366,
        "Azure2021_200.csv": 199,
        "elb_request_count_8c0756.csv": 24_932,
        "nyc_taxi.csv": 156_219,
    }
    head = "name: all\nabout: All of them.\njobs: {work: {task: 1s}}\npools: {default: {max: 1}}\n"
    for name in kept:
        (tmp_path / name).symlink_to(shared_data / "traces" / name)
    (tmp_path / "all.yaml").write_text(f"{head}arrivals:\n{MAPS}")
    scenario = loader.load(tmp_path / "all.yaml")
    assert len(scenario.arrivals) == len(kept) == len(list((shared_data / "traces").iterdir()))
    schedule = expand(scenario)
    assert len(schedule.jobs) == sum(kept.values())
    assert len(schedule.odd) == 25 + 1 + 8


def whats() -> Iterator[str]:
    """Yield the oddities that the readers can report, with COLUMN in place of a column's name."""
    for path in Path(traces.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            place = {"note": 1, "_LeftOutError": 0, "_ReadProblem": 0, "Anomaly": 2}.get(name)
            if place is not None:
                yield from texts(call.args[place])


def texts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            _STANDS_FOR[ast.unparse(part.value)]
            if isinstance(part, ast.FormattedValue)
            else str(ast.literal_eval(part))
            for part in node.values
        )


_STANDS_FOR = defaultdict(
    lambda: "COLUMN", {"number": "-1", "'has a' if kind is TimestampKind.ZONED else 'has no'": "has a"}
)


def test_the_page_lists_all_that_is_odd() -> None:
    said_odd = set(whats())
    assert len(said_odd) > 20
    listed = set(re.findall(r"`([^`]+)`", PAGE.split("## Reports about bad records")[1].split("\n## ")[0]))
    assert said_odd <= listed
