"""Table of all conformance checks. The module also writes the results of a run as JSON and as Markdown sections.

Invariants: the names of checks are unique and begin with the name of the service. A Markdown section changes only if
the endpoint changes, so a test can compare the documentation page about emulators with a new run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from batchlab.conform.adapters import S3_PORTS, SQS_PORTS
from batchlab.conform.asg_groups import ASG_GROUPS
from batchlab.conform.asg_instances import ASG_INSTANCES
from batchlab.conform.check import Check, CheckVerdict, Severity, link, pages
from batchlab.conform.run import Result
from batchlab.conform.s3_create import S3_CREATE, S3_LIST
from batchlab.conform.s3_read import S3_READ, S3_UPLOAD
from batchlab.conform.sqs_queues import SQS_QUEUES
from batchlab.conform.sqs_receive import SQS_RECEIPTS, SQS_RECEIVE
from batchlab.conform.sqs_send import SQS_SEND

CHECKS: tuple[Check, ...] = (
    *S3_CREATE,
    *S3_READ,
    *S3_LIST,
    *S3_UPLOAD,
    *S3_PORTS,
    *SQS_SEND,
    *SQS_RECEIVE,
    *SQS_RECEIPTS,
    *SQS_QUEUES,
    *SQS_PORTS,
)
"""Checks of S3 and SQS. `batchlab conform` runs the checks of S3 and SQS by default."""

ASG_CHECKS: tuple[Check, ...] = (*ASG_GROUPS, *ASG_INSTANCES)
"""Checks of EC2 Auto Scaling. `batchlab conform` runs these checks only on request, because the checks launch
instances.
"""

SERVICES = ("s3", "sqs", "autoscaling")


def of_service(service: str | None) -> Sequence[Check]:
    """Return the checks of a service, or the checks of S3 and SQS if `service` is None."""
    if service is None:
        return CHECKS
    return [check for check in (*CHECKS, *ASG_CHECKS) if check.service == service]


def matching(pattern: str, checks: Sequence[Check] = CHECKS) -> list[Check]:
    """Return the checks whose names match a shell pattern."""
    return [check for check in checks if fnmatchcase(check.name, pattern)]


ALL_CHECKS = "every check"
"""Name of the section that lists all checks on the page about emulators."""


def count_results(
    results: Sequence[Result], verdict: CheckVerdict, severity: str | None = None, service: str = ""
) -> int:
    """Return the number of results with the given verdict, severity, and service. A severity of None and a service of
    "" match all results.
    """
    return sum(
        result.verdict is verdict
        and severity in (None, result.check.severity)
        and service in ("", result.check.service)
        for result in results
    )


def needed_rules_hold(results: Sequence[Result]) -> bool:
    return all(result.verdict is CheckVerdict.AGREES or result.check.severity is Severity.NOTED for result in results)


def agrees(results: Sequence[Result]) -> bool:
    """Return whether the endpoint follows all NEEDED rules, and does not break a NOTED rule."""
    return needed_rules_hold(results) and not count_results(results, CheckVerdict.DIFFERS)


def to_json(result: Result) -> dict[str, Any]:
    check = result.check
    return {
        "check": check.name,
        "service": check.service,
        "severity": check.severity.value,
        "verdict": result.verdict.value,
        "observed": result.observed,
        "rule": check.rule,
        "source": check.source,
        "pages": [url for _, url in pages(check.source) if url],
        "promise": check.promise,
        "follows": check.follows,
        "seconds": round(result.seconds, 3),
    }


def verdict_text(results: Sequence[Result]) -> str:
    """Return a summary of the results of a run in one or two sentences."""
    parts = []
    for severity, what in ((Severity.NEEDED, "needed"), (Severity.NOTED, "noted")):
        rules = [result for result in results if result.check.severity is severity]
        holding = count_results(rules, CheckVerdict.AGREES)
        if rules:
            parts.append(f"{holding} of {len(rules)} {what} rules {'holds' if holding == 1 else 'hold'}")
    untried = count_results(results, CheckVerdict.UNTRIED)
    return "; ".join(parts) + "." + (f" {untried} could not be tested." if untried else "")


def section(name: str, results: Sequence[Result]) -> str:
    """Return the results of a run as a Markdown section of the documentation page about emulators."""
    lines = [f"### {name}", "", verdict_text(results)]
    for verdict, title in ((CheckVerdict.DIFFERS, "observed"), (CheckVerdict.UNTRIED, "why not tested")):
        rows = [
            (
                f"`{result.check.name}`",
                result.check.severity.value,
                result.check.rule,
                result.observed,
                result.check.follows,
            )
            for result in results
            if result.verdict is verdict
        ]
        if rows:
            head = ("check", "", "AWS's rule", title, "effect on batchlab")
            lines += ["", *_table(head, rows)]
    return "\n".join(lines)


def list_section(checks: Iterable[Check]) -> str:
    """Return the list of all checks as a Markdown section of the documentation page about emulators."""
    rows = [
        (f"`{check.name}`", check.severity.value, check.rule, link(check.source), check.promise) for check in checks
    ]
    head = ("check", "", "AWS's rule", "AWS documentation", "use in batchlab")
    return "\n".join([f"### {ALL_CHECKS.capitalize()}", "", *_table(head, rows)])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def merge(page: str, name: str, text: str) -> str:
    """Return the Markdown text `page` with `text` as the content of the section `name`. If the page lacks the section,
    append the section.
    """
    begin, end = f"<!-- conform: {name} -->", "<!-- conform end -->"
    block = f"{begin}\n{text}\n{end}"
    match = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", page, re.DOTALL)
    if match is None:
        return f"{page.rstrip()}\n\n{block}\n".lstrip()
    return page[: match.start()] + block + page[match.end() :]
