"""moto's own tests of Auto Scaling at batchlab's endpoint, with a list of the expected differences."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.aws import moto_suite

LIST = Path(__file__).with_name("moto_differences.toml")
PAGE = ROOT / "docs" / "contributing" / "asg-endpoint.md"
AWS = "https://docs.aws.amazon.com/"


@dataclass(frozen=True)
class Difference:
    """A reason why tests of moto fail at batchlab's endpoint, with the page of AWS's documentation."""

    reason: str
    page: str
    tests: tuple[str, ...]

    @property
    def row(self) -> str:
        title = self.page.rpartition("/")[2].partition(".html")[0].removeprefix("API_")
        return f"| {self.reason} | [{title}]({self.page}) | {len(self.tests)} |"


def read(kind: str) -> list[Difference]:
    """Return the entries of a kind in the list: `file` or `difference`."""
    entries = tomllib.loads(LIST.read_text())[kind]
    return [Difference(entry["reason"], entry["page"], tuple(entry["tests"])) for entry in entries]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the error of each of moto's tests, or "" if the test passes at batchlab's endpoint."""
    cache = request.config.cache
    folder = tmp_path_factory.mktemp("moto")
    archive = moto_suite.source_distribution(cache.mkdir("moto") if cache else tmp_path_factory.mktemp("archive"))
    files = moto_suite.unpack(archive, folder)
    excluded = {name for entry in read("file") for name in entry.tests}
    assert excluded <= set(files)
    return moto_suite.run(folder, [name for name in files if name not in excluded])


@pytest.mark.slow
def test_motos_tests_fail_only_where_the_list_says(results: dict[str, str]) -> None:
    listed = {name for entry in read("difference") for name in entry.tests}
    failed = {name: error for name, error in results.items() if error}
    unlisted = [f"{name}: {error}" for name, error in sorted(failed.items()) if name not in listed]
    assert not unlisted, "tests of moto that fail without an entry in the list:\n" + "\n".join(unlisted)
    assert not sorted(listed - failed.keys()), "entries of the list for tests that pass or do not exist"
    passed = f"{len(results) - len(failed)} of {len(results)} tests of moto {version('moto')} pass."
    assert passed in PAGE.read_text()


def test_each_difference_has_a_reason_and_a_page_of_aws() -> None:
    entries = read("file") + read("difference")
    assert all(entry.reason.endswith(".") and entry.page.startswith(AWS) and entry.tests for entry in entries)
    counts = Counter(name for entry in entries for name in entry.tests)
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_docs_have_every_entry_of_the_list() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert [entry.row for entry in read("difference") + read("file") if entry.row not in rows] == []
