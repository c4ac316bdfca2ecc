"""Traces: without tracing, messages do not contain trace data; with tracing, a job is traced completely or not at
all."""

from __future__ import annotations

import asyncio
import builtins
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from batchlab.client.http import Client
from batchlab.core import tracing
from batchlab.core.commit import address
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Ran, StageName, TaskSet
from batchlab.core.protocol import json_format
from batchlab.core.protocol.messages import Events, events_message, read_events_message, read_task_message
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.tracing import NO_TRACER, Subject
from batchlab.runtime import factory
from batchlab.worker import commit_and_forward
from tests.support.trace_receiver import Receiver, named

MAP = StageName("map")
JOB = JobDef(JobId("sums-1"), "sums", (StageDef(MAP, handler="m:f"),), 1.0)
BUNDLE = Bundle(JOB.id, MAP, TaskSet.span(0, 3))
ABOVE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = ABOVE[:-2] + "00"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Remove the trace settings of the test run from the environment."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    level = logging.getLogger("opentelemetry").level
    yield monkeypatch
    logging.getLogger("opentelemetry").setLevel(level)


def opened(receiver_url: str, monkeypatch: pytest.MonkeyPatch) -> tracing.Tracer:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver_url)
    return factory.load("local").open_tracer("manager", "manager-1")


# --- Off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "sent"), [(ABOVE, ABOVE), ("x\r\nHost: evil", None), ("", None)])
def test_a_command_sends_the_trace_that_it_is_called_in(
    environment: pytest.MonkeyPatch, given: str, sent: str | None
) -> None:
    environment.setenv("TRACEPARENT", given)
    assert Client("http://127.0.0.1:9", "token")._headers.get("traceparent") == sent


def test_nothing_is_sent_without_tracing() -> None:
    assert factory.load("local").open_tracer("worker", "w-1") is NO_TRACER
    assert NO_TRACER.root("submit", Subject(JOB.id), parent=ABOVE).context == ""
    assert "trace" not in json_format.job_to_json(JOB)
    body = address(JOB, BUNDLE, UNSEALED, now_s=1.0).message.body
    assert "tp" not in json_format.loads(body)
    assert "tp" not in json_format.loads(events_message(Events()))


def test_process_without_tracing_forwards_the_context() -> None:
    with tracing.span(NO_TRACER, "run", ABOVE, BUNDLE) as span:
        span.note(failed=1)
    assert span.context == ABOVE
    assert NO_TRACER.record("fold", ABOVE, BUNDLE, start_s=1.0, end_s=2.0) == ABOVE


def test_the_context_travels_in_job_message_and_event() -> None:
    job = json_format.job_from_json({**json_format.job_to_json(JOB), "trace": ABOVE})
    assert job.trace == ABOVE
    assert json_format.job_from_json(json_format.job_to_json(job)) == job
    sent = read_task_message(address(job, BUNDLE, UNSEALED, now_s=1.0).message.body)
    assert sent.trace == ABOVE, "unless somebody nearer sends it"
    other = ABOVE.replace("b7", "c8")
    sent = read_task_message(address(job, BUNDLE, UNSEALED, now_s=1.0, trace=other).message.body)
    assert sent.trace == other
    events = Events(traces=((JOB.id, MAP, BUNDLE.id, ABOVE),))
    assert read_events_message(events_message(events)) == events


@pytest.mark.parametrize(
    "text", ["", "nonsense", ABOVE[:-1], ABOVE + "-x", ABOVE.upper(), f"00-{'0' * 32}-{'1' * 16}-01"]
)
def test_invalid_context_is_ignored(text: str) -> None:
    assert not tracing.is_context(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
)
def test_otel_variables_disable_tracing(
    environment: pytest.MonkeyPatch, name: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv(name, value)
    assert opened("http://127.0.0.1:9", environment) is NO_TRACER
    assert ("only http/protobuf" in caplog.text) == (value == "grpc")


def test_a_missing_extra_is_one_sentence(environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = builtins.__import__

    def no_otel(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    environment.delitem(sys.modules, "batchlab.adapters.opentelemetry", raising=False)
    environment.setattr(builtins, "__import__", no_otel)
    assert opened("http://127.0.0.1:9", environment) is NO_TRACER
    (record,) = caplog.records
    assert "batchlab's extra `otel` is not installed" in record.getMessage()
    assert re.search(r" install .*\[otel\].*` brings it\.", record.getMessage())


def test_a_worker_that_does_not_trace_imports_nothing_of_it() -> None:
    code = (
        "import sys, batchlab.worker.loop, batchlab.manager.manager;"
        "import batchlab.server.manager_service, batchlab.server.worker_service;"
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'prometheus'))])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


# --- On ------------------------------------------------------------------------------------------


def test_a_tree_reaches_the_receiver(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with Receiver() as receiver:
        tracer = opened(receiver.url, environment)
        with tracing.ending(tracer.root("submit", Subject(JOB.id), parent="nonsense")) as root:
            pass
        with (
            pytest.raises(ValueError, match="no"),
            tracing.span(tracer, "cut", root.context, Subject(JOB.id, "map"), bundles=2),
        ):
            raise ValueError("no")
        at = tracer.record("fold", root.context, BUNDLE, start_s=10.0, end_s=11.5, error="late")
        with tracing.span(tracer, "gather", root.context, Subject(JOB.id), links=[at, "bad"]):
            pass
        asyncio.run(tracer.close())
        spans = receiver.spans()
    (submit,), (cut,), (fold,), (gather,) = (named(spans, name) for name in ("submit", "cut", "fold", "gather"))
    assert (submit.parent, cut.parent, fold.parent) == ("", submit.id, submit.id)
    assert (submit.service, submit.process) == ("batchlab-manager", "manager-1")
    assert (cut.error, cut.attributes["batchlab.stage"]) == ("ValueError", "map")
    assert (fold.start_ns, fold.end_ns, fold.error) == (10_000_000_000, 11_500_000_000, "late")
    assert fold.attributes["batchlab.task.last"] == 2
    assert gather.links == (fold.id,)


@pytest.mark.parametrize(
    ("sampler", "argument", "parent", "is_traced"),
    [
        ("parentbased_always_on", "", "", True),
        ("parentbased_always_on", "", ABOVE, True),
        ("parentbased_always_on", "", UNSAMPLED, False),
        ("parentbased_traceidratio", "0", "", False),
        ("parentbased_traceidratio", "0", ABOVE, True),
    ],
)
def test_sampling_is_by_job(
    environment: pytest.MonkeyPatch, sampler: str, argument: str, parent: str, is_traced: bool
) -> None:
    environment.setenv("OTEL_TRACES_SAMPLER", sampler)
    environment.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    with Receiver() as receiver:
        tracer = opened(receiver.url, environment)
        with tracing.ending(tracer.root("submit", Subject(JOB.id), parent=parent)) as root:
            pass
        with tracing.span(tracer, "plan", root.context, Subject(JOB.id)):
            pass
        asyncio.run(tracer.close())
        names = [span.name for span in receiver.spans()]
    assert bool(root.context) == is_traced
    assert names == (["submit", "plan"] if is_traced else [])


def test_unreachable_collector_delays_no_call(environment: pytest.MonkeyPatch) -> None:
    environment.setattr("batchlab.adapters.opentelemetry.CLOSE_S", 0.2)
    environment.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")
    tracer = opened("http://127.0.0.1:9", environment)
    begun_s = time.monotonic()
    root = tracer.root("submit", Subject(JOB.id))
    root.end()
    asyncio.run(tracer.close())
    assert time.monotonic() - begun_s < 5
    # The exporter's thread runs for another second and uses random numbers, which could disturb another test.
    for thread in threading.enumerate():
        if thread.name == "last spans":
            thread.join(30)
            assert not thread.is_alive()


# --- Tasks ---------------------------------------------------------------------------------------


def test_a_bundle_has_so_many_spans_however_many_tasks(environment: pytest.MonkeyPatch) -> None:
    bundle = Bundle(JOB.id, MAP, TaskSet.span(0, 1000))
    bad = Failure(7, FailureKind.TIMEOUT, "it took too long")
    ended = [
        (Ran(task, 0.5 if task == 500 else 0.001, failure=bad if task == 7 else None), 20.0 + task)
        for task in bundle.tasks
    ]
    with Receiver() as receiver:
        tracer = opened(receiver.url, environment)
        running = tracer.begin("run", ABOVE, bundle, start_s=20.0)
        commit_and_forward.record_task_spans(tracer, running, bundle, ended, 20.0)
        running.end()
        asyncio.run(tracer.close())
        spans = receiver.spans()
    (run,) = named(spans, "run")
    assert (run.attributes["batchlab.succeeded"], run.attributes["batchlab.failed"]) == (999, 1)
    assert run.attributes["batchlab.longest_s"] == 0.5
    tasks = named(spans, "task")
    assert len(tasks) == commit_and_forward.TASK_SPANS
    assert {one.parent for one in tasks} == {run.id}
    by_task = {one.attributes["batchlab.task"]: one for one in tasks}
    assert by_task[7].error == "timeout"
    assert by_task[500].end_ns - by_task[500].start_ns == 500_000_000
