"""The metrics for Prometheus, which are correct, limited, and require the token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from batchlab.core.model import Pool
from batchlab.core.pricing import price_book
from batchlab.server.metrics import families
from tests.support import ROOT
from tests.support.server.api import TOKEN, Rig, job

EXAMPLE = ROOT / "examples" / "monitoring"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as found:
        yield found


def samples(rig: Rig) -> Mapping[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = rig.http.get("/metrics", headers=AUTHORISED)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name.removeprefix("batchlab_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def at(found: Mapping[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_a_jobs_life_is_counted(rig: Rig) -> None:
    before = samples(rig)
    one = rig.submit(job("counted", tasks=4, timeout_s=60.0))
    rig.outstanding(one, 4)
    during = samples(rig)
    assert at(during, "jobs", state="runnable") + at(during, "jobs", state="starting") == 1
    assert at(during, "tasks", stage_kind="input", state="sent") == 4
    assert at(during, "bundles_outstanding", pool="default") == 4
    assert at(during, "oldest_bundle_age_seconds", pool="default") >= 0
    rig.work(one, 4, bad=[2])
    assert rig.ended(one)["state"] == "FAILED"
    after = samples(rig)

    def grown(name: str, **labels: str) -> float:
        return at(after, name, **labels) - at(before, name, **labels)

    assert grown("jobs_submitted_total") == 1
    assert grown("jobs_ended_total", state="failed") == 1
    assert grown("tasks_ended_total", stage_kind="input", state="succeeded") == 3
    assert grown("tasks_ended_total", stage_kind="input", state="failed") == 1
    assert grown("bundles_committed_total") == 4
    assert grown("tick_duration_seconds_count") > 0
    assert grown("event_messages_total") > 0
    assert grown("scaling_decisions_total", pool="default", direction="out") >= 1
    assert at(after, "manager_leader") == 1
    assert at(after, "pool_max_instances", pool="default") == 2


def test_worker_reports_are_counted_once(rig: Rig) -> None:
    from batchlab.core.protocol.messages import CounterReport, Events

    rig.submit(job("told", tasks=1))
    (instance,) = rig.instances(1, "Pending")
    beat = rig.beat(instance)
    before = samples(rig)
    for retried in (1, 3, 3, 2):  # the queue may deliver events twice and in any order
        counts = {"retried.timeout": retried, "duplicate": 1}
        forged = CounterReport("w-9", {"retried.timeout": 1000})
        rig.run(rig.tell(Events(counters=(CounterReport(beat.worker, counts), forged), beats=(beat,))))
    unreadable = CounterReport(beat.worker, {"retried.x\n": 5})
    rig.run(rig.tell(Events(counters=(unreadable,), beats=(beat,))))
    labels = {"reason": "timeout", "followed": "retried"}
    was = at(before, "attempts_failed_total", **labels)
    rig.until(lambda: at(samples(rig), "attempts_failed_total", **labels) == was + 3, "the count")
    after = samples(rig)
    assert at(after, "duplicate_executions_total") == at(before, "duplicate_executions_total") + 1
    assert not any("x\n" in str(key) for key in after)


def test_job_with_a_running_bundle_counts_as_running(rig: Rig) -> None:
    before = at(samples(rig), "jobs", state="running")
    one = rig.submit(job("running", "running", tasks=1))
    rig.beat(rig.instance(), *rig.outstanding(one, 1))
    assert at(samples(rig), "jobs", state="running") == before + 1
    rig.work(one, 1)
    rig.ended(one)


def test_number_of_series_does_not_grow_with_jobs(rig: Rig) -> None:
    before = samples(rig).keys()
    for number in range(3):
        rig.submit(job(f"many-{number}", f"token-{number}"))
    assert samples(rig).keys() == before


def test_without_the_token_nothing_answers(rig: Rig) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        answer = rig.http.get("/metrics", headers=headers)
        assert answer.status_code == 401
        assert "batchlab_" not in answer.text


def test_open_metrics_is_served_on_request(rig: Rig) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    answer = rig.http.get("/metrics", headers={**AUTHORISED, "Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    parse: Any = openmetrics.text_string_to_metric_families
    assert len(list(parse(answer.text))) > 20


def test_manager_without_the_lead_refuses() -> None:
    with Rig(lead=False) as rig:
        assert at(samples(rig), "manager_leader") == 0


def test_names_follow_the_conventions(rig: Rig) -> None:
    for family in families(rig.manager, "memory"):
        assert re.fullmatch(r"batchlab_[a-z][a-z_]*[a-z]", family.name), family.name
        assert family.documentation.endswith((".", "queue, or running.")), family.name
        assert not re.search(r"_(ms|minutes|hours|count|sum|bucket|total)$", family.name)


def test_docs_list_every_metric_with_its_labels() -> None:
    """The table of the page lists exactly the metrics that a manager with every feature exports."""
    pools = (Pool("default", max_size=2, slots=2), Pool("gpu", max_size=1, slots=2, gpus=1))
    with Rig(pools=pools, prices=price_book.load()) as rig:
        rig.client.set_share({"identifier": "research", "weight": 0.5})
        rig.client.cap_grid(10.0)
        exported = {family.name: family for family in families(rig.manager, "memory")}
    table = (ROOT / "docs" / "observability.md").read_text().partition("| metric | labels |")[2].partition("\n\n")[0]
    listed: dict[str, set[str]] = {}
    for row in table.splitlines()[2:]:
        names, labels = row.split("|")[1:3]
        groups = [set(re.findall(r"\w+", group)) - {"none"} for group in labels.split(";")]
        found = [name.replace("…", "batchlab_pool").removesuffix("_total") for name in re.findall(r"`([\w…]+)`", names)]
        listed |= zip(found, groups if len(groups) > 1 else groups * len(found), strict=True)
    assert listed.keys() == exported.keys()
    for name, family in exported.items():
        for sample in family.samples:
            assert sample.labels.keys() <= listed[name], name
            if not sample.name.endswith(("_sum", "_count")):
                assert sample.labels.keys() == listed[name], name


def test_example_alerts_use_existing_metrics(rig: Rig) -> None:
    """The manager exports every metric, label, and value that an alert names."""
    known: dict[str, dict[str, set[str]]] = {}
    for name, labels in samples(rig):
        for key, value in labels:
            known.setdefault(f"batchlab_{name}", {}).setdefault(key, set()).add(value)
        known.setdefault(f"batchlab_{name}", {})
    rules = yaml.safe_load((EXAMPLE / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    used = set()
    for rule in rules:
        assert rule["annotations"]["summary"].endswith(".")
        for name, selector in re.findall(r"(batchlab_\w+)(?:\{(.*?)\})?", rule["expr"]):
            assert name in known, rule["alert"]
            used.add(name)
            for key, value in re.findall(r'(\w+)="(.*?)"', selector):
                assert value in known[name][key], rule["alert"]
        for key in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert any(key in known[name] for name in used), rule["alert"]


def test_the_example_scrape_configuration_is_one() -> None:
    doc = yaml.safe_load((EXAMPLE / "prometheus.yaml").read_text())
    assert doc["rule_files"] == ["alerts.yaml"]
    (scrape,) = doc["scrape_configs"]
    assert scrape["authorization"]["credentials_file"].endswith("/.batchlab/token")
