"""The commands of `cost`, and costs in other commands."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.local.objects import open_local
from batchlab.cli import bills, cost
from batchlab.core.api_usage_types import JobUseView, UseView
from batchlab.core.errors import UsageError
from batchlab.core.pricing.bill import bill
from batchlab.jobs.job_file import load
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime import home as fetches
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.home import Home
from tests.support.cli import FakeClient, Run, a_grid, a_job

JOB = """
name: sums
input: {files: "data/*.txt", split: lines, size: 10}
stages:
  - {name: add, python: "handlers:add"}
  - {name: total, python: "handlers:total", gather: all}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("1\n" * 95)
    (tmp_path / "data" / "b.txt").write_text("2\n" * 10)
    (tmp_path / "handlers.py").write_text("def add(part): ...\ndef total(parts): ...\n")
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def account(**more: Any) -> dict[str, Any]:
    billed = {"pool": "default", "type": "m7i.large", "market": "on-demand", "seconds": 3600.0}
    return {
        "billed": [billed],
        "failed_s": {},
        "lost_s": {},
        "requests": dict.fromkeys(("sqs", "sqs_empty", "s3_puts", "s3_gets", "s3_deletes"), 0),
        "bundles": 10,
        "is_whole": True,
        **more,
    }


def grid_use(**more: Any) -> UseView:
    living = {"pool": "default", "type": "m7i.large", "market": "on-demand", "instances": 3}
    told: Any = {
        "total": account(),
        "nobody": account(billed=[]),
        "living": [living],
        "max_cost_usd": None,
        "capped": {},
        **more,
    }
    view: UseView = told
    return view


def job_use(**more: Any) -> JobUseView:
    told: Any = {
        "job": "sums-0123456789",
        "account": account(),
        "max_cost_usd": 5.0,
        "capped": "",
        "pools": {"default": 2},
        "types": {"default": "m7i.large"},
        "slots": {"parse": 1},
        **more,
    }
    view: JobUseView = told
    return view


# --- Estimate ------------------------------------------------------------------------------------


def test_tasks_are_counted_as_the_planner_cuts_them(folder: Path) -> None:
    """The stages have ten parts of one file, one part of the other file, and one gather task."""
    import asyncio

    tasks, files, size = asyncio.run(cost.count(load(folder / "job.yaml", {})))
    assert (tasks, files, size) == (11, 2, 210)


def test_an_estimate_is_a_range_with_its_lines_and_what_it_rests_on(run: Run, folder: Path) -> None:
    code, out, _ = run(
        "cost",
        "estimate",
        folder / "job.yaml",
        "--seconds",
        "add=2-8",
        "--seconds",
        "total=1",
        "--home",
        folder / "grid",
    )
    assert code == 0
    assert "The run will cost" in out
    assert "USD" in out
    assert "as of 2026-07-20" in out
    assert "m7i.large" in out  # the instance type of the backend `aws`
    assert "Assumed: slots are busy" in out
    code, out, _ = run(
        "cost",
        "estimate",
        folder / "job.yaml",
        "--seconds",
        "2",
        "--json",
        "--pool",
        "default:0-5x4",
        "--instance-type",
        "c7g.xlarge",
        "--spot",
        "50",
        "--home",
        folder / "grid",
    )
    doc = json.loads(out)
    assert doc["usd"]["low"] < doc["usd"]["typical"] < doc["usd"]["high"]
    assert doc["usd"]["typical"] == pytest.approx(sum(i["usd"]["typical"] for i in doc["items"]))
    assert {"SQS requests", "S3 requests"} < {i["what"] for i in doc["items"]}
    assert [item["what"] for item in doc["further"]] == ["S3 storage"]
    assert "c7g.xlarge, 50% Spot" in doc["items"][0]["how"]


def test_stack_in_a_region_without_prices_is_noted(run: Run, folder: Path) -> None:
    home = Home(folder / "grid")
    home.make()
    aws_deployment.write(home, AwsDeployment("grid", "eu-west-3", "bucket", "grid-", "manager", "secret", ()))
    code, out, err = run("cost", "estimate", folder / "job.yaml", "--seconds", "2", "--home", home.path)
    assert code == 0, err
    assert "prices are of us-east-1, because the price book lacks on_demand" in out
    assert "--region eu-west-3" in out
    book = aws_deployment.prices_of(home)
    assert book.mismatch in bill([], None, {}, book).notes
    elsewhere = replace(book, blocks={name: replace(one, region="eu-west-3") for name, one in book.blocks.items()})
    assert not elsewhere.mismatch
    assert not aws_deployment.prices_of(Home(folder / "other")).mismatch


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "The time of a task is unknown for stage add"),
        (["--seconds", "soon"], "'soon' is not a number of seconds"),
        (["--seconds", "3-1"], "'3-1' is not a number of seconds"),
        (["--seconds", "2", "--tasks", "many"], "'many' is not a number of tasks"),
        (["--seconds", "nap=2"], "names 'nap', which does not exist"),
        (["--seconds", "2", "--spot", "0.8"], "Write --spot 80."),
        (["--seconds", "2", "--instance-type", "m7i.larg"], "no instance type 'm7i.larg'"),
        (["--seconds", "2", "--pool", "default:0-x"], "is not NAME:MIN-MAXxSLOTS"),
    ],
)
def test_mistakes_are_clear_sentences(run: Run, folder: Path, options: list[str], told: str) -> None:
    code, out, err = run("cost", "estimate", folder / "job.yaml", "--home", folder / "g", *options)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_downloaded_results_count_once_their_size_is_known(run: Run, folder: Path) -> None:
    home = Home(folder / "grid")
    ask = ("cost", "estimate", folder / "job.yaml", "--seconds", "2", "--json", "--home", home.path)

    def told(*more: str) -> tuple[float | None, str]:
        code, out, err = run(*ask, *more)
        assert code == 0, err
        doc = json.loads(out)
        found = {item["what"]: item["usd"]["typical"] for item in doc["further"]}
        return found.get("data out of AWS"), "; ".join(doc["assumed"])

    usd, assumed = told()
    assert usd is None
    assert "the download of results is not included" in assumed
    assert told("--results", "2GiB")[0] == pytest.approx(0.18)
    home.make()
    fetches.record_fetch(home, "sums-0123456789", 1024**3)
    usd, assumed = told()
    assert usd == pytest.approx(0.09)
    assert "as large as the results of sums-0123456789" in assumed
    code, _, err = run(*ask, "--results", "much")
    assert code == 2
    assert "'much' is not a size" in err


def test_input_in_s3_is_not_guessed_at(run: Run, folder: Path) -> None:
    text = JOB.replace('"data/*.txt"', '"s3://bucket/raw/"')
    (folder / "job.yaml").write_text(text)
    arguments = ("cost", "estimate", folder / "job.yaml", "--seconds", "1", "--home", folder / "g")
    code, _, err = run(*arguments)
    assert code == 2
    assert "--tasks N" in err
    counts = []
    for tasks in ("add=5000000", "5000000"):  # the number of tasks must not name the gather stage
        code, out, _ = run(*arguments, "--tasks", tasks, "--json")
        assert code == 0
        counts.append(json.loads(out)["bundles"])
    assert counts[0] == counts[1]
    assert 1_000_000 < counts[0] < 6_000_000


def test_input_that_does_not_exist_yet_needs_only_a_number(run: Run, folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB.replace("data/*.txt", "next-month/*.txt"))
    arguments = ("cost", "estimate", folder / "job.yaml", "--seconds", "1", "--home", folder / "g")
    assert "No file matches 'next-month/*.txt'" in run(*arguments)[2]
    assert run(*arguments, "--tasks", "1000", "--json")[0] == 0
    assert run(*arguments, "--tasks", "total=1")[0] == 2, "nobody says how many come first"


def test_earlier_run_supplies_task_durations(manager: type[FakeClient], run: Run, folder: Path) -> None:
    (stage,) = a_job("sums-0123456789")["stages"]
    stages = [{**stage, "name": "add", "mean_s": 0.9, "succeeded": 30}, {**stage, "name": "total", "mean_s": 4.0}]
    earlier = {**a_job("sums-0123456789"), "stages": stages}
    manager.answers = {"jobs": [{**a_job("other-0123456789")}, earlier]}
    manager.answers["tasks"] = {"tasks": [{"task": n, "run_s": 0.02 if n else 60.0} for n in range(20)]}
    code, out, err = run("cost", "estimate", folder / "job.yaml", "--home", folder / "g", "--json")
    assert code == 0
    doc = json.loads(out)
    assert any("sums-0123456789" in text for text in doc["assumed"])
    assert [(one["check"], one["stage"], one["median_s"]) for one in doc["warnings"]] == [("task size", "add", 0.02)]
    assert "Warning: Tasks of add are tiny. Half of the 20 sampled tasks of sums-0123456789 took at most 20 ms" in err


@pytest.mark.parametrize(
    ("seconds", "options", "checks"),
    [
        ("0.02", ["--tasks", "add=20"], ["task size"]),
        ("0.02", ["--tasks", "add=19"], []),
        ("5-9", ["--spot", "100"], []),
        ("700", [], []),
        ("700", ["--spot", "100"], ["long tasks on Spot"]),
        ("12h", [], None),
        ("43200", [], ["task length"]),
    ],
)
def test_estimate_warns_about_given_task_times(
    run: Run, folder: Path, seconds: str, options: list[str], checks: list[str] | None
) -> None:
    told = ["--seconds", f"add={seconds}", "--seconds", "total=5", "--home", folder / "g"]
    code, out, err = run("cost", "estimate", folder / "job.yaml", *told, *options, "--json")
    if checks is None:
        assert (code, out) == (2, "")
        return
    assert code == 0, err
    assert [one["check"] for one in json.loads(out)["warnings"]] == checks
    assert err.count("Warning: Tasks of add") == len(checks)
    assert ("According to --seconds, a task takes" in err) is bool(checks)


# --- Bill and burn -------------------------------------------------------------------------------


def test_a_bill_of_a_job_in_a_grid_that_is_up(manager: type[FakeClient], run: Run, tmp_path: Path) -> None:
    manager.answers = {"jobs": [a_job("sums-0123456789", "SUCCEEDED")], "job_use": job_use()}
    code, out, _ = run("cost", "bill", "last", "--home", tmp_path / "g", "--json")
    assert code == 0
    lines = {item["what"]: item["usd"]["typical"] for item in json.loads(out)["items"]}
    disk = 50 * 0.08 / 730
    assert lines["compute, pool default"] == pytest.approx((0.1008 + disk) / 3600)  # 2 s on two slots
    assert lines["idle, pool default"] == pytest.approx((0.1008 + disk) * 3599 / 3600)
    code, out, _ = run("cost", "bill", "last", "--home", tmp_path / "g", "--instance-type", "c7g.large")
    assert code == 0
    assert "c7g.large on-demand" in out
    code, _, err = run("cost", "bill", "last", "--home", tmp_path / "g", "--instance-type", "z.z")
    assert code == 2
    assert "no instance type 'z.z'" in err


def test_amounts_of_a_short_job_are_shown_without_exponents(
    manager: type[FakeClient], run: Run, tmp_path: Path
) -> None:
    """The amounts of the table add up to the amount in the first line."""
    billed = {"pool": "default", "type": "m7i.large", "market": "on-demand", "seconds": 0.1}
    used = account(billed=[billed], requests={"sqs": 1})
    manager.answers = {"jobs": [a_job("sums-0123456789", "SUCCEEDED")], "job_use": job_use(account=used)}
    code, out, err = run("cost", "bill", "last", "--home", tmp_path / "g")
    assert code == 0, err
    assert not re.search(r"\de-\d", out)
    total = re.search(r"SUCCEEDED: (0\.0000\d+) USD", out)
    rows = [line.split() for line in out.splitlines()]
    (all_,) = [row[1] for row in rows if row[:1] == ["all"]]
    assert total
    assert float(all_) == pytest.approx(float(total[1]), rel=0.01)
    manager.answers = {"grid": a_grid(), "use": grid_use(max_cost_usd=0.00001)}
    assert "cap 0.00001 USD" in run("grid", "status", "--as-if-aws")[1]


def test_a_bill_on_a_stack_has_the_data_that_was_counted(
    manager: type[FakeClient], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "g")
    home.make()
    at = AwsDeployment(
        stack="batchlab",
        region="us-east-1",
        bucket="bucket",
        prefix="batchlab-",
        manager_group="batchlab-manager",
        token_secret="arn",
        pools=(),
        egress="nat",
    )
    aws_deployment.write(home, at)
    fetches.record_fetch(home, "sums-0123456789", 1024**3)
    used = account(requests={"sqs": 1e6, "sqs_bytes": 20 * 1024**3})
    job: Any = a_job("sums-0123456789", "SUCCEEDED")
    monkeypatch.setattr(bills, "facts_of", lambda *_: bills.Facts(job, job_use(account=used), "aws"))

    async def stored(*_: object) -> int:
        return 0

    monkeypatch.setattr(bills, "_stored_bytes", stored)
    monkeypatch.setattr(factory.Backend, "open_objects", lambda *_: None)
    code, out, err = run("cost", "bill", "last", "--home", home.path)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    lines = {" ".join(row[:5]): row for row in rows if row}
    assert "1.100000" in lines["data through the NAT gateway"]
    assert any(row[:5] == ["data", "out", "of", "AWS", "0.090000"] for row in rows)
    assert "FURTHER COSTS" in out
    assert "messages alone are counted" in out


def test_stored_outputs_and_logs_are_counted(tmp_path: Path) -> None:
    for n, name in enumerate(("jobs", "raw", "files", "logs", "code"), start=1):
        (tmp_path / name / "j").mkdir(parents=True)
        (tmp_path / name / "j" / "a").write_bytes(b"x" * 10**n)
    assert asyncio.run(bills._stored_bytes(open_local(tmp_path), "j")) == 11_110


def test_a_bill_where_nothing_has_run(run: Run, tmp_path: Path) -> None:
    code, _, err = run("cost", "bill", "last", "--home", tmp_path / "g")
    assert code == 2
    assert "has no ledger with jobs" in err


def test_status_shows_cost_only_where_it_applies(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"grid": a_grid(), "use": grid_use(max_cost_usd=50.0)}
    _, out, _ = run("grid", "status")
    assert "USD" not in out
    _, out, _ = run("grid", "status", "--as-if-aws")
    assert "would cost on AWS 0.319 USD an hour now, 0.106 USD so far, cap 50 USD" in out
    _, out, _ = run("grid", "status", "--as-if-aws", "--json")
    assert json.loads(out)["cost"]["usd_per_hour"]["typical"] == pytest.approx(3 * (0.1008 + 50 * 0.08 / 730))
    manager.answers["grid"] = {**a_grid(), "backend": "aws"}
    _, out, _ = run("grid", "status")
    assert "The grid costs 0.319 USD an hour now" in out


def test_status_notes_prices_of_another_region(manager: type[FakeClient], run: Run, tmp_path: Path) -> None:
    home = Home(tmp_path / "grid")
    home.make()
    manager.answers = {"grid": {**a_grid(), "backend": "aws"}, "use": grid_use()}
    for region, is_noted in (("eu-west-3", True), ("us-east-1", False)):
        aws_deployment.write(home, AwsDeployment("grid", region, "bucket", "grid-", "manager", "secret", ()))
        _, out, _ = run("grid", "status", "--home", home.path)
        assert "The grid costs" in out
        assert ("(prices are of us-east-1, because the price book lacks" in out) is is_noted


def test_a_job_shows_its_cost_and_that_its_cap_is_reached(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {
        "jobs": [a_job("sums-0123456789")],
        "why": "Nothing more is launched for it.",
        "eta": {"text": "not known"},
        "grid": a_grid(),
        "job_use": job_use(capped="its cost is capped"),
    }
    _, out, _ = run("job", "show", "last", "--as-if-aws")
    assert "0.107 USD so far, cap 5 USD, reached: no more is launched than it pays for" in out


# --- Caps ----------------------------------------------------------------------------------------


def test_caps_are_set_and_removed(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"jobs": [a_job("sums-0123456789")], "cap_job": job_use(), "cap_grid": grid_use()}
    assert run("job", "cap", "last", "2.50USD")[0] == 0
    assert run("job", "cap", "last", "none")[0] == 0
    assert run("grid", "cap", "50 usd", "--json")[0] == 0
    asked = [(name, args) for name, args, _ in manager.asked if name.startswith("cap")]
    assert asked == [
        ("cap_job", ("sums-0123456789", 2.5)),
        ("cap_job", ("sums-0123456789", None)),
        ("cap_grid", (50.0,)),
    ]


@pytest.mark.parametrize("amount", ["5", "5EUR", "five", "-1USD"])
def test_amount_without_usd_is_refused_before_any_request(manager: type[FakeClient], run: Run, amount: str) -> None:
    code, _, err = run("grid", "cap", "--", amount)
    assert code == 2
    assert "is not an amount in USD" in err
    assert ("Did you mean 5USD?" in err) is (amount == "5")
    assert run("job", "cap", "last", "--", amount)[2] == err
    assert manager.asked == []


def test_a_job_file_has_its_cap_in_usd_and_it_does_not_change_its_digest(folder: Path) -> None:
    from batchlab.jobs.job_file import source_digest
    from batchlab.jobs.yaml_source import JobFileErrors

    before = source_digest(load(folder / "job.yaml", {}), "code")
    (folder / "job.yaml").write_text(JOB + "max_cost: 5USD\n")
    capped = load(folder / "job.yaml", {})
    assert capped.job.max_cost == "5USD"
    assert source_digest(capped, "code") == before
    (folder / "job.yaml").write_text(JOB + "max_cost: 5\n")
    with pytest.raises(JobFileErrors) as caught:
        load(folder / "job.yaml", {})
    assert "USD" in str(caught.value.errors[0])


def test_simulator_has_no_cost_account(run: Run, folder: Path) -> None:
    code, _, err = run("run", folder / "job.yaml", "--backend", "sim", "--max-cost", "5USD")
    assert code == 2
    assert "does not record costs" in err


# --- Prices --------------------------------------------------------------------------------------


def test_prices_are_shown_and_refreshed(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "grid"
    code, out, _ = run("cost", "prices", "m7i.large", "--home", home)
    assert code == 0
    assert "0.1008" in out
    assert "2026-07-20" in out
    (tmp_path / "new.csv").write_text("region,instance_type,linux_on_demand_usd_per_hour\nus-east-1,m7i.large,0.2\n")
    code, out, _ = run("cost", "refresh-prices", "--from", tmp_path / "new.csv", "--date", "2026-10-01", "--home", home)
    assert code == 0
    code, out, _ = run("cost", "prices", "--home", home, "--json")
    doc = json.loads(out)
    assert doc["currency"] == "USD"
    assert doc["blocks"]["on_demand"]["date"] == "2026-10-01"
    assert doc["blocks"]["on_demand"]["usd_per_hour"]["m7i.large"] == 0.2
    code, _, err = run("cost", "prices", "m7i.nano", "--home", home)
    assert code == 2
    assert "cost refresh-prices" in err


def test_by_name_takes_one_for_all_and_one_for_each() -> None:
    assert cost.by_name(["2", "b=3"], ["a", "b"]) == {"a": "2", "b": "3"}
    assert cost.by_name(["b=3", "2"], ["a", "b"]) == {"a": "2", "b": "3"}
    with pytest.raises(UsageError):
        cost.by_name(["c=1"], ["a"])
