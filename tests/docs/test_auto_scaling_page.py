"""The table of Auto Scaling rules in the docs, which names every test and only valid links."""

from __future__ import annotations

import re

from tests.support import ROOT

PAGE = (ROOT / "docs" / "contributing" / "auto-scaling.md").read_text()
ENGINE = (
    "groups",
    "histories",
    "instances",
    "lifecycle",
    "placement",
    "policies",
    "refresh",
    "schedules",
    "spot",
    "termination",
    "warm_pool",
)
WITHOUT_RULE = {
    "test_state_of_the_first_format_is_read",
    "test_inconsistent_state_is_refused",
    "test_instances_of_one_machine_have_its_gpus_one_after_another",
    "test_an_instance_refresh_ends_an_instance_with_gpus_first",
    "test_the_end_of_a_lifetime_ends_an_instance_with_gpus_first",
    "test_a_launch_that_waits_for_gpus_has_a_reason",
}
"""Tests of the state store and of a machine that all instances share, which are not based on a rule of AWS."""


def test_every_rule_has_tests_that_exist_and_every_test_has_its_rule() -> None:
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", PAGE))
    written: set[str] = set()
    for part in ENGINE:
        text = (ROOT / "tests" / "fleet" / f"test_{part}.py").read_text()
        written |= set(re.findall(r"^(?:async )?def (test_\w+)", text, re.M))
    assert named - written == set()
    assert written - named == WITHOUT_RULE


def test_every_rule_names_its_page() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`test_" in line]
    rows = [row for row in rows if not row.startswith("| rule")]
    links = dict(re.findall(r"^\[(.+)\]: (https://docs\.aws\.amazon\.com/\S+)$", PAGE, re.M))
    pages = [row.split(" | ")[1] for row in rows]
    assert len(rows) > 70
    assert {name for page in pages for name in re.findall(r"\[(.+?)\]", page)} == set(links)
    assert all(page == "–" or page.startswith("[") for page in pages)
