"""Logs with the same fields in both formats, the id of the task, and no secrets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import copy_context

import pytest

from batchlab.core import logs
from batchlab.core.errors import UsageError

log = logging.getLogger("batchlab.test")
Written = Callable[[], str]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """Return a function that returns the log of a process that calls `set_up`."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logs, "_hidden", [])
    yield lambda: capsys.readouterr().err
    logging.captureWarnings(capture=False)
    root.handlers[:] = before
    root.setLevel(level)
    logs._process.clear()


def begin(**process: str) -> None:
    """Set up logging as a process of batchlab does, without other handlers."""
    logging.getLogger().handlers[:] = []
    logs.set_up(**process)


def lines(written: Written) -> list[dict[str, object]]:
    return [json.loads(line) for line in written().splitlines()]


def test_default_format_is_text(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.FORMAT_VARIABLE, raising=False)
    begin(service="worker", instance="i-1")

    def bundle() -> None:
        logs.add_fields(job="sums-1", stage="map")
        log.warning("the bundle %s", "waits\nINFO batchlab: a line that is none")

    copy_context().run(bundle)
    log.debug("not shown")
    line = written()
    assert line.endswith(" [job=sums-1 stage=map]\n")
    assert line.count("\n") == 1
    assert "i-1" not in line, "the file is the instance's"


def test_json_has_the_fields_of_process_task_and_line(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    begin(service="worker")
    logs.add_process_fields(worker="w-1", instance="i-1")

    async def bundle(name: str) -> None:
        logs.add_fields(job="sums-1", bundle=name)
        await asyncio.sleep(0)
        await asyncio.to_thread(log.info, "it runs", extra={"task": 3})

    async def both() -> None:
        await asyncio.gather(bundle("a"), bundle("b"))
        log.info("of no job")

    asyncio.run(both())
    first, second, third = lines(written)
    assert {first["bundle"], second["bundle"]} == {"a", "b"}
    for line in (first, second):
        del line["time"], line["bundle"]
        assert line == {
            "level": "INFO",
            "logger": "batchlab.test",
            "message": "it runs",
            "service": "worker",
            "worker": "w-1",
            "instance": "i-1",
            "job": "sums-1",
            "task": 3,
        }
    assert "job" not in third


@pytest.mark.parametrize("format_", logs.FORMATS)
def test_nothing_in_a_line_moves_a_terminal(written: Written, monkeypatch: pytest.MonkeyPatch, format_: str) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, format_)
    begin(service="worker")
    try:
        raise ValueError("\x1b]0;title\x07 \x9b2J")
    except ValueError:
        log.exception("it says \x1b[2J\rINFO \u202eelif")
    text = written()
    assert all(c.isprintable() or c == "\n" for c in text), text
    assert "2J" in text
    assert "title" in text


def test_an_exception_is_one_line_of_json(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    begin()
    try:
        raise ValueError("no such\ncolumn")
    except ValueError:
        log.exception("it met a bug")
    (line,) = lines(written)
    assert str(line["exception"]).startswith("Traceback")


def test_exit_reason_of_a_process_is_logged(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    monkeypatch.setenv("MY_TOKEN", "of-mine-alone")
    begin(service="manager")
    error = ValueError("with of-mine-alone in it")
    sys.excepthook(ValueError, error, None)
    text = written()
    assert json.loads(text)["level"] == "CRITICAL"
    assert logs.text_of(text) == "ended by ValueError: with [hidden] in it"


def test_library_use_keeps_the_hosts_logging(written: Written) -> None:
    handler = logging.NullHandler()
    logging.getLogger().handlers[:] = [handler]
    logs.set_up(service="asg")
    assert logging.getLogger().handlers == [handler]


@pytest.mark.parametrize("format_", logs.FORMATS)
def test_no_secret_leaves(written: Written, monkeypatch: pytest.MonkeyPatch, format_: str) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, format_)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", 'wJalr"XUt\\nFEMI')
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=0123456789")
    monkeypatch.setenv("SHORT_TOKEN", "test")
    begin()
    logs.hide("correct horse", "correct horse battery")
    try:
        raise RuntimeError(f"with {os.environ['AWS_SECRET_ACCESS_KEY']} in it")
    except RuntimeError:
        log.exception("sent correct horse battery and %s", "api-key=0123456789", extra={"job": "correct horse"})
    log.info("a test is none")
    told = written()
    for secret in ("wJalr", "FEMI", "0123456789", "correct horse", "battery"):
        assert secret not in told
    assert "a test is none" in told


@pytest.mark.parametrize(("name", "value"), [(logs.FORMAT_VARIABLE, "xml"), (logs.LEVEL_VARIABLE, "LOUD")])
def test_invalid_setting_is_a_clear_error(
    written: Written, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name} is '{value}'"):
        begin()


def test_the_last_words_are_read_in_either_format(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    for format_ in logs.FORMATS:
        monkeypatch.setenv(logs.FORMAT_VARIABLE, format_)
        logs.print_last_line("The port is taken. Name another.")
    text, json_line = written().splitlines()
    assert json.loads(json_line)["level"] == "ERROR"
    assert logs.text_of(text) == logs.text_of(json_line) == "The port is taken. Name another."
    assert logs.text_of("17") == "17"


def test_last_problem_is_remembered_for_a_bounded_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    recent = logs.Recent()
    monkeypatch.setattr(logs, "MAX_JOBS", 2)
    log.addHandler(recent)
    try:
        for job in ("a", "b", "a", "c"):
            log.warning("%s waits", job, extra={"job": job})
        log.info("c goes on", extra={"job": "c"})
        log.error("of none")
    finally:
        log.removeHandler(recent)
    assert recent.last("b") is None, "heard of longest ago"
    assert [found[1] for job in "ac" if (found := recent.last(job))] == ["a waits", "c waits"]
