"""A SimpleDB ledger at the deletion of its stack. The stack is scripted, because no emulator creates a domain. The
domain exists in the SimpleDB server of the test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchlab.deploy.account import Account
from batchlab.deploy.destroy import Destroy
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Resource
from tests.support.aws.deploy import REGION, Front
from tests.support.aws.stack_states import Cloud
from tests.support.simpledb.fixtures import Sdb

DOMAIN = "AWS::SDB::Domain"


@pytest.fixture
def stack(simpledb: Sdb, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SIMPLEDB", simpledb.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    sdb = simpledb.client()
    for item in ("job", "stage"):
        sdb.put_attributes(
            DomainName=simpledb.domain, ItemName=item, Attributes=[{"Name": "state", "Value": "SUCCEEDED"}]
        )
    parts = [("LedgerDomain", DOMAIN, simpledb.domain, "CREATE_COMPLETE")]
    cloud = Cloud("UPDATE_COMPLETE", parts, kept=frozenset({"LedgerDomain"}))
    with Account(REGION, "1", "arn:aws:iam::1:user/me") as account:
        account._clients["cloudformation"] = cloud
        yield Stack(account, "grid", sleep=lambda _: None)
    # The fixture deletes its domain, and ignores a domain that does not exist any more.
    sdb.close()


def domains(there: Sdb) -> list[str]:
    sdb = there.client()
    try:
        return list(sdb.list_domains().get("DomainNames", ()))
    finally:
        sdb.close()


def test_ledgers_domain_outlives_its_stack_and_is_reported(stack: Stack, simpledb: Sdb) -> None:
    front = Front()
    stays = Destroy(stack, front, delete_data=False).run()
    assert front.questions == [f"Destroy the stack grid ({simpledb.domain} remains)?"]
    assert stays == [Resource("LedgerDomain", DOMAIN, simpledb.domain, "CREATE_COMPLETE")]
    assert simpledb.items().keys() == {"job", "stage"}


def test_domain_is_deleted_with_its_data(stack: Stack, simpledb: Sdb) -> None:
    front = Front()
    assert Destroy(stack, front, delete_data=True).run() == []
    assert front.questions == [f"Destroy the stack grid, and with it {simpledb.domain} (a SimpleDB domain)?"]
    assert simpledb.domain not in domains(simpledb)


def test_busy_simpledb_does_not_keep_the_domain(stack: Stack, simpledb: Sdb) -> None:
    simpledb.weather(throttle=0.4)
    try:
        assert Destroy(stack, Front(), delete_data=True).run() == []
    finally:
        simpledb.weather(throttle=0.0)
    assert simpledb.domain not in domains(simpledb)


def test_declined_confirmation_keeps_stack_and_domain(stack: Stack, simpledb: Sdb) -> None:
    assert Destroy(stack, Front(agreed=False), delete_data=True).run() is None
    state = stack.state()
    assert state
    assert state.status == "UPDATE_COMPLETE"
    assert simpledb.items().keys() == {"job", "stage"}
