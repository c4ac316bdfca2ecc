"""The table of conformance checks, the report of a run, and the page on emulators."""

from __future__ import annotations

import inspect
import re
from collections import Counter

import pytest

from batchlab.conform import check as sources
from batchlab.conform import check_table
from batchlab.conform.check import Answer, Check, CheckVerdict, Differs, Severity
from batchlab.conform.check_table import ASG_CHECKS, CHECKS, SERVICES, matching, of_service
from batchlab.conform.run import Result
from tests.support import ROOT

DOCS = ROOT / "docs" / "contributing"
PAGES = {"emulators.md": CHECKS, "asg-endpoint.md": ASG_CHECKS}
EVERY = (*CHECKS, *ASG_CHECKS)

RELIED_ON = (
    "s3-create-race",
    "s3-create-taken",
    "s3-get-changed",
    "s3-list-pages",
    "s3-range",
    "sqs-redelivery",
    "sqs-delay",
    "sqs-dead-letter",
    "sqs-wake",
    "sqs-body-256k",
    "sqs-batch-10",
    "sqs-counts",
    "sqs-give-back",
    "sqs-extend",
    "sqs-receive-count",
)
"""The checks that batchlab's protocol cannot do without. The need for the others is a matter of judgment."""


def a_check(name: str = "s3-a", severity: Severity = Severity.NEEDED) -> Check:
    return Check(
        name,
        severity,
        rule="A | B.",
        source="S3 API, GetObject",
        promise="none: it is new",
        otherwise="nothing",
        run=lambda _: None,
    )


def a_result(verdict: CheckVerdict, severity: Severity = Severity.NEEDED) -> Result:
    observed = "" if verdict is CheckVerdict.AGREES else "it | does not"
    return Result(a_check(severity=severity), verdict, observed, 0.5)


# --- The table ------------------------------------------------------------------------------------


def test_checks_are_unique_and_numerous() -> None:
    assert len(CHECKS) >= 40
    assert len(ASG_CHECKS) >= 15
    assert [name for name, n in Counter(one.name for one in EVERY).items() if n > 1] == []
    runs = Counter(one.run for one in EVERY)
    assert [run for run, n in runs.items() if n > 1] == []
    rules = Counter(one.rule for one in EVERY)
    assert [rule for rule, n in rules.items() if n > 1] == []


@pytest.mark.parametrize("check", EVERY, ids=lambda check: check.name)
def test_every_check_is_fully_described(check: Check) -> None:
    assert re.fullmatch(r"(s3|sqs|autoscaling)-[a-z0-9]+(-[a-z0-9]+)*", check.name)
    assert check.service in SERVICES
    # The name of a queue must have room for the run, the check, a number, and an adapter's own name.
    assert len(f"batchlab-conform-01234567-{check.name}-10-nothing") <= 80
    assert re.fullmatch(r"[A-Z].*\.|maxReceiveCount .*\.", check.rule)
    assert check.otherwise
    assert not check.otherwise.endswith(".")
    assert check.promise
    # A check without consequences must give a reason.
    assert check.otherwise != "nothing" or check.promise.startswith("none: ")
    for text, url in sources.pages(check.source):
        known = "recorded answers of AWS", "the API reference does not state the rule", "RFC 9110, range requests"
        assert url.startswith("https://docs.aws.amazon.com/") or text in known


def test_checks_that_batchlab_depends_on_are_needed() -> None:
    needed = {one.name for one in CHECKS if one.severity is Severity.NEEDED}
    assert set(RELIED_ON) <= needed


def test_every_race_is_one_of_16() -> None:
    race = next(one for one in CHECKS if one.name == "s3-create-race")
    assert "16" in race.rule
    assert inspect.getmodule(race.run).__dict__["RACERS"] == 16


def test_checks_are_found_by_a_pattern() -> None:
    assert len(matching("*")) == len(CHECKS)
    assert {one.service for one in matching("sqs-*")} == {"sqs"}
    assert [one.name for one in matching("s3-create-race")] == ["s3-create-race"]
    assert matching("S3-*") == []
    assert matching("*", ASG_CHECKS) == list(ASG_CHECKS)


def test_auto_scaling_checks_run_only_on_request() -> None:
    assert of_service(None) == CHECKS
    assert {one.service for one in CHECKS} == {"s3", "sqs"}
    for service in SERVICES:
        assert {one.service for one in of_service(service)} == {service}


# --- Sources --------------------------------------------------------------------------------------


def test_a_source_links_to_every_page_it_names() -> None:
    api = "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference"
    assert sources.link("SQS API, CreateQueue, common errors; recorded answers of AWS") == (
        f"[SQS API, CreateQueue]({api}/API_CreateQueue.html), "
        f"[common errors]({api}/CommonErrors.html), recorded answers of AWS"
    )
    assert sources.page("RFC 9110", "range requests") == ""
    with pytest.raises(KeyError):
        sources.page("S3 User Guide", "a page that nobody knows")


# --- Answers --------------------------------------------------------------------------------------


def test_an_answer_is_what_was_expected_or_a_difference() -> None:
    accepted, refused = Answer("PutObject", 200), Answer("PutObject", 412, "PreconditionFailed")
    assert accepted.expect_accepted() is accepted
    refused.expect_refused(412, "Other", "PreconditionFailed")
    refused.expect_refused(412)
    for call, told in (
        (refused.expect_accepted, "PutObject returns 412 PreconditionFailed"),
        (lambda: accepted.expect_refused(412), "PutObject is accepted"),
        (lambda: refused.expect_refused(409), "PutObject returns 412 PreconditionFailed"),
        (lambda: refused.expect_refused(412, "Other"), "PutObject returns 412 PreconditionFailed"),
        (lambda: Answer("HeadObject", 404, "404").expect_accepted(), "HeadObject returns 404"),
    ):
        with pytest.raises(Differs, match=f"^{told}$"):
            call()


# --- Reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("severity", "verdict", "relied_on", "agrees"),
    [
        (Severity.NEEDED, CheckVerdict.AGREES, True, True),
        (Severity.NEEDED, CheckVerdict.DIFFERS, False, False),
        (Severity.NEEDED, CheckVerdict.UNTRIED, False, False),
        (Severity.NOTED, CheckVerdict.AGREES, True, True),
        (Severity.NOTED, CheckVerdict.DIFFERS, True, False),
        (Severity.NOTED, CheckVerdict.UNTRIED, True, True),
    ],
)
def test_agreement_of_an_answer(severity: Severity, verdict: CheckVerdict, relied_on: bool, agrees: bool) -> None:
    results = [a_result(CheckVerdict.AGREES), a_result(verdict, severity)]
    assert (check_table.needed_rules_hold(results), check_table.agrees(results)) == (relied_on, agrees)


def test_a_run_in_a_sentence() -> None:
    needed = [a_result(verdict) for verdict in (CheckVerdict.AGREES, CheckVerdict.AGREES, CheckVerdict.UNTRIED)]
    noted = [a_result(verdict, Severity.NOTED) for verdict in (CheckVerdict.AGREES, CheckVerdict.DIFFERS)]
    assert check_table.verdict_text([*needed, *noted]) == (
        "2 of 3 needed rules hold; 1 of 2 noted rules holds. 1 could not be tested."
    )
    assert check_table.verdict_text(noted) == "1 of 2 noted rules holds."


def test_a_section_lists_what_differs_and_what_was_not_tried() -> None:
    text = check_table.section(
        "Mine 1.0", [a_result(CheckVerdict.AGREES), a_result(CheckVerdict.DIFFERS), a_result(CheckVerdict.UNTRIED)]
    )
    head, *tables = text.split("\n\n")
    assert head == "### Mine 1.0"
    assert tables[0].startswith("1 of 3 needed rules")
    row = r"| `s3-a` | needed | A \| B. | it \| does not | nothing: it is new |"
    assert [table.split("\n")[2:] for table in tables[1:]] == [[row], [row]]
    assert "observed" in tables[1]
    assert "why not tested" in tables[2]
    assert check_table.section("Mine 1.0", [a_result(CheckVerdict.AGREES)]).count("\n\n") == 1


def test_page_keeps_its_other_sections() -> None:
    page = check_table.merge("", "one", "first")
    page = check_table.merge(page, "two", "second")
    page = check_table.merge(f"# Title\n\n{page}\nThe end.\n", "one", "changed \\1")
    assert page == (
        "# Title\n\n<!-- conform: one -->\nchanged \\1\n<!-- conform end -->\n\n"
        "<!-- conform: two -->\nsecond\n<!-- conform end -->\n\nThe end.\n"
    )
    assert check_table.merge(page, "two", "second") == page


def test_json_describes_every_check() -> None:
    told = check_table.to_json(a_result(CheckVerdict.DIFFERS))
    assert told.pop("pages") == ["https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html"]
    assert told == {
        "check": "s3-a",
        "service": "s3",
        "severity": "needed",
        "verdict": "differs",
        "observed": "it | does not",
        "rule": "A | B.",
        "source": "S3 API, GetObject",
        "promise": "none: it is new",
        "follows": "nothing: it is new",
        "seconds": 0.5,
    }


# --- The page on emulators ------------------------------------------------------------------------


def page_sections(page: str) -> dict[str, str]:
    text = (DOCS / page).read_text()
    found = re.findall(r"<!-- conform: (.*?) -->\n(.*?)\n<!-- conform end -->", text, re.DOTALL)
    return dict(found)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_lists_every_check_as_it_is(page: str) -> None:
    assert page_sections(page)[check_table.ALL_CHECKS] == check_table.list_section(PAGES[page])


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page in PAGES for name in page_sections(page) if name != check_table.ALL_CHECKS]
)
def test_section_of_the_page_matches_the_checks(page: str, name: str) -> None:
    """Only an emulator can show whether the table is still correct (see tests/system/test_conform.py). This comparison
    runs without an emulator."""
    seen: dict[str, str] = {}
    for line in page_sections(page)[name].splitlines():
        if line.startswith("| `"):
            check, _, _, observed, _ = line.removeprefix("| ").removesuffix(" |").split(" | ")
            seen[check.strip("`")] = observed
    assert seen or name == "batchlab asg serve"
    results = [
        Result(one, CheckVerdict.DIFFERS, seen.pop(one.name), 0.0)
        if one.name in seen
        else Result(one, CheckVerdict.AGREES, "", 0.0)
        for one in PAGES[page]
    ]
    assert seen == {}
    assert check_table.section(name, results) == page_sections(page)[name]


def test_the_page_is_right_about_what_is_needed() -> None:
    """The test compares the prose about each emulator with its table."""
    needed = {
        name: re.findall(r"^\| `(\S+)` \| needed", text, re.MULTILINE)
        for name, text in page_sections("emulators.md").items()
        if name != check_table.ALL_CHECKS
    }
    assert needed == {"MiniStack 1.5.33": [], "LocalStack 4.14.0": ["s3-list-pages-unicode"], "moto 5.2.5": []}


def test_page_for_users_counts_the_rules() -> None:
    page = (ROOT / "docs" / "conform.md").read_text()
    needed, noted = (
        sum(check.severity is severity for check in CHECKS) for severity in (Severity.NEEDED, Severity.NOTED)
    )
    assert f"{needed} rules of S3 and SQS" in page
    assert f"{noted} further rules" in page
    at_moto = next(text for name, text in page_sections("asg-endpoint.md").items() if name.startswith("moto"))
    (counted,) = re.findall(r"(\d+ of \d+ needed rules) hold;", at_moto)
    assert f"{counted} hold at moto" in page
