"""One grid of real processes, observed by its traces, its logs, and its metrics."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from batchlab.core.api_types import JobView, NotificationView
from batchlab.core.errors import UsageError
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from tests.support.grid.local_grid import LocalGrid
from tests.support.trace_receiver import Received, Receiver, named
from tests.support.waiting import until
from tests.support.webhook_receiver import Hook

ABOVE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENG",
    "OTEL_EXPORTER_OTLP_HEADERS": "x-api-key=k3y-of-the-receiver",
    "BATCHLAB_NOTIFY_KEY": "signs-what-is-sent",
    "DATABASE_URL": "postgresql://u:hunter2hunter2@db/x",
    "CUSTOMER": "ACME-and-Sons-4711",
}
"""Secrets in the environment of the grid. The names of the last two do not show that they are secrets."""
TARGETS = """
[ops]
webhook = "HOOKops/s3cret-path"
on = ["ended"]

[pager]
command = ["sh", "-c", "cat > PAGED"]

[jobs]
local = ["HOOK"]

[jobs.secrets]
BATCHLAB_NOTIFY_KEY = ["HOOK"]
"""

IN_SERVICE = 'batchlab_instances{pool="default",state="InService"} 2.0'

HANDLERS = """
import os
def double(line):
    print(os.environ["CUSTOMER"])
    number = int(line)
    if number == 3 and not os.path.exists(os.environ["TRIED"]):
        open(os.environ["TRIED"], "w").close()
        raise ValueError("not with " + os.environ["CUSTOMER"] + os.environ["DATABASE_URL"])
    return number * 2

def more(number):
    return number + 1

def total(numbers):
    return sum(numbers)
"""
JOB = """
name: observed
notify:
  - {webhook: "HOOK", on: [succeeded, failures], secret: "env:BATCHLAB_NOTIFY_KEY"}
input: {files: numbers.jsonl, split: items}
stages:
  - {name: double, python: "handlers:double", bundle: 3, retry: {attempts: 2, backoff: 0s}}
  - {name: more, python: "handlers:more"}
  - {name: total, python: "handlers:total", gather: all}
"""


class Observed:
    """The grid, and the data that it has sent and written."""

    def __init__(self, folder: Path, receiver: Receiver, hook: Hook) -> None:
        self.receiver = receiver
        self.hook = hook
        self.paged = folder / "paged"
        (folder / "home").mkdir()
        targets = TARGETS.replace("HOOK", hook.url).replace("PAGED", str(self.paged))
        (folder / "home" / "notify.toml").write_text(targets)
        self.grid = LocalGrid(folder / "home", [Pool("default", 2, 2, 1)])
        self.job = folder / "job.yaml"
        self.job.write_text(JOB.replace("HOOK", hook.url + "own"))
        (folder / "handlers.py").write_text(HANDLERS)
        (folder / "numbers.jsonl").write_text("".join(f"{n}\n" for n in range(6)))
        other = folder / "other.yaml"
        other.write_text(JOB.replace("HOOK", "http://127.0.0.1:9/admin"))
        with pytest.raises(UsageError) as caught:
            self.grid.submit(other)
        self.refused = str(caught.value)
        self.view: JobView = self.grid.run(self.job)
        self.metrics = self._scraped()
        until(lambda: len(self._paths()) == 2 and self.paged.exists())
        # Otherwise, the manager would be killed before it has stored the failed deliveries.
        until(lambda: self._tried() == 2)
        self.why = self.grid.client.why(self.view["id"])
        # The receiver works again when another manager leads.
        hook.statuses = [200]
        self.grid.kill_manager()
        until(lambda: min(self._paths().values()) >= 2, within_s=40)
        until(lambda: all(one["state"] == "delivered" for one in self._log()))
        self.log = self._log()
        self.tested = self.grid.client.notify_test("ops")
        self.targets = self.grid.client.notify_targets()
        self.grid.stop()

    def _tried(self) -> int:
        """Return the number of pending notifications with at least one attempt."""
        return sum(load["attempts"] > 0 for load in json.loads(self.kept())["pending"])

    def kept(self) -> str:
        """Return the stored notifications from the bucket."""
        return (self.grid.home.objects / object_keys.NOTIFICATIONS).read_text()

    def _paths(self) -> Counter[str]:
        return Counter(call.path for call in self.hook.calls)

    def _log(self) -> list[NotificationView]:
        return self.grid.client.notifications()

    def _scraped(self) -> str:
        record = self.grid.home.record()
        assert record
        token = {"Authorization": f"Bearer {self.grid.home.token()}"}

        def scraped() -> str:
            answer = httpx.get(f"{record.url}/metrics", headers=token, trust_env=False)
            assert answer.status_code == 200
            return answer.text

        # The metrics of instances are from the last tick.
        until(lambda: IN_SERVICE in scraped())
        return scraped()

    def logs(self) -> str:
        home = self.grid.home
        files = [home.manager_log, *sorted((home.fleet / "logs").glob("*.log"))]
        assert len(files) >= 3, "a manager and two workers"
        return "".join(file.read_text() for file in files)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("observed")
    with pytest.MonkeyPatch.context() as patch, Receiver() as receiver, Hook(500) as hook:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("TRIED", str(folder / "tried"))
        patch.setenv("BATCHLAB_LOG_FORMAT", "json")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv("TRACEPARENT", ABOVE)
        yield Observed(folder, receiver, hook)


@pytest.fixture(scope="module")
def spans(observed: Observed) -> Sequence[Received]:
    """Return all spans of the job, after the end of its grid."""
    assert observed.view["state"] == "SUCCEEDED"
    return observed.receiver.until(lambda found: named(found, "end"))


def lineage(spans: Sequence[Received], one: Received) -> list[Received]:
    """Return the span and its ancestors up to the root."""
    by_id = {span.id: span for span in spans}
    found = [one]
    while found[-1].parent in by_id:
        found.append(by_id[found[-1].parent])
    return found


# --- Traces --------------------------------------------------------------------------------------


def test_the_spans_of_a_job_are_one_tree(spans: Sequence[Received], observed: Observed) -> None:
    assert {span.trace for span in spans} == {ABOVE.split("-")[1]}
    assert {span.attributes["batchlab.job"] for span in spans} == {observed.view["id"]}
    ids = [span.id for span in spans]
    assert len(set(ids)) == len(ids)
    above = ABOVE.split("-")[2]
    roots = [span for span in spans if span.parent not in ids]
    assert [(root.name, root.parent) for root in roots] == [("submit", above)]


def test_a_task_is_followed_from_its_submission_to_its_result(spans: Sequence[Received]) -> None:
    """Task 0 is cut in the first stage, forwarded by its worker, and gathered by the manager."""
    (task,) = named(spans, "task", stage="double", task=0)
    above = [one.name for one in lineage(spans, task)]
    assert above == ["task", "run", "receive", "send", "cut", "plan", "submit"]
    (receive,) = [one for one in lineage(spans, task) if one.name == "receive"]
    below = [span for span in spans if span.parent == receive.id]
    assert {one.name for one in below} >= {"run", "commit", "forward"}
    (forward,) = [one for one in below if one.name == "forward"]

    (next_,) = named(spans, "task", stage="more", task=0)
    names = [one.name for one in lineage(spans, next_)]
    assert names[:4] == ["task", "run", "receive", "forward"]
    assert lineage(spans, next_)[3] == forward

    (fold,) = [span for span in spans if span.name == "fold" and span.parent == forward.id]
    assert fold.service == "batchlab-manager"
    assert forward.service == "batchlab-worker"

    (gather,) = named(spans, "gather")
    assert lineage(spans, gather)[-1].name == "submit"
    folded = {one.id for one in named(spans, "fold", stage="more")}
    assert gather.links
    assert set(gather.links) <= folded
    (last,) = named(spans, "task", stage="total", task=0)
    names = [one.name for one in lineage(spans, last)]
    assert names == ["task", "run", "receive", "send", "cut", "gather", "submit"]
    (end,) = named(spans, "end", state="SUCCEEDED")
    assert [one.name for one in lineage(spans, end)] == ["end", "submit"]


def test_retry_is_traced_below_the_failed_attempt(spans: Sequence[Received]) -> None:
    first, second = sorted(named(spans, "task", stage="double", task=3), key=lambda one: one.start_ns)
    assert first.error == "exception"
    assert not second.error
    assert second.attributes["batchlab.attempt"] == 2
    receive = lineage(spans, first)[2]
    forward = lineage(spans, second)[3]
    assert (receive.name, forward.name, forward.parent) == ("receive", "forward", receive.id)


def test_processes_and_times_are_sane(spans: Sequence[Received]) -> None:
    managers = {span.process for span in spans if span.service == "batchlab-manager"}
    workers = {span.process for span in spans if span.service == "batchlab-worker"}
    assert len(managers) == 1, "the next one had nothing to do with it"
    assert 1 <= len(workers) <= 2
    by_id = {span.id: span for span in spans}
    now_ns = time.time_ns()
    for span in spans:
        assert now_ns - 300e9 < span.start_ns <= span.end_ns <= now_ns, span
        if above := by_id.get(span.parent):
            assert span.start_ns >= above.start_ns, (span, above)
            if span.name in ("task", "run", "commit", "forward", "fetch input"):
                assert span.end_ns <= above.end_ns + 2e6, (span, above)
    (run,) = named(spans, "run", stage="double", task__first=0)
    assert (run.attributes["batchlab.succeeded"], run.attributes["batchlab.failed"]) == (3, 0)


def test_the_receivers_key_is_sent(spans: Sequence[Received], observed: Observed) -> None:
    assert spans
    assert {header["x-api-key"] for header in observed.receiver.headers} == {"k3y-of-the-receiver"}


# --- Logs ----------------------------------------------------------------------------------------


def _lines(observed: Observed) -> list[dict[str, Any]]:
    return [json.loads(line) for line in observed.logs().splitlines()]


def test_every_line_of_every_log_is_json(observed: Observed) -> None:
    lines = _lines(observed)
    assert {line["service"] for line in lines} == {"manager", "worker"}
    mine = [line for line in lines if line.get("job") == observed.view["id"]]
    assert {"accepted", "ended SUCCEEDED in round 0"} <= {one["message"] for one in mine}
    (failed,) = [one for one in mine if "failed" in one["message"]]
    assert failed["message"] == "the task failed (exception: ValueError) and is tried again"
    assert (failed["stage"], failed["task"], failed["attempt"]) == ("double", 3, 1)
    assert failed["trace"] == ABOVE.split("-")[1]
    assert {"worker", "instance", "pool", "bundle", "execution"} <= failed.keys()
    launched = [line for line in lines if line["message"].startswith("launched")]
    assert {one["instance"] for one in launched} >= {failed["instance"]}


def test_no_secret_is_in_any_log(observed: Observed) -> None:
    told = observed.logs()
    token = observed.grid.home.token()
    for secret in (*SECRETS.values(), token, "hunter2", "k3y-of", "s3cret-path"):
        assert secret not in told


# --- Notifications -------------------------------------------------------------------------------


def test_target_not_named_by_the_operator_is_not_reached(observed: Observed) -> None:
    assert "http://127.0.0.1:9 is on the manager's own machine" in observed.refused
    assert "admin" not in observed.refused


def test_notification_arrives_after_the_managers_death(observed: Observed) -> None:
    """The two receivers failed at first, the manager was killed, and the next manager notified both receivers."""
    calls = observed.hook.calls
    for path in ("/own", "/ops/s3cret-path"):
        first, again = [call for call in calls if call.path == path][:2]
        assert first.headers["Batchlab-Notification"] == again.headers["Batchlab-Notification"]
        assert first.body == again.body
        assert int(again.headers["Batchlab-Attempt"]) >= 2
        assert first.doc["moment"] == "succeeded"
        assert first.doc["job"]["id"] == observed.view["id"]
        assert first.doc["tasks"]["succeeded"] == 13
    own = next(call for call in calls if call.path == "/own")
    at_s, code = (part.split("=")[1] for part in own.headers["Batchlab-Signature"].split(","))
    signed = hmac.new(b"signs-what-is-sent", f"{at_s}.".encode() + own.body, hashlib.sha256)
    assert signed.hexdigest() == code
    assert json.loads(observed.paged.read_text())["moment"] == "succeeded"


def test_delivery_log_shows_each_result(observed: Observed) -> None:
    found = {one["target"]: one for one in observed.log}
    assert found.keys() == {"ops", "pager", f"{observed.view['id']}#1"}
    assert found["pager"]["attempts"] == 1
    assert found["ops"]["attempts"] >= 2
    assert "s3cret" not in json.dumps(observed.log)
    assert observed.tested == {"target": "ops", "error": ""}
    assert [target["to"] for target in observed.targets] == [f"{observed.hook.url}…", "sh"]


def test_why_tells_of_what_could_not_be_delivered(observed: Observed) -> None:
    assert observed.why.startswith("The job ended SUCCEEDED: ")
    assert f"Also, a notification about the job to {observed.hook.url}… was not delivered" in observed.why
    assert "HTTP 500. `batchlab notify log` shows the attempts." in observed.why


def test_no_secret_is_in_the_bucket(observed: Observed) -> None:
    """The only exception is the address in the job's own file, which is not a secret."""
    text = observed.kept()
    for secret in ("signs-what-is-sent", "s3cret-path", *SECRETS.values()):
        assert secret not in text


# --- Metrics -------------------------------------------------------------------------------------


def test_work_of_a_job_is_in_the_metrics(observed: Observed) -> None:
    for line in (
        'batchlab_jobs_ended_total{state="succeeded"} 1.0',
        'batchlab_tasks_ended_total{stage_kind="input",state="succeeded"} 6.0',
        'batchlab_tasks_ended_total{stage_kind="chain",state="succeeded"} 6.0',
        'batchlab_tasks_ended_total{stage_kind="gather",state="succeeded"} 1.0',
        IN_SERVICE,
        'batchlab_workers{pool="default"} 2.0',
        "batchlab_manager_leader 1.0",
    ):
        assert line in observed.metrics
    assert "batchlab_cost_usd_total" in observed.metrics
    assert observed.view["id"] not in observed.metrics
