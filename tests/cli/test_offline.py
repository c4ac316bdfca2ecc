"""The command line without a running grid: help, errors, checks, and first files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from batchlab.cli import app, demo, main, output
from batchlab.cli.groups import GUESSES, RENAMED, Group, summary
from batchlab.cli.startup import REQUIRED_MODULES
from batchlab.core import installation
from batchlab.core.errors import JobFileError, Refused
from batchlab.jobs.yaml_source import JobFileErrors
from tests.support.cli import Run

# --- Help ----------------------------------------------------------------------------------------

GROUPS = {
    "job": "submit list show watch cancel cap delete pause resume retry results logs why failures check",
    "grid": "up down status workers activities scale cap drain rebuild-ledger",
    "cost": "estimate bill prices refresh-prices",
    "schedule": "add list show pause resume delete run",
    "report": "html query pull diff",
    "scenario": "list check simulate replay plan record compare calibrate faults",
}
COMMANDS = [
    "demo",
    "init",
    "run",
    "schema",
    "doctor",
    *(f"{group} {name}" for group, names in GROUPS.items() for name in names.split()),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_one_example(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    examples = re.findall(r"Example: (batchlab \S.*)", out)
    assert len(examples) == 1
    assert examples[0].startswith(f"batchlab {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_listing_has_json(run: Run, command: str) -> None:
    silent = {"init", "schema", "job watch", "grid down"}
    _, out, _ = run(*command.split(), "--help")
    assert ("--json" in out) is (command not in silent)


def test_help_names_every_group_and_what_exit_codes_mean(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for word in ("demo", "init", "run", "job", "grid", "scenario", "schema", "doctor"):
        assert re.search(rf"^  {word} ", out, re.MULTILINE)
    for panel in app.PANELS:
        assert re.search(rf"^{panel}:$", out, re.MULTILINE)
    assert not re.search(r"^  (manager|worker|connect) ", out, re.MULTILINE), "services are hidden"
    assert "130 interrupted" in " ".join(out.split())
    assert "..." not in out.partition("Start:")[2], "a summary is cut off"


@pytest.mark.parametrize("path", ["", "job", "report query", "scenario replay", "deploy"])
def test_short_help_option_is_the_long_one(run: Run, path: str) -> None:
    assert run(*path.split(), "-h") == run(*path.split(), "--help")


ROOT: Any = get_command(app.app)


@pytest.mark.parametrize("group", [name for name, one in ROOT.commands.items() if isinstance(one, Group)])
def test_help_of_a_group_has_whole_summaries(run: Run, group: str) -> None:
    commands = ROOT.commands[group].commands
    shown = " ".join(run(group, "--help")[1].split())
    for name, command in commands.items():
        assert command.hidden or f"{name} {summary(command)}" in shown
        assert command.hidden or summary(command).endswith(".")


# --- Old and guessed names -----------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_name_is_answered_with_the_new_name(run: Run, old: str, new: str) -> None:
    code, out, err = run(*old.split())
    assert (code, out) == (2, "")
    assert err.endswith(f"Did you mean 'batchlab {new}'?\n")
    names = [word for word in new.split() if word.islower()]
    assert run(*names, "--help")[0] == 0, "the new name does not exist"


@pytest.mark.parametrize(
    ("guess", "meant"),
    [
        ("job stop", "'batchlab job cancel'"),
        ("job kill", "'batchlab job cancel'"),
        ("job rm", "'batchlab job delete'"),
        ("job remove", "'batchlab job delete'"),
        ("job ls", "'batchlab job list'"),
        ("job ps", "'batchlab job list'"),
        ("job describe", "'batchlab job show'"),
        ("job status", "'batchlab job show'"),
        ("job get", "'batchlab job show'"),
        ("grid start", "'batchlab grid up'"),
        ("grid create", "'batchlab grid up'"),
        ("grid stop", "'batchlab grid down'"),
        ("grid delete", "'batchlab grid down'"),
        ("grid ps", "'batchlab grid workers'"),
        ("schedule remove", "'batchlab schedule delete'"),
        ("schedule rm", "'batchlab schedule delete'"),
        ("schedule ls", "'batchlab schedule list'"),
        ("kill", "'batchlab job cancel' or 'batchlab grid down'"),
        ("submit job.yaml", "'batchlab job submit'"),
        ("job cancle", "'cancel'"),
    ],
)
def test_guessed_name_is_answered_with_the_name_that_exists(run: Run, guess: str, meant: str) -> None:
    code, out, err = run(*guess.split())
    assert (code, out) == (2, "")
    assert err.endswith(f"Did you mean {meant}?\n")


def test_guesses_are_not_commands() -> None:
    """A guess that is a command of every group would never be answered."""
    groups = [group for group in ROOT.commands.values() if isinstance(group, Group)]
    for guess, meanings in GUESSES.items():
        for meaning in meanings:
            assert any(meaning in group.commands and guess not in group.commands for group in groups), (guess, meaning)


def test_version(run: Run) -> None:
    import batchlab

    assert run("--version") == (0, f"batchlab {batchlab.__version__}\n", "")


OF_EXTRAS = frozenset(module for modules in installation.MODULES.values() for module in modules)
HEAVY = frozenset(
    REQUIRED_MODULES - {"typer"} | OF_EXTRAS | {"asyncio", "opentelemetry", "ssl", "http.client", "socket"}
)
"""Modules that a command must not import unless it uses them. The check covers the help and the services of an
instance."""


@pytest.mark.parametrize("arguments", [["--help"], ["worker", "--help"], ["manager", "--help"]])
def test_help_and_services_import_nothing_heavy(arguments: list[str]) -> None:
    """The test compares imported modules, because times depend on the machine."""
    imported = imported_by(*arguments)
    if arguments == ["--help"]:
        ours = {name for name in imported if name.startswith("batchlab.")}
        names = ("cli", "cli.app", "cli.groups", "cli.output", "cli.startup", "core", "core.errors", "core.text")
        assert ours == {f"batchlab.{name}" for name in names}
        assert imported.isdisjoint(HEAVY), imported & HEAVY
    else:
        assert not imported & (HEAVY | {"typer", "click"})


def test_command_imports_no_other_command() -> None:
    imported = imported_by("job", "--help")
    heavy = HEAVY - {"pydantic", "socket", "typing_extensions"}  # typer needs these modules to read parameters
    assert imported.isdisjoint(heavy), imported & heavy
    assert "batchlab.cli.job" in imported
    assert not imported & {f"batchlab.cli.{one}" for one in ("deploy", "scenario", "grid", "admin")}


def test_run_does_not_import_the_simulator() -> None:
    """The simulator takes half a second to import."""
    imported = imported_by("run", "--help")
    assert "batchlab.cli.run" in imported
    assert not [name for name in imported if name.startswith(("batchlab.sim", "sqlalchemy"))]


def test_a_worker_imports_nothing_of_the_manager_and_nothing_of_the_job_file() -> None:
    """A worker must start quickly, and a grid has many workers."""
    code = "import sys, batchlab.server.worker_service; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(told.stdout.split())
    assert "batchlab.worker.loop" in imported
    others = ("batchlab.manager.", "batchlab.server.http", "batchlab.jobs", "batchlab.reports", "pydantic")
    assert not {name for name in imported if name.startswith(others)}


def test_a_manager_serves_its_first_requests_without_the_web_framework() -> None:
    """The import of the web framework takes as long as the rest of a manager's start."""
    modules = "batchlab.server.manager_service, batchlab.server.http_server, batchlab.server.quick_api"
    code = f"import sys, batchlab.manager.manager, batchlab.fleet.fleet_port, {modules}; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(told.stdout.split()).isdisjoint({"fastapi", "starlette", "pydantic", "typer", "batchlab.server.http"})


def imported_by(*arguments: str) -> set[str]:
    """Return the modules that a command line has imported at its end."""
    code = (
        "import sys, batchlab.cli as c\n"
        f"sys.argv = ['batchlab', *{arguments!r}]\n"
        "try: c.main()\n"
        "except SystemExit: print('\\n', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_help_has_of_each_command_its_own_first_line() -> None:
    commands = get_command(app.app).commands  # type: ignore[attr-defined]
    assert list(commands) == list(app.COMMANDS)
    for name, listed in app.COMMANDS.items():
        assert summary(commands[name]) == listed.summary, name


def test_a_package_that_is_missing_is_named_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for module in [name for name in sys.modules if name.startswith("batchlab.jobs")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "argv", ["batchlab", "job", "check", "job.yaml"])
    monkeypatch.setattr("batchlab.cli.output.install_signal_handlers", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "'yaml' is not installed" in told
    assert "Install batchlab again" in told
    assert "Traceback" not in told


def test_required_dependencies_match_the_installation() -> None:
    homes = metadata.packages_distributions()
    asked = {canonicalize_name(Requirement(require).name) for require in metadata.requires("batchlab") or ()
             if "extra ==" not in require}  # fmt: skip
    given = {canonicalize_name(name) for module in REQUIRED_MODULES for name in homes.get(module, ())}
    assert asked == given


# --- Errors ---------------------------------------------------------------------------------------


def test_without_a_grid_the_remedy_is_to_start_one(run: Run, tmp_path: Path) -> None:
    code, out, err = run("job", "list", "--home", tmp_path / "h")
    assert (code, out) == (3, "")
    assert "batchlab grid up" in err
    assert not (tmp_path / "h").exists(), "asking must not make a folder"
    assert "jobs that ran here" not in err
    (tmp_path / "h" / "objects").mkdir(parents=True)
    assert "which knows the jobs that ran here" in run("job", "list", "--home", tmp_path / "h")[2]


def test_wrong_usage_exits_with_two(run: Run) -> None:
    assert run("nonsense")[0] == run("run")[0] == run("job", "show")[0] == 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("submit", "'batchlab job submit'"),
        ("check", "'batchlab job check' or 'batchlab scenario check'"),
        ("rum", "'run'"),
    ],
)
def test_unknown_command_suggests_the_right_one(run: Run, given: str, meant: str) -> None:
    code, _, err = run(given)
    assert code == 2
    assert f"No such command '{given}'. Did you mean {meant}?" in err


def test_a_folder_in_place_of_its_job_file_names_the_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("")
    code, _, err = run("job", "check", tmp_path)
    assert code == 2
    assert f"it is not a file.\n  Did you mean {file}?" in err
    (tmp_path / "other.yaml").write_text("")
    assert "Did you mean" not in run("job", "check", tmp_path)[2]


def test_results_that_find_no_folder_are_refused_before_the_job_runs(run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    demo.write(tmp_path, demo.starter_files())
    for backend in ("local", "sim"):
        where = ("--out", tmp_path / "taken", "--home", tmp_path / "h", "--backend", backend)
        code, _, err = run("run", tmp_path / "job.yaml", *where)
        assert code == 2
        assert f"The results cannot be written to {tmp_path / 'taken'}: " in err
        assert "Starting a grid" not in err


def test_every_mistake_of_a_job_file_has_its_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: x\ninput: {files: nothing-*.csv}\nstages:\n  - name: a\n    pythn: b:c\n")
    code, out, err = run("job", "check", file)
    assert (code, out) == (2, "")
    told = [line for line in err.splitlines() if line.startswith(f"{file}:")]
    assert len(told) >= 2
    assert any(line.startswith(f"{file}:5: ") for line in told)


ITEMS = """\
name: sums
input: {files: data.*, split: items}
stages:
  - {name: add, command: ["true"]}
"""


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("data.json", "[\n  1,\n  2\n]\n", "data.json is one JSON array, and split: items reads JSON Lines"),
        ("data.json", '[{"a": 1},\n {"a": 2}]\n', "data.json is one JSON array"),
        ("data.json", "[1, 2]", "data.json is one JSON array"),
        ("data.jsonl", "\n[1, 2\n", "Line 2 of data.jsonl is not JSON"),
        ("data.jsonl", "[1,\n2]", "data.jsonl is one JSON array"),
        ("data.csv", "a,b\n1,2\n", "Line 1 of data.csv is not JSON"),
        ("data.jsonl", "[1, 2]\n", ""),
        ("data.json", "[1, 2]\n[3]\n", ""),
        ("data.json", "1\n2\n", ""),
        ("data.json", f'{{"a": "{"x" * 100_000}"}}\n', ""),
        ("data.json", f"[{'1, ' * 50_000}2]", "data.json is one JSON array"),
    ],
)
def test_input_that_is_not_json_lines_is_noticed_by_the_check(
    run: Run, tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(ITEMS)
    (tmp_path / name).write_text(text)
    code, out, err = run("job", "check", file)
    assert (code, said in err) == (2 if said else 0, True), err
    if said:
        assert out == ""
        code, _, submitted = run("run", file, "--home", tmp_path / "grid")
        assert (code, submitted) == (2, err), "the submission says the same"


def test_complaints_keep_a_jobs_own_control_characters_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_error(Refused("bad \x1b[31mred\x07\nline", remedy="\x9b2J"))
    err = capsys.readouterr().err
    assert not set(err) & {"\x1b", "\x07", "\x9b"}
    assert err.count("\n") == 2


def test_several_errors_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    first = JobFileError("No name.", file="job.yaml", line=1, remedy="Write one.")
    output.show_error(JobFileErrors([first, JobFileError("No stages.", file="job.yaml")]))
    assert capsys.readouterr().err == ("job.yaml:1: No name.\n  Write one.\njob.yaml: No stages.\n")


# --- Without a grid ------------------------------------------------------------------------------


def test_schema_is_a_json_schema(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert "stages" in json.loads(out)["properties"]


def test_init_writes_a_job_that_passes_its_checks(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "first job"
    code, _, err = run("init", folder)
    assert code == 0
    assert f"batchlab run '{folder}/job.yaml'" in err
    code, out, _ = run("job", "check", folder / "job.yaml", "--json")
    assert code == 0
    assert json.loads(out)["stages"] == ["summarise", "total"]


def test_init_never_replaces_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("mine")
    code, _, err = run("init", tmp_path)
    assert code == 2
    assert "handlers.py already exists" in err
    assert [path.name for path in tmp_path.iterdir()] == ["handlers.py"]
    assert (tmp_path / "handlers.py").read_text() == "mine"


@pytest.mark.parametrize("example", ["claims", "transform", "sort"])
def test_init_of_an_example_includes_its_data(
    run: Run, tmp_path: Path, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_RECORDS_BYTES", 2**16)
    folder = tmp_path / example
    code, _, err = run("init", folder, "--example", example)
    assert code == 0
    assert f"batchlab run {folder}/job.yaml" in err
    assert list((folder / "data").iterdir())
    code, out, err = run("job", "check", folder / "job.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["stages"]
    code, _, err = run("init", folder, "--example", example)
    assert code == 2
    assert "already exists" in err


def test_init_of_the_media_job_makes_a_video(run: Run, tmp_path: Path, ffmpeg: None) -> None:
    assert run("init", tmp_path / "m", "--example", "media")[0] == 0
    assert (tmp_path / "m/data/test.mp4").stat().st_size > 10_000


def test_init_of_what_cannot_run_here_writes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("init", tmp_path / "m", "--example", "media")
    assert code == 2
    assert "ffmpeg" in err
    assert "apt-get install ffmpeg" in err
    code, _, err = run("init", tmp_path / "d", "--example", "clams")
    assert code == 2
    assert "Name one of claims, " in err
    assert list(tmp_path.iterdir()) == []


def test_set_wants_key_and_value(run: Run, tmp_path: Path) -> None:
    run("init", tmp_path)
    code, _, err = run("job", "check", tmp_path / "job.yaml", "--set", "min_cents")
    assert code == 2
    assert "is not KEY=VALUE" in err
    code, out, _ = run("job", "check", tmp_path / "job.yaml", "--set", "min_cents=5", "--json")
    assert json.loads(out)["params"] == {"min_cents": 5}
