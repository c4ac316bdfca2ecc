"""The command line where no grid is up: help, errors, checks, first files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batchlab.cli import output
from batchlab.errors import JobFileError, Refused
from batchlab.spec.problems import JobFileErrors
from tests.unit.cli_rig import Run, runner


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


# --- Help ----------------------------------------------------------------------------------------

GROUPS = {
    "job": "submit list show watch cancel cap pause resume retry results logs why failures check",
    "grid": "up down status workers activities scale cap drain",
    "cost": "estimate bill",
    "prices": "show refresh",
    "ledger": "rebuild",
}
COMMANDS = [
    *("demo", "init", "run", "schema", "doctor"),
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
def test_every_listing_speaks_json(run: Run, command: str) -> None:
    silent = {"init", "schema", "job watch", "grid down"}
    _, out, _ = run(*command.split(), "--help")
    assert ("--json" in out) is (command not in silent)


def test_help_names_every_group_and_what_exit_codes_mean(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for word in ("demo", "init", "run", "job", "grid", "scenario", "ledger", "schema", "doctor"):
        assert re.search(rf"^  {word} ", out, re.MULTILINE)
    assert "130 interrupted" in " ".join(out.split())
    assert "..." not in out.partition("Commands:")[2], "a summary is cut off"


def test_version(run: Run) -> None:
    import batchlab

    assert run("--version") == (0, f"batchlab {batchlab.__version__}\n", "")


def test_help_and_services_import_nothing_heavy() -> None:
    """What a command pays for at its start; milliseconds would depend on the machine."""
    heavy = "rich|httpx|pydantic|fastapi|sqlalchemy|obstore|uvicorn|yaml|asyncio"
    for arguments in (["--help"], ["worker", "--help"], ["manager", "--help"]):
        code = (
            "import sys, batchlab.cli as c\n"
            f"sys.argv = ['batchlab', *{arguments!r}]\n"
            "try: c.main()\n"
            f"except SystemExit: print(sorted(sys.modules.keys() & set('{heavy}'.split('|'))))\n"
            "if sys.argv[1] != '--help': print(sorted(sys.modules.keys() & {'typer', 'click'}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        printed = done.stdout.splitlines()
        assert done.returncode == 0
        assert set(printed[-(1 if arguments == ["--help"] else 2) :]) == {"[]"}


# --- Errors ---------------------------------------------------------------------------------------


def test_without_a_grid_the_remedy_is_to_start_one(run: Run, tmp_path: Path) -> None:
    code, out, err = run("job", "list", "--home", tmp_path / "h")
    assert (code, out) == (3, "")
    assert "batchlab grid up" in err
    assert not (tmp_path / "h").exists(), "asking must not make a folder"


def test_wrong_usage_exits_with_two(run: Run) -> None:
    assert run("nonsense")[0] == run("run")[0] == run("job", "show")[0] == 2


def test_every_mistake_of_a_job_file_is_told_with_its_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "name: x\ninput: {files: nothing-*.csv}\nstages:\n  - name: a\n    pythn: b:c\n"
    )
    code, out, err = run("job", "check", file)
    assert (code, out) == (2, "")
    told = [line for line in err.splitlines() if line.startswith(f"{file}:")]
    assert len(told) >= 2
    assert any(line.startswith(f"{file}:5: ") for line in told)


def test_complaints_keep_a_jobs_own_control_characters_off_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.complain(Refused("bad \x1b[31mred\x07\nline", remedy="\x9b2J"))
    err = capsys.readouterr().err
    assert not set(err) & {"\x1b", "\x07", "\x9b"}
    assert err.count("\n") == 2


def test_several_errors_are_told_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    first = JobFileError("No name.", file="job.yaml", line=1, remedy="Write one.")
    output.complain(JobFileErrors([first, JobFileError("No stages.", file="job.yaml")]))
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
    assert "handlers.py is there already" in err
    assert [path.name for path in tmp_path.iterdir()] == ["handlers.py"]
    assert (tmp_path / "handlers.py").read_text() == "mine"


def test_init_of_an_example_comes_without_its_data(run: Run, tmp_path: Path) -> None:
    assert run("init", tmp_path / "c", "--example", "claims")[0] == 0
    assert {"job.yaml", "parse.py"} <= {path.name for path in (tmp_path / "c").iterdir()}
    assert not (tmp_path / "c/data").exists()
    code, _, err = run("init", tmp_path / "d", "--example", "clams")
    assert code == 2
    assert "There are claims, " in err


def test_set_wants_key_and_value(run: Run, tmp_path: Path) -> None:
    run("init", tmp_path)
    code, _, err = run("job", "check", tmp_path / "job.yaml", "--set", "min_cents")
    assert code == 2
    assert "is not KEY=VALUE" in err
    code, out, _ = run("job", "check", tmp_path / "job.yaml", "--set", "min_cents=5", "--json")
    assert json.loads(out)["params"] == {"min_cents": 5}
