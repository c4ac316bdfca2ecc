"""The SimpleDB of the tests, called by boto3: conditions, limits, pages, errors, and faults."""

from __future__ import annotations

import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError

from tests.support.simpledb.fixtures import Sdb


@pytest.fixture
def sdb(simpledb: Sdb) -> Iterator[Any]:
    client = simpledb.client()
    yield client
    client.close()


def _refused(status: int, code: str, call: Any, **given: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(**given)
    assert caught.value.response["Error"]["Code"] == code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    return str(caught.value.response["Error"]["Message"])


def _put(sdb: Any, place: Sdb, item: str, expected: Any = None, **values: str | list[str]) -> None:
    attributes = [
        {"Name": name, "Value": value, "Replace": True}
        for name, some in values.items()
        for value in ([some] if isinstance(some, str) else some)
    ]
    more = {} if expected is None else {"Expected": expected}
    sdb.put_attributes(DomainName=place.domain, ItemName=item, Attributes=attributes, **more)


def _get(sdb: Any, place: Sdb, item: str, *, consistent: bool = True) -> dict[str, set[str]]:
    answer = sdb.get_attributes(DomainName=place.domain, ItemName=item, ConsistentRead=consistent)
    found: dict[str, set[str]] = {}
    for one in answer.get("Attributes", ()):
        found.setdefault(one["Name"], set()).add(one["Value"])
    return found


def test_replace_replaces_and_the_rest_adds(sdb: Any, simpledb: Sdb) -> None:
    """The example is from the documentation of PutAttributes."""
    _put(sdb, simpledb, "I", a="1", b=["2", "3"])
    _put(sdb, simpledb, "I", b="4")
    assert _get(sdb, simpledb, "I") == {"a": {"1"}, "b": {"4"}}
    sdb.put_attributes(DomainName=simpledb.domain, ItemName="I", Attributes=[{"Name": "b", "Value": "5"}])
    assert _get(sdb, simpledb, "I")["b"] == {"4", "5"}
    sdb.delete_attributes(DomainName=simpledb.domain, ItemName="I", Attributes=[{"Name": "b", "Value": "4"}])
    assert _get(sdb, simpledb, "I")["b"] == {"5"}
    sdb.delete_attributes(DomainName=simpledb.domain, ItemName="I")
    sdb.delete_attributes(DomainName=simpledb.domain, ItemName="I")
    assert _get(sdb, simpledb, "I") == {}


def test_condition_is_enforced(sdb: Any, simpledb: Sdb) -> None:
    absent = {"Name": "v", "Exists": False}
    _put(sdb, simpledb, "I", absent, v="1")
    text = _refused(409, "ConditionalCheckFailed", lambda: _put(sdb, simpledb, "I", absent, v="2"))
    assert text == "Conditional check failed. Attribute (v) value exists"
    text = _refused(409, "ConditionalCheckFailed", lambda: _put(sdb, simpledb, "I", {"Name": "v", "Value": "2"}, v="3"))
    assert "value is (1) but was expected (2)" in text
    _put(sdb, simpledb, "I", {"Name": "v", "Value": "1", "Exists": True}, v="2")
    given = {"DomainName": simpledb.domain, "ItemName": "I"}
    _refused(409, "ConditionalCheckFailed", sdb.delete_attributes, **given, Expected={"Name": "v", "Value": "1"})
    assert _get(sdb, simpledb, "I") == {"v": {"2"}}
    sdb.delete_attributes(**given, Expected={"Name": "v", "Value": "2"})
    assert _get(sdb, simpledb, "I") == {}


def test_a_condition_that_cannot_be_held_is_refused(sdb: Any, simpledb: Sdb) -> None:
    _put(sdb, simpledb, "I", many=["1", "2"])
    for status, code, expected in (
        (404, "AttributeDoesNotExist", {"Name": "v", "Value": "1"}),
        (409, "MultiValuedAttribute", {"Name": "many", "Value": "1"}),
        (400, "IncompleteExpectedExpression", {"Name": "many"}),
        (400, "IncompleteExpectedExpression", {"Name": "many", "Exists": True}),
        (400, "ExistsAndExpectedValue", {"Name": "v", "Value": "1", "Exists": False}),
    ):
        with pytest.raises(ClientError) as caught:
            _put(sdb, simpledb, "I", expected, w="1")
        assert caught.value.response["Error"]["Code"] == code
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert _get(sdb, simpledb, "I") == {"many": {"1", "2"}}


def test_limits_of_an_item_are_enforced(sdb: Any, simpledb: Sdb) -> None:
    _put(sdb, simpledb, "ä" * 512, **{"ö" * 512: "ü" * 512})
    for item, name, value in (("x" * 1025, "n", "v"), ("i", "x" * 1025, "v"), ("i", "n", "é" * 513)):
        with pytest.raises(ClientError, match="InvalidParameterValue"):
            _put(sdb, simpledb, item, **{name: value})
    _put(sdb, simpledb, "full", many=[str(n) for n in range(256)])
    with pytest.raises(ClientError, match="NumberItemAttributesExceeded"):
        _put(sdb, simpledb, "full", more="x")
    with pytest.raises(ClientError, match="NumberSubmittedAttributesExceeded"):
        _put(sdb, simpledb, "fuller", many=[str(n) for n in range(257)])
    assert "fuller" not in simpledb.items()


def test_a_batch_is_of_25_items_and_all_of_it_or_nothing(sdb: Any, simpledb: Sdb) -> None:
    def batch(count: int, value: str = "v") -> list[dict[str, Any]]:
        return [{"Name": f"i{n}", "Attributes": [{"Name": "n", "Value": value}]} for n in range(count)]

    put, domain = sdb.batch_put_attributes, simpledb.domain
    put(DomainName=domain, Items=batch(25))
    assert len(simpledb.items()) == 25
    _refused(409, "NumberSubmittedItemsExceeded", put, DomainName=domain, Items=batch(26))
    twice = batch(1) + batch(1)
    _refused(400, "DuplicateItemName", put, DomainName=domain, Items=twice)
    bad = [*batch(2, "w"), {"Name": "x", "Attributes": [{"Name": "n", "Value": "x" * 1025}]}]
    _refused(400, "InvalidParameterValue", put, DomainName=domain, Items=bad)
    assert simpledb.items()["i0"] == {"n": ["v"]}
    large = [
        {"Name": f"l{n}", "Attributes": [{"Name": str(m), "Value": "x" * 1000} for m in range(50)]} for n in range(25)
    ]
    _refused(400, "InvalidParameterValue", put, DomainName=domain, Items=large)
    names = [{"Name": f"i{n}"} for n in range(25)]
    sdb.batch_delete_attributes(DomainName=domain, Items=names)
    assert simpledb.items() == {}
    _refused(
        409,
        "NumberSubmittedItemsExceeded",
        sdb.batch_delete_attributes,
        DomainName=domain,
        Items=[*names, {"Name": "x"}],
    )


def test_full_domain_is_reported(sdb: Any, simpledb: Sdb) -> None:
    simpledb.weather(max_attributes=3)
    _put(sdb, simpledb, "a", n="1", m="2")
    with pytest.raises(ClientError, match="NumberDomainAttributesExceeded"):
        _put(sdb, simpledb, "b", n="1", m="2")
    _put(sdb, simpledb, "a", n="9")
    simpledb.weather(max_attributes=10, max_bytes=20)
    with pytest.raises(ClientError, match="NumberDomainBytesExceeded"):
        _put(sdb, simpledb, "b", n="x" * 20)


def test_domains_are_created_and_deleted(sdb: Any, simpledb: Sdb) -> None:
    names = [f"{simpledb.domain}-{n}" for n in range(3)]
    for name in (*names, names[0]):
        sdb.create_domain(DomainName=name)
    listed: list[str] = []
    more: dict[str, str] = {}
    while True:
        page = sdb.list_domains(MaxNumberOfDomains=2, **more)
        listed += page["DomainNames"]
        if "NextToken" not in page:
            break
        more = {"NextToken": page["NextToken"]}
    assert set(names) <= set(listed)
    _put(sdb, Sdb(simpledb.url, names[0]), "I", n=["1", "2"])
    facts = sdb.domain_metadata(DomainName=names[0])
    assert (facts["ItemCount"], facts["AttributeValueCount"]) == (1, 2)
    for name in (*names, names[0]):
        sdb.delete_domain(DomainName=name)
    _refused(400, "NoSuchDomain", sdb.domain_metadata, DomainName=names[0])
    _refused(400, "NoSuchDomain", sdb.select, SelectExpression=f"select * from `{names[0]}`")
    _refused(400, "InvalidParameterValue", sdb.create_domain, DomainName="x!")


def _select(sdb: Any, expression: str, **more: Any) -> Any:
    return sdb.select(SelectExpression=expression, ConsistentRead=True, **more)


def test_pages_have_the_guides_sizes(sdb: Any, simpledb: Sdb) -> None:
    """A page has 100 items by default, at most 2,500, and at most 1 MB. A token is valid only with its own query."""
    for start in range(0, 150, 25):
        sdb.batch_put_attributes(
            DomainName=simpledb.domain,
            Items=[
                {"Name": f"i{n:03d}", "Attributes": [{"Name": f"{m:02d}", "Value": "x" * 1000} for m in range(20)]}
                for n in range(start, start + 25)
            ],
        )
    everything = f"select * from `{simpledb.domain}`"
    page = _select(sdb, f"select itemName() from `{simpledb.domain}`")
    assert len(page["Items"]) == 100
    assert "Attributes" not in page["Items"][0]
    rest = _select(sdb, f"select itemName() from `{simpledb.domain}`", NextToken=page["NextToken"])
    assert (len(rest["Items"]), "NextToken" in rest) == (50, False)
    page = _select(sdb, f"{everything} limit 2500")
    assert 40 <= len(page["Items"]) < 53, "1 MB"
    counted = _select(sdb, f"select count(*) from `{simpledb.domain}`")
    assert counted["Items"] == [{"Name": "Domain", "Attributes": [{"Name": "Count", "Value": "150"}]}]
    tenth = _select(sdb, f"select count(*) from `{simpledb.domain}` limit 10")
    after = _select(sdb, f"{everything} limit 2", NextToken=tenth["NextToken"])
    assert len(after["Items"]) == 2
    with pytest.raises(ClientError, match="InvalidNextToken"):
        _select(sdb, f"{everything} where `01` > 'a'", NextToken=page["NextToken"])
    with pytest.raises(ClientError, match="InvalidNextToken"):
        _select(sdb, everything, NextToken="nonsense")


def test_sorted_pages_continue(sdb: Any, simpledb: Sdb) -> None:
    for n in (3, 1, 2, 5, 4):
        _put(sdb, simpledb, f"i{n}", key=f"{n:04d}", other="x")
    query = f"select key from `{simpledb.domain}` where key > '0001' order by key desc limit 2"
    page = _select(sdb, query)
    assert [one["Name"] for one in page["Items"]] == ["i5", "i4"]
    assert page["Items"][0]["Attributes"] == [{"Name": "key", "Value": "0005"}]
    _put(sdb, simpledb, "i9", key="0009")
    page = _select(sdb, query, NextToken=page["NextToken"])
    assert [one["Name"] for one in page["Items"]] == ["i3", "i2"]
    assert "NextToken" not in page


def test_only_a_consistent_read_sees_what_was_just_written(sdb: Any, simpledb: Sdb) -> None:
    simpledb.weather(lag_s=30.0)
    _put(sdb, simpledb, "I", n="1")
    assert _get(sdb, simpledb, "I", consistent=False) == {}
    assert _get(sdb, simpledb, "I") == {"n": {"1"}}
    query = f"select * from `{simpledb.domain}` where n = '1'"
    assert "Items" not in sdb.select(SelectExpression=query)
    assert len(_select(sdb, query)["Items"]) == 1
    simpledb.weather(lag_s=0.2)
    _put(sdb, simpledb, "J", n="1")
    deadline_s = time.monotonic() + 20
    while _get(sdb, simpledb, "J", consistent=False) == {}:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_the_weather_is_what_a_test_makes_it(sdb: Any, simpledb: Sdb) -> None:
    simpledb.weather(throttle=1.0)
    text = _refused(503, "ServiceUnavailable", lambda: _put(sdb, simpledb, "I", n="1"))
    assert "try again later" in text
    simpledb.weather(throttle=0.0, lose=1.0)
    with pytest.raises(ConnectionClosedError):
        _put(sdb, simpledb, "I", n="1")
    simpledb.weather(lose=0.0, short=1.0)
    assert _get(sdb, simpledb, "I") == {"n": {"1"}}, "done, though nobody was told"
    query = f"select * from `{simpledb.domain}`"
    for n in range(5):
        _put(sdb, simpledb, f"i{n}", n="1")
    sizes = {len(_select(sdb, query).get("Items", ())) for _ in range(30)}
    assert sizes == {0, 1, 3}, "cut short, and then a token leads on"


def test_unsigned_or_unknown_request_is_refused(simpledb: Sdb) -> None:
    def status(**given: str) -> int:
        try:
            urllib.request.urlopen(f"{simpledb.url}/?{urllib.parse.urlencode(given)}").close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        return 200

    signed = {"Version": "2009-04-15", "AWSAccessKeyId": "k", "Signature": "s"}
    signed["SignatureVersion"] = "2"
    assert status(Action="ListDomains", **signed) == 200
    assert status(Action="ListDomains", Version="2009-04-15") == 403
    assert status(Action="ListDomains", **{**signed, "Version": "2007-11-07"}) == 400
    assert status(Action="Query", **signed) == 400


def test_restricted_characters_are_returned_as_base64(sdb: Any, simpledb: Sdb) -> None:
    """SimpleDB encodes these characters as base64, and boto3 does not decode them, so a client must not write them."""
    _put(sdb, simpledb, "I", n="a\x01b")
    assert _get(sdb, simpledb, "I") == {"n": {"YQFi"}}
