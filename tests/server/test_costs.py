"""Costs and caps of a grid with an account: the page, the API, and the manager's log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import Refused
from batchlab.core.pricing import price_book
from batchlab.core.pricing.request_costs import RequestCounter
from batchlab.runtime import aws_deployment
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.home import Home
from batchlab.server.manager_service import accounting_of
from tests.support.server.api import Rig, job, post
from tests.support.server.page import Visitor, visitor

__all__ = ["visitor"]

NOTE = "prices are of us-east-1, because the price book lacks on_demand"


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    region = getattr(request, "param", "us-east-1")
    with Rig(prices=replace(price_book.load(), grid_region=region)) as made:
        yield made


@pytest.mark.parametrize(("rig", "is_noted"), [("eu-west-3", True), ("us-east-1", False)], indirect=["rig"])
def test_page_notes_prices_of_another_region(visitor: Visitor, is_noted: bool) -> None:
    answer = visitor.get("/costs")
    assert answer.status_code == 200
    assert "at list prices of us-east-1" in answer.text
    assert (f"Note: {NOTE}" in answer.text) is is_noted


@pytest.mark.parametrize(("region", "is_noted"), [("eu-west-3", True), ("us-east-1", False)])
def test_manager_logs_that_caps_use_prices_of_another_region(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, region: str, is_noted: bool
) -> None:
    home = Home(tmp_path)
    aws_deployment.write(home, AwsDeployment("grid", region, "bucket", "grid-", "manager", "secret", ()))
    with caplog.at_level(logging.WARNING):
        accounting_of(home, (), RequestCounter())
    assert (f"cost caps: {NOTE}" in caplog.text) is is_noted


@pytest.mark.parametrize("usd", [-0.01, 2e11, "many", "Infinity"])
def test_cap_outside_of_the_bounds_is_refused(rig: Rig, usd: object) -> None:
    """The manager could not read a larger cap again from the bucket."""
    name = rig.submit(job())
    for path in ("/v1/use/cap", f"/v1/jobs/{name}/cap"):
        answer = post(rig, path, {"max_cost_usd": usd})
        assert answer.status_code == 422, path
        assert "max_cost_usd" in answer.text
    assert rig.client.use()["max_cost_usd"] is None
    assert rig.client.job_use(name)["max_cost_usd"] is None


def test_small_cap_is_entered_as_it_is_shown(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job())
    for page in ("/costs", f"/jobs/{name}"):
        assert visitor.post(f"{page}/cap", amount="0.00001").status_code == 303
        form = visitor.get(f"{page}/cap").text
        assert 'value="0.00001"' in form
        assert "0.00001 USD" in visitor.get(page).text
    assert rig.client.use()["max_cost_usd"] == rig.client.job_use(name)["max_cost_usd"] == 0.00001


def test_audit_log_names_the_capped_object_and_the_cap(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job("capped", "capped"))
    rig.client.cap_job(name, 2.5)
    rig.client.cap_job(name, None)
    rig.client.cap_grid(50.0)
    assert visitor.post("/costs/cap", amount="20").status_code == 303
    rig.client.cancel(name)
    rig.until(lambda: rig.client.job(name)["ended_s"], "the end of the job")
    with pytest.raises(Refused):
        rig.client.cap_job(name, 1.0)
    records = rig.client.audit(action="job cap", limit=3) + rig.client.audit(action="grid cap", limit=2)
    assert [(one["object"], one["outcome"], one["reason"][:15]) for one in records] == [
        (name, "failed", "409: Job capped"),
        (name, "done", "no cap"),
        (name, "done", "cap 2.50 USD"),
        ("the grid", "done", "cap 20.00 USD"),
        ("the grid", "done", "cap 50.00 USD"),
    ]
