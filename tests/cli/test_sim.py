"""`batchlab sim …`: its output, its exit code, and the suggested next command."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from batchlab.cli.output import Stopped
from batchlab.cli.sim import Campaign
from batchlab.core.model import JobId
from batchlab.sim import fuzz, invariants
from batchlab.sim.actors import Violated
from batchlab.sim.faults import Fault, FaultKind
from batchlab.sim.fuzz import Failure, SeedResult, ShrinkResult
from batchlab.sim.world import World
from tests.support import ROOT
from tests.support.cli import Run

LOST = Fault("manager", 3, FaultKind.LOST)
KILLED = Fault("worker-w-1", 41, FaultKind.KILL_AFTER)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the campaign by one in which every seed from 3 on fails with one of two faults."""

    def campaign(seeds: Iterable[int], weather: str, jobs: int) -> Generator[SeedResult, None, None]:
        for seed in seeds:
            text = "I2 is violated: 3 planned, 2+0+0 ended"
            failure = Failure(seed, "I2", text, (LOST, KILLED)) if seed >= 3 else None
            yield SeedResult(seed, (LOST, KILLED), None, failure)

    def all_fewest(
        failures: Sequence[Failure], weather: str, jobs: int, now_s: object
    ) -> Generator[tuple[Failure, ShrinkResult[Fault] | None], None, None]:
        found = [ShrinkResult((KILLED,), 9, least=True), None, ShrinkResult((LOST, KILLED), 400, least=False)]
        yield from zip(failures, found, strict=False)

    monkeypatch.setattr(fuzz, "campaign", campaign)
    monkeypatch.setattr(fuzz, "all_fewest", all_fewest)


def rows(text: str) -> dict[str, list[str]]:
    """Return the lines of a text by their first word."""
    split = [line.split() for line in text.splitlines()]
    return {words[0]: words[1:] for words in split if words}


# --- fuzz ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_campaign_shows_what_happened_and_how_often(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    code, out, err = run(
        "sim", "fuzz", "--seeds", 3, "--from", 5, "--weather", "crashes", "--jobs", 2, "--report", file
    )
    assert code == 0
    assert "Traceback" not in err  # stderr contains only progress, which appears in slow runs
    assert re.match(r"3 seeds from 5, weather crashes, in .*, 2 at a time\n", out)
    assert out.endswith("\nEvery promise was kept.\n")
    told = rows(out)
    assert int(told["kill_before"][0]) > 0
    assert told["throttled"][:2] == ["0", "0"]
    assert set(told) >= {kind.value for kind in FaultKind}
    markdown = file.read_text()
    assert "| seeds | 3, from 5 |" in markdown
    assert f"| `kill_before` | {told['kill_before'][0]} |" in markdown


@pytest.mark.slow
def test_json_matches_the_text(run: Run) -> None:
    code, out, _ = run("sim", "fuzz", "--seeds", 2, "--weather", "storm", "--jobs", 1, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["from"], told["wanted"], told["seeds"], told["failures"]) == (0, 2, 2, [])
    assert set(told["faults"]) == {kind.value for kind in FaultKind}
    assert told["faults"]["throttled"]["seeds"] == 2
    assert min(told["virtual_s"], told["managers"], sum(told["jobs"].values())) > 0


@pytest.mark.usefixtures("failing")
def test_failures_show_the_promise_the_fewest_faults_and_the_command(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    code, out, _ = run("sim", "fuzz", "--seeds", 7, "--weather", "storm", "--report", file)
    assert code == 1
    assert "4 seeds broke a promise." in out
    for text in (out, file.read_text()):
        told = re.findall(r"[Ss]eed (\d+): I2 is violated: 3 planned, 2\+0\+0 ended", text)
        assert told == ["3", "4", "5", "6"]
        assert re.findall("batchlab sim replay [^\n`]*", text) == [
            "batchlab sim replay 3 --only worker-w-1:41:kill_after --weather storm",
            *(f"batchlab sim replay {seed} --weather storm" for seed in (4, 5, 6)),
        ]
    assert "of which the fewest that break the promise are: worker-w-1:41:kill_after\n" in out
    assert "a replay with only these faults does not break the promise" in out
    assert "after 2 faults; no smaller set that breaks the promise was found in time" in out


def test_aborted_search_for_the_fewest_faults_is_reported() -> None:
    failure = Failure(3, "I2", "I2 is violated: 3 planned, 2+0+0 ended", (LOST, KILLED))
    campaign = Campaign(0, 4, "all", 1)
    campaign.tally.add(SeedResult(3, failure.faults, None, failure))
    campaign.fewest[3] = ShrinkResult((LOST,), 400, least=False)
    told = campaign.text()
    assert "after 2 faults, of which the fewest found in time that break the promise are: manager:3" in told
    assert told.endswith("\n  batchlab sim replay 3 --only manager:3:lost")


@pytest.mark.usefixtures("failing")
def test_failures_as_json(run: Run) -> None:
    code, out, _ = run("sim", "fuzz", "--seeds", 5, "--json")
    first, second = json.loads(out)["failures"]
    assert code == 1
    assert first == {
        "seed": 3,
        "promise": "I2",
        "text": "I2 is violated: 3 planned, 2+0+0 ended",
        "faults": ["manager:3:lost", "worker-w-1:41:kill_after"],
        "fewest": ["worker-w-1:41:kill_after"],
        "least": True,
        "replay": "batchlab sim replay 3 --only worker-w-1:41:kill_after",
    }
    assert (second["fewest"], second["replay"]) == (None, "batchlab sim replay 4")


@pytest.mark.usefixtures("failing")
def test_campaign_stops_after_the_given_number_of_failures(run: Run) -> None:
    code, out, _ = run("sim", "fuzz", "--seeds", 1000, "--stop-after", 2)
    assert code == 1
    assert "2 seeds broke a promise. It stopped there. 995 seeds were not tried." in out


def test_interrupted_campaign_prints_its_results(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def campaign(seeds: Iterable[int], weather: str, jobs: int) -> Generator[SeedResult, None, None]:
        yield SeedResult(0, (LOST,), None, None)
        raise Stopped(130)

    monkeypatch.setattr(fuzz, "campaign", campaign)
    code, out, _ = run("sim", "fuzz", "--seeds", 9)
    assert code == 130
    assert "Every promise was kept. It was interrupted. 8 seeds were not tried." in out
    assert rows(out)["lost"][:2] == ["1", "1"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fuzz", "--weather", "fog"), "The weather 'fog' does not exist.\n  Name one of accounts, all,"),
        (("fuzz", "--report", "/nowhere/a.md"), "/nowhere/a.md cannot be written"),
        (("fuzz", "--seeds", "0"), "--seeds"),
        (("replay", "7", "--weather", "fog"), "The weather 'fog' does not exist."),
        (("replay", "7", "--log", "/nowhere/a.log"), "/nowhere/a.log cannot be written"),
        (("replay", "7", "--only", "manager:3:spilled"), "The kind of fault 'spilled' does not exist."),
        (("replay", "7", "--only", "manager"), "'manager' is not a fault"),
        (("replay", "seven"), "SEED"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(run: Run, arguments: Sequence[str], told: str) -> None:
    code, out, err = run("sim", *arguments)
    assert (code, out) == (2, "")
    assert told in err


# --- replay --------------------------------------------------------------------------------------


def test_seed_without_a_violation_exits_with_0(run: Run) -> None:
    code, out, err = run("sim", "replay", 3, "--weather", "storm")
    assert (code, err) == (0, "")
    assert re.match(r"Seed 3 keeps every promise: [1-9]\d* faults, ", out)
    code, out, err = run("sim", "replay", 3, "--only", "none")
    assert code == 0
    assert "keeps every promise: 0 faults" in out


def test_faults_that_fit_no_call_are_named(run: Run) -> None:
    code, _, err = run("sim", "replay", 3, "--only", "nobody:1:lost")
    assert code == 0
    assert err == "These fitted no call and did not happen: nobody:1:lost\n"


def test_a_broken_promise_is_shown_with_the_end_of_the_log(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def broken(world: World, jobs: Sequence[JobId]) -> None:
        raise Violated("I3 is violated: planted")

    monkeypatch.setattr(invariants, "check_all", broken)
    code, out, _ = run("sim", "replay", 3, "--only", "none")
    assert code == 1
    first, *log = out.splitlines()
    assert first == "Seed 3, after 0 faults: I3 is violated: planted"
    assert re.match(r"The last 20 of [\d,]+ lines of the event log:", log[0])
    assert len(log) == 21
    file = tmp_path / "events.log"
    code, out, _ = run("sim", "replay", 3, "--only", "none", "--log", file)
    assert (code, out) == (1, f"{first}\n")
    assert file.read_text().splitlines()[-20:] == log[1:]


def test_unexpected_error_is_shown_with_its_place(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(world: World, jobs: Sequence[JobId]) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(invariants, "check_all", broken)
    code, out, _ = run("sim", "replay", 3, "--only", "none")
    assert code == 1
    assert out.startswith("Seed 3, after 0 faults: KeyError: 'oh'\n")
    assert "in broken" in out


@pytest.mark.usefixtures("failing")
def test_printed_command_can_be_run_unchanged(run: Run) -> None:
    _, out, _ = run("sim", "fuzz", "--seeds", 4)
    (command,) = re.findall("batchlab (sim replay .*)", out)
    code, out, err = run(*shlex.split(command))
    assert code == 0
    assert err.startswith("These fitted no call")


# --- faults --------------------------------------------------------------------------------------


def test_the_kinds_of_faults_are_listed(run: Run) -> None:
    _, out, _ = run("scenario", "faults", "--simulator")
    assert set(rows(out)) == {"FAULT", *(kind.value for kind in FaultKind)}
    _, out, _ = run("scenario", "faults", "--simulator", "--json")
    assert [load["fault"] for load in json.loads(out)] == [kind.value for kind in FaultKind]
    assert all(load["meaning"] for load in json.loads(out))


# --- In a terminal -------------------------------------------------------------------------------


def screen(terminal: int) -> Iterator[str]:
    """Yield the output in a terminal until the last program that writes to it has ended."""
    with contextlib.suppress(OSError):  # EIO: all programs have ended
        while data := os.read(terminal, 65536):
            yield data.decode(errors="replace")


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_it_at_once_and_leaves_no_process() -> None:
    terminal, far_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchlab", "sim", "fuzz", "--seeds", "100000", "--jobs", "2"],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=far_end,
        start_new_session=True,
        text=True,
    )
    os.close(far_end)
    shown = ""
    for text in screen(terminal):
        shown += text
        if re.search(r"[1-9]\d* of 100,000 seeds", shown) and process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            break
    for text in screen(terminal):
        shown += text
    os.close(terminal)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "It was interrupted." in out
    assert "Traceback" not in shown
    assert "seeds/s" in shown
    deadline_s = time.monotonic() + 30
    while not gone(process.pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


# --- The docs ------------------------------------------------------------------------------------


def test_the_docs_list_every_fault_with_its_meaning() -> None:
    page = (ROOT / "docs" / "contributing" / "simulation.md").read_text()
    section = page.split("## Faults")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M)
    assert listed == [(kind.value, kind.meaning) for kind in FaultKind]
