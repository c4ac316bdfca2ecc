"""Signatures of requests and answers, and the record of used requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchlab.core import http_connections
from batchlab.core.http_connections import Expected, Unproven
from batchlab.server.http import authentication

SIGNED = http_connections.sign("token", "POST", "/v1/jobs?a=1", b"body", 1000.7)


def test_a_request_is_read_as_it_was_signed() -> None:
    assert http_connections.read("token", SIGNED.header, "POST", "/v1/jobs?a=1") == SIGNED
    assert SIGNED.at_s == 1000
    for token, header, method, target in (
        ("other", SIGNED.header, "POST", "/v1/jobs?a=1"),
        ("token", SIGNED.header, "PUT", "/v1/jobs?a=1"),
        ("token", SIGNED.header, "POST", "/v1/jobs?a=2"),
        ("token", "Bearer token", "POST", "/v1/jobs?a=1"),
        ("token", "", "POST", "/v1/jobs?a=1"),
        ("token", replace(SIGNED, at_s=1001).header, "POST", "/v1/jobs?a=1"),
        ("token", replace(SIGNED, nonce="x").header, "POST", "/v1/jobs?a=1"),
        ("token", replace(SIGNED, body="x").header, "POST", "/v1/jobs?a=1"),
        ("token", replace(SIGNED, mac="ü").header, "POST", "/v1/jobs?a=1"),
        ("token", SIGNED.header.replace("1000", "²"), "POST", "/v1/jobs?a=1"),
        ("token", SIGNED.header.replace("1000", "1" * 5000), "POST", "/v1/jobs?a=1"),
    ):
        assert http_connections.read(token, header, method, target) is None, header


def test_no_two_requests_have_one_signature() -> None:
    """Two requests differ in their random numbers or in the boundaries of their fields."""
    macs = {http_connections.sign("t", "GET", "/a", b"", 1.0).mac for _ in range(10)}
    assert len(macs) == 10
    fields = (("GET", "/a\nb"), ("GET", "/a\\nb"), ("GET\n/a", "b"), ("GET/a", "b"), ("G", "ET/ab"))
    same = {http_connections._request_mac("t", *field, 1, "nonce", "body") for field in fields}
    assert len(same) == len(fields)


@pytest.mark.parametrize("proof", [None, "", "whole", "stream", "whole x", "stream ü", "other x"])
def test_unsigned_answer_is_refused(proof: str | None) -> None:
    with pytest.raises(Unproven):
        Expected("token", SIGNED, 200, proof).check_answer(b"x" * 100)


def test_an_answer_belongs_to_one_request() -> None:
    proof = http_connections.whole_proof("token", SIGNED, 200, b"yes")
    assert Expected("token", SIGNED, 200, proof).check_answer(b"yes") == b"yes"
    other = http_connections.sign("token", "POST", "/v1/jobs?a=1", b"body", 1000.7)
    for signed, status, body in ((other, 200, b"yes"), (SIGNED, 201, b"yes"), (SIGNED, 200, b"no")):
        with pytest.raises(Unproven):
            Expected("token", signed, status, proof).check_answer(body)


def test_an_answer_in_parts_ends_with_its_signature() -> None:
    proof = http_connections.stream_proof("token", SIGNED, 200)
    end = http_connections.answer_mac("token", SIGNED.mac, 200, http_connections.digest(b"a\nb\n"))
    expected = Expected("token", SIGNED, 200, proof)
    assert expected.check_answer(b"a\nb\n" + end.encode()) == b"a\nb\n"
    for content in (b"", b"a\nb\n", b"a\n" + end.encode(), b"a\nb\n" + end.encode() + b"\n"):
        with pytest.raises(Unproven):
            expected.check_answer(content)
    with pytest.raises(Unproven):  # the signature also covers the kind of an answer
        Expected("token", SIGNED, 200, f"whole {proof.split()[1]}").check_answer(b"a\nb\n")


def test_memory_of_past_requests_is_bounded() -> None:
    used = authentication._Signatures(3)
    some = [http_connections.sign("t", "GET", "/", b"", at_s) for at_s in (1, 2, 3, 4, 5)]
    assert [used.is_first(one, 5.0) for one in some] == [True] * 5
    assert len(used._times_s) == 3
    assert [used.is_first(one, 5.0) for one in some] == [False] * 5
    late = http_connections.sign("t", "GET", "/", b"", 2000)
    assert used.is_first(late, 2000.0)
    assert len(used._times_s) == 1, "what is too old anyway is forgotten"
