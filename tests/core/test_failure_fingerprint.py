"""The fingerprints of failures, which group failures by their cause."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchlab.core.model import Failure, FailureKind
from batchlab.core.protocol.settlement import LENGTH, fingerprint, shape
from batchlab.worker.handlers import user_traceback


def raised(item: object, *, folder: str = "", kind: str = "first") -> Failure:
    """Return the failure of a job's handler, as a worker reports it."""
    source = (
        "import json\n"
        "def act(item):\n"
        "    check(item)\n"
        "    json.loads(item)\n"
        "def check(item):\n"
        "    if item == 'x':\n"
        "        raise ValueError(f'{item} is bad')\n"
        "    if item == 'y':\n"
        "        raise ValueError(f'{item} is bad')\n"
    )
    space: dict[str, object] = {}
    exec(compile(source, f"{folder}handlers.py", "exec"), space)
    try:
        space["act"](item)  # type: ignore[operator]
    except ValueError as error:
        text = user_traceback(error).replace(folder, "") if folder else user_traceback(error)
        return Failure(7, FailureKind.EXCEPTION, str(error), type(error).__name__, text)
    raise AssertionError("it did not fail")


def test_fingerprint_is_short_and_stable() -> None:
    one = raised("x")
    assert fingerprint(one) == fingerprint(raised("x"))
    assert len(fingerprint(one)) == LENGTH
    assert set(fingerprint(one)) <= set("0123456789abcdef")


def test_the_task_the_message_and_the_time_do_not_matter() -> None:
    one = raised("x")
    other = replace(one, task=99, reason="ValueError: z is bad", run_s=3.0, final=False)
    assert fingerprint(one) == fingerprint(other)


def test_other_line_or_exception_gives_another_fingerprint() -> None:
    prints = {
        fingerprint(raised("x")),
        fingerprint(raised("y")),
        fingerprint(raised("{")),
        fingerprint(replace(raised("x"), error="KeyError")),
        fingerprint(replace(raised("x"), kind=FailureKind.IMPORT)),
    }
    assert len(prints) == 5


def test_code_folder_and_python_version_do_not_change_the_fingerprint() -> None:
    one = raised("{", folder="/srv/scratch/i-1/code/3f/")
    assert fingerprint(one) == fingerprint(raised("{"))
    # The lines in json's tracebacks differ between Python versions, but the user's lines do not.
    frame = '  File "handlers.py", line 3, in act\n'
    inner = frame + '  File "handlers.py", line 3, in <listcomp>\n'
    whole = one.traceback.replace("Traceback (most recent call last):\n", f"{inner}", 1)
    plain = one.traceback.replace("Traceback (most recent call last):\n", f"{frame}", 1)
    assert fingerprint(replace(one, traceback=whole)) == fingerprint(replace(one, traceback=plain))
    moved = one.traceback.replace("/json/", "/newer/json/").replace("line 35", "line 41")
    assert fingerprint(replace(one, traceback=moved)) == fingerprint(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("exit code 3: cat: /a/b/in/0/x.csv: No such file", "exit code 3: cat: /c/y.csv: No such file"),
        ("ran longer than its timeout of 0.5 s", "ran longer than its timeout of 60 s"),
        ("KeyError: 'a'", "KeyError: 'b c'"),
        ("claim CLM-0041 has no total", "claim CLM-99 has no total"),
    ],
)
def test_sentences_are_compared_without_numbers_names_and_paths(one: str, other: str) -> None:
    assert shape(one) == shape(other)
    failure = Failure(0, FailureKind.EXIT, one, exit_code=3)
    assert fingerprint(failure) == fingerprint(replace(failure, reason=other))
    assert fingerprint(failure) != fingerprint(replace(failure, exit_code=4))
    assert fingerprint(failure) != fingerprint(replace(failure, reason="something else"))
