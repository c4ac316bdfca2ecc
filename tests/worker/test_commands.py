"""Stages that run a program: arguments, files, and failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from batchlab.core.model import FailureKind, Json
from batchlab.core.protocol import values
from tests.support.processes import is_running
from tests.support.worker.runner import Rig, go, opened, until

SHOW = (sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))")


async def put(rig: Rig, key: str, content: str) -> Json:
    await rig.objects.put(key, content.encode())
    return values.file_ref(key, key.rpartition("/")[2], len(content))


async def stored(rig: Rig, ref: Json) -> str:
    return (await rig.objects.get(ref["$file"])).decode()


def test_a_command_reads_its_input_and_its_only_output_is_its_value(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            files = [await put(rig, f"raw/j/{n}.txt", f"{n} words here\n") for n in range(3)]
            got = await rig.values(files, command=("cp", "{input}", "{output:copies/out.txt}"))
            assert [await stored(rig, ref) for ref in got] == [f"{n} words here\n" for n in range(3)]
            assert got[0]["name"] == "copies/out.txt"
            counted = await rig.values(files, command=("wc", "-w", "{input}"), stdout="n.txt")
            assert [(await stored(rig, ref)).split()[0] for ref in counted] == ["3"] * 3
            assert rig.handle.log == ""

    go(main())


def test_program_and_its_input_are_measured(tmp_path: Path) -> None:
    """The figures of a program include its own CPU time and memory. A failed program also has its input's name."""
    code = (
        "import pathlib, sys, time\n"
        "data = pathlib.Path(sys.argv[1]).read_text()\n"
        "memory = b'x' * (80 * 1024**2)\n"
        "while time.process_time() < 0.1: pass\n"
        "pathlib.Path(sys.argv[2]).write_text(data * 10)\n"
        "sys.exit(data == 'bad')\n"
    )

    async def main() -> None:
        async with opened(tmp_path) as rig:
            files = [await put(rig, f"raw/j/{name}.txt", name) for name in ("good", "bad")]
            command = (sys.executable, "-c", code, "{input}", "{output:out.txt}")
            good, bad = await rig.run(files, command=command)
            assert bad.failure
            first, second = good.metrics, bad.metrics
            assert first
            assert second
            for metrics in (first, second):
                assert 0.1 <= (metrics.cpu_s or 0) < 2
                assert (metrics.memory_bytes or 0) > 80 * 1024**2
            assert (first.input, first.input_bytes) == ("good.txt", 4)
            assert (first.output_bytes or 0) > 40
            assert (second.input, second.input_bytes, second.output_bytes) == ("bad.txt", 3, None)

    go(main())


def test_placeholders_become_arguments_without_a_shell(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            params = {"text": "a b; $(rm -rf /) 'q' {task}", "number": 1.5, "list": [1], "no": None}
            ran = await rig.run(
                [7],
                first=4,
                params=params,
                command=(
                    *SHOW,
                    "{params.text}",
                    "n={params.number}",
                    "{params.list}",
                    "{params.no}",
                    "{task}",
                    "{{literal}}",
                    "*",
                    "$HOME",
                    "{scratch}",
                    "{code}/x",
                ),
                stdout="argv.json",
            )
            text, number, one, no, task, *rest = json.loads(await stored(rig, ran[0].value))
            assert (text, number, one, no) == (params["text"], "n=1.5", "[1]", "null")
            assert (task, rest[:3]) == ("4", ["{literal}", "*", "$HOME"])
            assert rest[3].endswith("/4/scratch")
            assert rest[4].startswith(str(rig.scratch.root / "code"))

    go(main())


def test_a_json_item_is_written_to_a_file_with_its_files_as_paths(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            file = await put(rig, "raw/j/a.txt", "A")
            item = {"n": 1, "files": [file]}
            [ref] = await rig.values([item], command=("cat", "{input}"), stdout="out")
            read = json.loads(await stored(rig, ref))
            assert read["n"] == 1
            assert read["files"][0].endswith("a.txt")

    go(main())


def test_the_results_of_a_gather_become_arguments_or_a_list_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            a, b, c = [await put(rig, f"raw/j/{name}", name) for name in "abc"]
            item = [a, {"k": 1}, [b, c]]
            command = ("cat", "{inputs}")
            [ref] = await rig.values([item], command=command, stdout="out")
            assert await stored(rig, ref) == 'a{"k": 1}bc'
            listed = ("cp", "{inputs_list}", "{output:list.txt}")
            [ref] = await rig.values([item], command=listed)
            paths = (await stored(rig, ref)).splitlines()
            assert [Path(path).name for path in paths] == ["a", "2.json", "b", "c"]
            [ref] = await rig.values([a], command=("cat", "{inputs}"), stdout="out")
            assert await stored(rig, ref) == "a"

    go(main())


def test_several_outputs_are_a_dict_and_none_is_null(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            script = "echo out; echo a > $0; mkdir -p $1/sub; echo 2 > $1/2; echo 1 > $1/sub/1"
            command = ("sh", "-c", script, "{output:a.txt}", "{output:pieces/}")
            [got] = await rig.values([0], command=command, stdout="log.txt")
            assert list(got) == ["a.txt", "pieces/", "log.txt"]
            assert [one["name"] for one in got["pieces/"]] == ["pieces/2", "pieces/sub/1"]
            assert await stored(rig, got["log.txt"]) == "out\n"
            assert await rig.values([0], command=("true",)) == [None]

    go(main())


def test_a_command_runs_in_its_tasks_scratch_folder(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            command = ("sh", "-c", "pwd; ls; touch left-behind")
            refs = await rig.values([0, 1], command=command, stdout="out")
            assert [(await stored(rig, ref)).endswith(f"/{n}/scratch\n") for n, ref in enumerate(refs)]

    go(main())


def test_programs_and_modules_of_the_code_folder_are_found(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "greet").write_text("#!/bin/sh\necho hello $1\n")
        (folder / "greet").chmod(0o755)
        (folder / "mod.py").write_text("print('module')")
        async with opened(tmp_path) as rig:
            [ref] = await rig.values([0], command=("greet", "{task}"), stdout="out", folder=folder)
            assert await stored(rig, ref) == "hello 0\n"
            module = (sys.executable, "-m", "mod")
            [ref] = await rig.values([0], command=module, stdout="out", folder=folder)
            assert await stored(rig, ref) == "module\n"

    go(main())


# --- Failures ------------------------------------------------------------------------------------


def test_an_exit_code_is_a_failure_with_the_last_line_of_stderr(tmp_path: Path) -> None:
    """An exit code must reach the retry rules, even if a signal ended the program."""

    async def main() -> None:
        async with opened(tmp_path) as rig:
            script = "echo to the log; echo first >&2; echo 'disk is full' >&2; echo >&2; exit 3"
            failure = await rig.failure(0, command=("sh", "-c", script))
            assert (failure.kind, failure.exit_code) == (FailureKind.EXIT, 3)
            assert failure.reason == "exit code 3: disk is full"
            assert await rig.log(0) == "to the log\nfirst\ndisk is full\n\n"
            failure = await rig.failure(0, command=("sh", "-c", "kill -9 $$"))
            assert (failure.kind, failure.exit_code) == (FailureKind.EXIT, -9)
            assert failure.reason == "exit code -9 (SIGKILL)"
            failure = await rig.failure(0, command=("false",))
            assert failure.reason == "exit code 1"

    go(main())


@pytest.mark.parametrize(
    ("command", "kind", "says"),
    [
        (("no-such-program",), "import", "program 'no-such-program' is not installed on the worker"),
        (("/no/such/program",), "import", "is not installed on the worker"),
        (("/etc/passwd",), "import", "cannot run: Permission denied"),
        (("true", "{output:a}"), "result", "The command did not write its output 'a'."),
        (("true", "{inptu}"), "import", "There is no placeholder {inptu}"),
        (("true", "{params.gone}"), "import", "{params.gone}"),
    ],
    ids=str,
)
def test_impossible_command_gives_its_reason(tmp_path: Path, command: tuple[str, ...], kind: str, says: str) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            failure = await rig.failure(0, command=command)
            assert failure.kind == kind
            assert says in failure.reason

    go(main())


def test_more_arguments_than_the_system_takes_are_explained(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            params = {"long": "x" * 300_000}
            failure = await rig.failure(0, command=("true", "{params.long}"), params=params)
            assert failure.kind is FailureKind.IMPORT
            assert "are too long for the system" in failure.reason

    go(main())


def test_a_commands_whole_family_ends_at_its_timeout(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "pids"
        async with opened(tmp_path) as rig:
            script = f"sleep 60 & setsid sleep 60 & echo $! $$ > {mark}; wait"
            got = await rig.values([0], command=("sh", "-c", script), timeout_s=0.4)
            assert got == ["timeout: ran longer than its timeout of 0.4 s"]
            pids = [int(pid) for pid in mark.read_text().split()]
            await until(lambda: not any(map(is_running, pids)), "the family's end")

    go(main())


def test_program_with_a_surviving_child_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            script = "echo started >&2; sleep 60 & exit 0"
            got = await rig.values([0, 1], command=("sh", "-c", script), timeout_s=10.0)
            assert got == [None, None]
            assert await rig.log(1) == "started\n"

    go(main())


def test_a_commands_memory_counts(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            code = "import time; x = b'x' * (300 << 20); time.sleep(30)"
            got = await rig.values([0], command=(sys.executable, "-c", code), memory_bytes=150 * 2**20)
            assert got == ["memory: used more than its memory limit of 150 MiB"]

    go(main())
