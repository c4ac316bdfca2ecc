"""HTTP and signatures of `batchlab asg serve`, without a network and without an engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.model import OperationModel
from botocore.parsers import create_parser

from batchlab.adapters.local.state_files import Keys
from batchlab.server.autoscaling_api.app import MAX_BODY_BYTES, App, Fault
from batchlab.server.autoscaling_api.query_protocol import QueryService, model
from batchlab.server.autoscaling_api.scheduled_changes import ALL_ACTIONS as ACTIONS
from tests.support import ROOT

KEY = Keys("AKIDEXAMPLE", "secret")
TAGS = b"Action=DescribeTags&Version=2011-01-01"
SERVED = "autoscaling"
Headers = dict[str, str]


class FixedClock:
    def __init__(self, now_s: float) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def monotonic_s(self) -> float:
        return self._now_s


async def act(operation: OperationModel, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    if asked.get("NextToken") == "refuse":
        raise Fault("ResourceContention", "busy")
    if asked.get("NextToken") == "break":
        raise RuntimeError("a secret of ours")
    return {"Tags": [{"Key": operation.name}]}


def app(key: Keys | None = None, now_s: float | None = None) -> App:
    now_s = datetime.now(UTC).timestamp() if now_s is None else now_s
    services = {SERVED: QueryService(model(SERVED), act)}
    return App(services, SERVED, FixedClock(now_s), lambda: "id-7", key=key)


class Answered:
    """The answer that the application sent."""

    def __init__(self, sent: list[MutableMapping[str, Any]]) -> None:
        self.status = sent[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        self.body = sent[1]["body"]

    @property
    def parsed(self) -> dict[str, Any]:
        shape: Any = model(SERVED).operation_model("DescribeTags").output_shape
        response = {"headers": {}, "status_code": self.status, "body": self.body}
        parsed: dict[str, Any] = create_parser("query").parse(response, shape)
        return parsed

    @property
    def error(self) -> tuple[int, str, str]:
        error = self.parsed["Error"]
        return self.status, error["Code"], error["Message"]


def ask(to: App, headers: Headers, body: bytes = TAGS, *, method: str = "POST", chunk: int = 1 << 20) -> Answered:
    sent: list[MutableMapping[str, Any]] = []
    parts = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(name.lower().encode(), text.encode()) for name, text in headers.items()],
    }
    asyncio.run(to(scope, receive, send))
    return Answered(sent)


def signed(body: bytes = TAGS, key: Keys = KEY, service: str = SERVED) -> Headers:
    """Return the headers of a request, signed now as botocore signs."""
    request = AWSRequest("POST", "http://127.0.0.1:8080/", data=body)
    request.headers["Content-Type"] = "application/x-www-form-urlencoded; charset=utf-8"
    request.headers["User-Agent"] = "somebody"
    request.headers["Host"] = "127.0.0.1:8080"
    SigV4Auth(Credentials(key.access_key, key.secret_key), service, "eu-central-1").add_auth(request)
    return dict(request.headers.items())


def test_an_answer_carries_its_request_id_and_is_xml() -> None:
    answered = ask(app(), signed(), chunk=5)
    assert answered.status == 200
    assert answered.parsed["Tags"] == [{"Key": "DescribeTags"}]
    assert answered.parsed["ResponseMetadata"]["RequestId"] == "id-7"
    assert answered.headers["x-amzn-requestid"] == "id-7"
    assert answered.headers["content-type"] == "text/xml"


def test_endpoint_without_keys_accepts_any_signature() -> None:
    assert ask(app(), signed(key=Keys("who", "ever"))).status == 200
    missing = (403, "MissingAuthenticationToken", "Missing Authentication Token")
    assert ask(app(), {"Host": "x"}).error == missing
    assert ask(app(), {"Authorization": "Basic abc"}).error[:2] == (400, "IncompleteSignature")


def test_a_request_signed_with_the_key_is_answered() -> None:
    assert ask(app(KEY), signed()).status == 200


def test_a_key_that_is_not_the_key_is_refused() -> None:
    told = ask(app(KEY), signed(key=Keys("AKIDOTHER", "secret"))).error
    expected = "The security token included in the request is invalid."
    assert told == (403, "InvalidClientTokenId", expected)


def test_changed_signed_request_is_refused() -> None:
    whole = signed()
    other_secret = signed(key=Keys("AKIDEXAMPLE", "other"))
    changed: tuple[tuple[Headers, bytes], ...] = (
        (whole, TAGS + b"&MaxRecords=1"),
        (whole | {"Host": "elsewhere"}, TAGS),
        (whole | {"Authorization": whole["Authorization"].replace("eu-central-1", "x")}, TAGS),
        (whole | {"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"}, TAGS),
        (other_secret, TAGS),
    )
    for headers, body in changed:
        assert ask(app(KEY), headers, body).error[:2] == (403, "SignatureDoesNotMatch")


def test_a_signature_holds_for_five_minutes() -> None:
    now_s = datetime.now(UTC).timestamp()
    headers = signed()
    assert ask(app(KEY, now_s + 290), headers).status == 200
    for skew_s in (310, -310):
        status, code, message = ask(app(KEY, now_s + skew_s), headers).error
        assert (status, code) == (403, "SignatureDoesNotMatch")
        assert message.startswith("Signature expired")


def test_host_and_date_must_be_signed() -> None:
    headers = signed()
    without = headers["Authorization"].replace(";host", "").replace(";x-amz-date", "")
    for wrong in ({"Authorization": without}, {"X-Amz-Date": "yesterday"}):
        assert ask(app(KEY), headers | wrong).error[:2] == (400, "IncompleteSignature")


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    status, code, _ = ask(app(), signed(), b"x" * (MAX_BODY_BYTES + 1), chunk=65536).error
    assert (status, code) == (413, "RequestEntityTooLarge")


def test_malformed_form_is_refused() -> None:
    told = ask(app(), signed(), b"\xff").error
    assert told == (400, "MalformedQueryString", "The request is not a form.")


def test_a_fault_has_the_status_of_the_model() -> None:
    assert ask(app(), signed(), TAGS + b"&NextToken=refuse").error == (500, "ResourceContention", "busy")


def test_internal_error_is_not_shown_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    answered = ask(app(), signed(), TAGS + b"&NextToken=break")
    assert answered.error[:2] == (500, "InternalFailure")
    assert b"secret" not in answered.body
    assert "a secret of ours" in caplog.text


def test_get_is_for_health_checks_only() -> None:
    assert ask(app(KEY), {}, b"", method="GET").status == 200


def test_early_disconnect_is_not_an_error() -> None:
    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: MutableMapping[str, Any]) -> None:
        pytest.fail("nobody is there to hear")

    asyncio.run(app()({"type": "http"}, receive, send))


def test_the_page_lists_what_is_served() -> None:
    page = (ROOT / "docs" / "contributing" / "asg-endpoint.md").read_text()
    table = page[page.index("| served |") : page.index("Every other action")]
    named = set(re.findall(r"\b[A-Z][a-z]+[A-Z]\w+", table))
    assert named == set(ACTIONS)
