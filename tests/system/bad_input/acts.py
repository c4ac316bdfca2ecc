"""The misbehavior of tasks, from raising an exception to ending the process, one row per kind.

All tasks run in one job on one grid, next to tasks that behave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Act:
    """A kind of misbehavior. `name` is a function of user_code/misbehave.py. The task fails with `kind`, and its reason
    contains `says`. If `kind` is "", the task succeeds with the result `value`."""

    name: str
    kind: str = ""
    says: str = ""
    value: Any = None


EXCEPTIONS = [
    Act("raises", "exception", "ValueError: a bad value"),
    Act("raises_a_novel", "exception", "misbehave.WordyError: begin word"),
    Act("raises_lines", "exception", r"one two \x1b[31mthree\x07\x00"),
    Act("raises_unencodable", "exception", r"misbehave.WordyError: \udcff\ud800"),
    Act("raises_a_group", "exception", "ExceptionGroup: several (2 sub-exceptions)"),
    Act("raises_what_cannot_be_pickled", "exception", "misbehave.StuckError: ('stuck', "),
    Act("raises_unprintable", "exception", "misbehave.OddError"),
    Act("raises_base", "exception", "BaseException: base"),
    Act("raises_interrupt", "exception", "KeyboardInterrupt"),
    Act("recurses", "exception", "RecursionError: maximum recursion depth exceeded"),
    Act("imports_what_is_missing", "exception", "No module named 'a_module_that_is_not_there'"),
    Act("imports_what_is_broken", "exception", "SyntaxError: invalid syntax (broken_syntax.py"),
    Act("needs_a_variable", "exception", "KeyError: 'A_VARIABLE_THAT_IS_NOT_SET'"),
    Act("writes_to_a_full_disk", "exception", "No space left on device"),
    Act("runs_out_of_memory", "exception", "MemoryError"),
    Act("exits_3", "exit", "called sys.exit(3)"),
    Act("exits_with_words", "exit", "called sys.exit('no disk')"),
]

RESULTS = [
    Act("returns_an_object", "result", "result is of type object"),
    Act("returns_a_set", "result", "result['deep'][0] is of type set"),
    Act("returns_bytes", "result", "use a File for other data"),
    Act("returns_a_generator", "result", "result is of type generator"),
    Act("returns_nan", "result", "result['mean'] is the number nan, which JSON does not have"),
    Act("returns_a_huge_int", "result", "an integer of 16610 bits, too long to be written"),
    Act("returns_half_a_character", "result", r"text that UTF-8 cannot represent: '\ud83d'"),
    Act("returns_itself", "result", "or contains itself"),
    Act("returns_a_tower", "result", "nested deeper than 200 levels"),
    Act("returns_a_liar", "exception", "RuntimeError: no items today"),
    Act("returns_a_missing_file", "result", "the file /nowhere/at/all, which does not exist"),
    Act("returns_a_folder", "result", "which is not a regular file"),
    Act("returns_a_pipe", "result", "which is not a regular file"),
    Act("returns_an_unsafe_name", "result", "'../../x', but a name must not have"),
    Act("saves_outside", "exception", "cannot save '../../unsafe': the name must not have"),
    Act("saves_with_a_newline", "exception", r"cannot save 'a\nb': the name must be printable"),
    Act("saves_twice", "exception", "this task has saved that name before"),
    Act("returns_none"),
    Act("returns_odd_but_right", value=[True, -0.0, "", "\0\u2028☃", {"$file": 1, "": {}}, [1, [2]], 10**10]),
    Act("returns_5_mb", value="x" * 5_000_000),
]

PROCESSES = [
    Act("segfaults", "crash", "killed its process: exit -11 (SIGSEGV)"),
    Act("ends_its_process", "crash", "killed its process: exit 0"),
    Act("kills_itself", "crash", "exit -9 (SIGKILL) 3 times; the machine may have run out of mem"),
    Act("becomes_another_program", "crash", "killed its process: exit 5"),
    Act("stops_itself", "timeout", "ran longer than its timeout of 2 s"),
    Act("loops", "timeout", "ran longer than its timeout of 2 s"),
    Act("loops_in_c", "timeout", "ran longer than its timeout of 2 s"),
    Act("swallows_everything", "timeout", "ran longer than its timeout of 2 s"),
    Act("closes_everything", "crash", "closed the file descriptors of its process"),
    Act("writes_everywhere", "crash", "wrote into its process's pipe"),
    Act("closes_its_streams", value="closed"),
    Act("prints_binary", value="printed"),
    Act("prints_without_end", value="printed"),
    Act("forks", value="parent"),
    Act("forks_and_raises", value="parent"),
    Act("leaves_a_raising_thread", value="left"),
    Act("leaves_a_program", value="left"),
    Act("changes_folder", value="changed"),
    Act("deletes_its_folder", value="deleted"),
    Act("deletes_its_scratch", value="deleted"),
    Act("deletes_the_whole_execution", value="deleted"),
    Act("changes_the_umask", value="changed"),
    Act("tells_the_umask", value="0"),
    Act("sets_an_alarm", value="set"),
    Act("dozes", value="awake"),
    Act("forbids_recursion", value="forbidden"),
]

ACTS = [*EXCEPTIONS, *RESULTS, *PROCESSES]

ITEMS: list[str | int] = [one for i, act in enumerate(ACTS) for one in (act.name, i)]
"""Every act, each followed by a neighbor task that returns its number."""

JOB = """\
name: acts
input: {files: items.jsonl, split: items}
stages:
  - name: act
    python: misbehave:act
    timeout: 2s
    retry: 1
"""
