"""The findings of a report. Each check is tested on both sides of its threshold."""

from __future__ import annotations

from decimal import Decimal

import pytest

from batchlab.reports.html.checks import CHECKS, Level, findings
from batchlab.reports.html.metrics import RunFigures
from tests.support.reports.metrics import SIGNS, of_stage, signs


def test_good_run_has_no_findings_and_lists_the_checks() -> None:
    found = findings(SIGNS)
    assert [one.title for one in found if one.level is not Level.GOOD] == []
    assert len(found) == len(CHECKS)
    assert len({one.check for one in found}) == len(CHECKS)
    assert all(one.figure and not one.setting for one in found)


HIT = [
    # The fields are: check, level, measures that trigger it, figures that it names, and setting that it names.
    ("task size", Level.NOTE, of_stage(tiny=900, median_s=0.02), ("20 ms", "90%", "1.0 tasks"), "`size`"),
    ("task size", Level.ACT, of_stage(tiny=900, median_s=0.02, took_s=60.0, overhead_s=40.0), ("67%",), "at least 50"),
    ("overhead", Level.ACT, of_stage(took_s=2600.0, overhead_s=600.0), ("23%", "600 ms"), "bundle"),
    (
        "long tasks on Spot",
        Level.ACT,
        of_stage(long_on_spot=3, longest_on_spot_s=1900.0),
        ("3 tasks", "31 min 40 s"),
        "--on-demand-percent",
    ),
    ("task length", Level.ACT, of_stage(too_long=1, longest_s=41_000.0), ("1 task", "11 h 23 min"), "`size`"),
    (
        "shared slots",
        Level.ACT,
        of_stage(alone_s=1.0, crowded_s=1.8),
        ("1.8 s", "1.0 s", "1.8 times"),
        "--pool default:MIN-MAXxSLOTS",
    ),
    ("idle slots", Level.NOTE, signs(filled=0.5), ("50%", "2 slots"), "MIN-MAXxSLOTS"),
    ("scaling lag", Level.ACT, signs(first_wait_s=120.0), ("20%", "30.0 s"), "default --min N"),
    ("fleet too small", Level.NOTE, signs(full_s=400.0), ("67%", "3 min 20 s"), "--max N"),
    ("fleet too large", Level.NOTE, signs(busy_s=1200.0), ("50%", "20 min 00 s", "4 instances ran some"), "`idle_s`"),
    ("fleet too large", Level.ACT, signs(busy_s=240.0), ("90%",), "--max N"),
    ("fleet too large", Level.ACT, signs(unused=2), ("2 of 4 instances",), "`drain_target_s`"),
    (
        "idle cost",
        Level.NOTE,
        signs(idle=Decimal("0.71"), total=Decimal("1.61")),
        ("44% of the bill", "43%"),
        "`idle_s`",
    ),
    ("idle while work waits", Level.ACT, signs(starved_s=600.0), ("25%",), "`bundle`"),
    ("idle while work waits", Level.ACT, signs(starved_s=600.0, share="research"), ("25%",), "gives share research"),
    ("long tail", Level.NOTE, signs(tail_s=200.0), ("33%", "5.0 s"), "`size`"),
    ("wasted work", Level.ACT, signs(failed_s=300.0), ("14%", "5 min 00 s"), "`retry`"),
    ("wasted work", Level.ACT, signs(lost_s=300.0), ("12%",), "Spot"),
    ("wasted work", Level.ACT, signs(repeated_s=300.0), ("12%",), "`visibility_s`"),
    (
        "wasted work",
        Level.ACT,
        signs(repeated_s=300.0, copies=9, copies_won=2),
        ("12%",),
        "`speculative_copies: false`",
    ),
    ("duplicates", Level.WRONG, signs(harmful=2), ("2 tasks",), "bug"),
    ("requests", Level.ACT, signs(compute=Decimal("0.15")), ("20%", "15%"), "`bundle`"),
]


@pytest.mark.parametrize(("check", "level", "seen", "figures", "setting"), HIT)
def test_each_finding_names_its_figure_and_its_setting(
    check: str, level: Level, seen: RunFigures, figures: tuple[str, ...], setting: str
) -> None:
    (found,) = [finding for finding in findings(seen) if finding.level is not Level.GOOD]
    assert (found.check, found.level) == (check, level)
    assert [figure for figure in figures if figure not in found.figure] == []
    assert setting in found.setting


@pytest.mark.parametrize(
    "seen",
    [
        of_stage(tiny=500, median_s=0.1),
        of_stage(overhead_s=4.0, took_s=6.0),  # the stage is too short to matter
        of_stage(alone_s=1.0, crowded_s=1.29),
        of_stage(alone_s=0.0, crowded_s=0.0),
        signs(filled=None),
        signs(filled=0.61),
        signs(first_wait_s=89.0),
        signs(first_wait_s=4.0, span_s=5.0, full_s=2.0, tail_s=1.0),
        signs(full_s=299.0),
        signs(unused=1),
        signs(tail_s=149.0),
        signs(failed_s=100.0),
        signs(stages=(), busy_s=0.0, slot_s=0.0, starved_s=0.0, tail_s=0.0, peak_slots=0.0, full_s=0.0),
        signs(total=Decimal(0), compute=Decimal(0), requests=Decimal(0), idle=Decimal(0)),
    ],
)
def test_values_within_bounds_have_no_finding(seen: RunFigures) -> None:
    assert [finding for finding in findings(seen) if finding.level is not Level.GOOD] == []


def test_problems_are_listed_first() -> None:
    seen = signs(harmful=1, full_s=400.0, lost_s=300.0)
    levels = [finding.level for finding in findings(seen)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] is Level.WRONG


def test_only_jobs_with_a_named_share_get_advice_about_shares() -> None:
    (found,) = [finding for finding in findings(signs(starved_s=600.0)) if finding.setting]
    assert "share" not in found.setting


def test_stage_name_with_backticks_cannot_break_a_command() -> None:
    (found,) = [finding for finding in findings(of_stage(name="a`b", too_long=1)) if finding.setting]
    assert "a'b" in found.title
    assert found.setting.count("`") % 2 == 0
