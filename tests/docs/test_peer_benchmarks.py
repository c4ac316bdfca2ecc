"""The benchmark of peers: checks of results, medians, tables, requirements, and one run with the process pool."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import install, processes, report, rounds, services, tasks, workloads
from benchmarks.peers.registry import PACKAGES, PEERS
from benchmarks.peers.workloads import Lost, Workload, WrongResults
from tests.support import ROOT
from tests.support.waiting import until

DOCS = ROOT / "docs" / "contributing" / "benchmarks.md"


def answers(workload: Workload) -> list[Any]:
    return [tasks.call(workload.task, arguments) for arguments in workload.calls]


@pytest.mark.parametrize("name", workloads.ALL)
def test_results_of_the_tasks_are_right(name: str, tmp_path: Path) -> None:
    workload = workloads.make(name, tmp_path, scale=0.01)
    workload.check(answers(workload))
    assert workload.name == name


def swap(results: list[Any]) -> list[Any]:
    return [results[1], results[0], *results[2:]]


def lose(results: list[Any]) -> list[Any]:
    return [*results[:-1], Lost("worker died")]


WRONG = [
    pytest.param(swap, "the result of task 0 is 1 instead of 0", id="order"),
    pytest.param(lambda results: results[:-1], "3 results for 4 tasks", id="incomplete"),
    pytest.param(lambda results: [*results[:-1], 10], "the result of task 3 is 10 instead of 9", id="value"),
    pytest.param(lambda results: [*results, 16], "5 results for 4 tasks", id="too many"),
    pytest.param(lose, "1 tasks are lost, the first one because of worker died", id="lost"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_results_are_found(change: Any, message: str, tmp_path: Path) -> None:
    workload = workloads.make("W1", tmp_path, scale=0.0)
    with pytest.raises(WrongResults, match=message):
        workload.check(change(answers(workload)))


def test_lost_tasks_of_a_kill_are_no_error_but_wrong_results_are(tmp_path: Path) -> None:
    workload = workloads.make("W7", tmp_path, scale=0.0)
    workload.check([Lost("killed"), 1, 2, 3], may_lose=True)
    with pytest.raises(WrongResults, match="task 1 is 2 instead of 1"):
        workload.check([Lost("killed"), 2, 1, 3], may_lose=True)


def test_missing_and_wrong_files_are_found(tmp_path: Path) -> None:
    workload = workloads.make("W4", tmp_path, scale=0.01)
    results = answers(workload)
    assert workload.output
    first, *_ = sorted(workload.output.iterdir())
    first.write_text("[0, 0]")
    with pytest.raises(WrongResults, match="the files in output differ"):
        workload.check(results)
    first.unlink()
    with pytest.raises(WrongResults, match="the files in output differ"):
        workload.check(results)


def test_medians_count_the_quietest_rounds_without_errors() -> None:
    def one(figure: float, other: float) -> dict[str, Any]:
        return {"per_s": figure, "other_cores": other, "cpu_s": {"total": figure}, "lost_because": [str(figure)]}

    noisy = one(999.0, 1.9)
    found = report.medians([one(3.0, 0.1), noisy, one(1.0, 0.2), {"error": "it failed"}, one(2.0, 0.0)])
    assert (found["per_s"], found["cpu_s"], found["rounds"]) == (2.0, {"total": 2.0}, 3)
    assert found["lost_because"] == ["1.0", "2.0", "3.0"]
    assert found["errors"] == ["it failed"]
    assert report.medians([{"error": "it failed"}]) == {"rounds": 0, "errors": ["it failed"]}


FIGURES: dict[str, dict[str, Any]] = {
    "W1": {"per_s": 1234.4, "tasks": 100, "cpu_s": {"total": 0.5, "driver": 0.1, "workers": 0.2, "redis": 0.2}},
    "W2": {"efficiency": 0.905},
    "W5": {"median_ms": 3.94, "p99_ms": 33.6},
    "W6": {"first_s": 1.108},
    "W7": {"wall_s": 5.23, "lost": 0, "completed_twice": 31},
    "W7N": {"wall_s": 5.23, "lost": 334, "completed_twice": 0},
}


def results(name: str, loads: Sequence[float] = (0.0,)) -> dict[str, Any]:
    measured = {
        workload: {"median": report.medians([{**figures, "other_cores": load} for load in loads])}
        for workload, figures in FIGURES.items()
    }
    return {name: measured | {"W3": {"median": report.medians([{"error": "it failed"}])}}}


def test_tables_show_each_figure() -> None:
    found = report.tables({"scale": 0.5, "runs": results("celery_redis b64 late", [0.1, 0.7, 1.8])})
    row = (
        "| Celery + Redis, bundles of 64 by hand, at-least-once settings | 1,234/s | 90.5% | error | – "
        "| 3.9 / 34 ms | 1.11 s | 5.2 s, 0 lost, 31 twice | –, 334 lost, 0 twice |"
    )
    assert row in found
    assert "| 5.000 | 1.000 | 2.000 | 2.000 |" in found
    assert "Versions: celery 5.7.0. Rounds: 3." in found
    assert "used 0.7 cores in the median measurement, and at most 0.7 cores" in found
    assert "The workloads had 50% of their tasks." in found


def test_rows_follow_the_registry_and_slow_peers_are_named() -> None:
    found = report.tables({"scale": 1.0, "runs": results("luigi") | results("ppe1 b64") | results("batchlab_local")})
    titles = [line.split("|")[1].strip() for line in found.splitlines() if line.startswith("| ")]
    assert titles[2:5] == ["batchlab, `local`", "Luigi", "ProcessPoolExecutor, bundles of 64 by hand"]
    assert "Share of the tasks in W1, W2, and W4: Luigi 10%." in found
    assert "of their tasks." not in found


def test_tables_replace_the_tables_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write("new", page)
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no marks"):
        report.write("new", page)


def test_results_of_two_runs_are_joined(tmp_path: Path) -> None:
    options = rounds.Options(["ppe1"], ["W6"], tmp_path, tmp_path, bundle=64)
    first = rounds.document({"ppe1": {"W6": [{"first_s": 1.0}]}}, options)
    second = rounds.document({"ppe1": {"W6": [{"first_s": 3.0}]}}, options, json.loads(json.dumps(first)))
    assert second["runs"]["ppe1 b64"]["W6"]["median"] == {"rounds": 2, "first_s": 2.0}
    assert len(first["runs"]["ppe1 b64"]["W6"]["runs"]) == 1


def test_workloads_share_a_grid() -> None:
    assert list(rounds.groups(workloads.ALL)) == [["W1", "W2", "W3", "W4", "W5"], ["W6"], ["W7"], ["W7N"]]
    assert list(rounds.groups(["W7"])) == [["W7"]]


@pytest.mark.parametrize("name", PEERS)
def test_registry_is_consistent(name: str) -> None:
    peer = PEERS[name]
    assert importlib.util.find_spec("benchmarks.peers.adapters")
    assert (ROOT / "benchmarks" / "peers" / "adapters" / f"{peer.module}.py").is_file()
    assert not peer.venv or all("==" in package for package in PACKAGES[peer.venv])
    assert bool(peer.versions) == bool(peer.venv)
    assert set(peer.services) <= set(services.SERVICES)
    assert set(peer.skips) <= set(workloads.ALL)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.is_default])
def test_page_says_what_each_peer_promises(name: str) -> None:
    _, _, section = DOCS.read_text().partition("### What each peer promises")
    table, _, _ = section.partition("\n#")
    assert f"\n| {PEERS[name].title} |" in table


def test_missing_requirements_are_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(services, "_postgres_programs", lambda: None)
    assert install.present(["ppe1", "rq", "dbos", "parallel"], tmp_path) == ["ppe1"]
    packages = "its packages: run `python -m benchmarks.peers install`"
    redis = "the program redis-server (Debian package redis-server)"
    assert capsys.readouterr().out.splitlines() == [
        f"rq is skipped, because this machine lacks {redis} and {packages}.",
        f"dbos is skipped, because this machine lacks PostgreSQL (Debian package postgresql) and {packages}.",
        "parallel is skipped, because this machine lacks the program parallel (Debian package parallel).",
    ]


def test_changed_packages_are_installed_again(tmp_path: Path) -> None:
    marker = tmp_path / "ray" / "packages.txt"
    marker.parent.mkdir()
    marker.write_text("ray==1.0.0\n")
    assert not install.is_complete(tmp_path, "ray")
    marker.write_text("\n".join(PACKAGES["ray"]))
    assert install.is_complete(tmp_path, "ray")
    assert install.is_complete(tmp_path, "")


def ran(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    done = ran("run", "--peers", "ppe1,slurm", "--json", tmp_path / "results.json")
    assert done.returncode == 2
    assert "unknown: slurm; known: batchlab_local," in done.stderr
    done = ran("run", "--peers", "dask", "--venvs", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "None of the peers can run on this machine.\n"


def test_process_pool_runs_and_loses_tasks_after_a_kill(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    words = ("--peers", "ppe1", "--workloads", "W1,W6,W7", "--repeat", "1", "--scale", "0.02", "--attempts", "1")
    done = ran("run", *words, "--patience", "0", "--scratch", tmp_path / "scratch", "--json", results)
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())["runs"]["ppe1"]
    assert found["W1"]["median"]["tasks"] == 200
    assert found["W1"]["median"]["cpu_s"]["total"] > 0
    assert 0 < found["W6"]["median"]["first_s"] <= found["W6"]["median"]["wall_s"]
    lost, kept = (found["W7"]["median"][name] for name in ("lost", "results"))
    assert lost > 0
    assert lost + kept == 10
    assert f"–, {lost:.0f} lost, 0 twice" in done.stdout
    # The files of the measurement are removed.
    assert not list((tmp_path / "scratch").iterdir())


def test_stopped_run_leaves_no_process(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-m", "benchmarks.peers", "run", "--peers", "ppe1", "--workloads", "W3"]
    command += ["--patience", "0", "--scratch", str(scratch), "--json", str(tmp_path / "results.json")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as run:
        until(partial(working_below, scratch), within_s=60.0)
        run.terminate()
        assert run.wait(30) == 143
    # A killed process may need a moment to end.
    until(lambda: not working_below(scratch))


def working_below(folder: Path) -> list[int]:
    """Return the processes that work below `folder`."""
    found = []
    for pid in processes.pids():
        with suppress(OSError):
            if (processes.PROC / str(pid) / "cwd").readlink().is_relative_to(folder):
                found.append(pid)
    return found
