"""Attacks of a web page and of another user's program on the emulator of a `ministack` grid."""

from __future__ import annotations

import http.client
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from batchlab.adapters.aws.endpoint import Endpoint, client
from batchlab.adapters.local.ministack import Emulator
from tests.support.aws.autoscaling_api import aws
from tests.support.aws.emulators import ministack_python
from tests.support.grid.local_grid import LocalGrid

pytestmark = pytest.mark.slow

FORGED = {"v": 1, "id": "forged", "command": ["touch", "/tmp/forged"]}
KEY = "/jobs/forged/spec.json"
JSON = {"content-type": "application/x-amz-json-1.0", "x-amz-target": "AmazonSQS.ListQueues"}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGrid]:
    ministack_python()
    grid = LocalGrid(tmp_path_factory.mktemp("attacked") / "home", (), backend="ministack")
    yield grid
    grid.stop()


@pytest.fixture
def endpoint(grid: LocalGrid) -> Endpoint:
    place = grid.home.place("ministack")
    assert place
    return grid.backend.endpoint_at(grid.home, place)


def ask(
    endpoint: Endpoint, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
) -> tuple[int, dict[str, str], bytes]:
    """Send a request, and return its status, headers, and body."""
    assert endpoint.url
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=10)
    try:
        connection.request(method, path, body or None, dict(headers))
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, told, answer.read()
    finally:
        connection.close()


def signed(
    endpoint: Endpoint,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    service: str = "s3",
    keys: tuple[str, str] | None = None,
    headers: Mapping[str, str] = {},
) -> dict[str, str]:
    """Return the headers of a signed request."""
    request = AWSRequest(method, f"{endpoint.url}{path}", headers=dict(headers), data=body)
    known = Credentials(*(keys or (endpoint.access_key, endpoint.secret_key)))
    auth = S3SigV4Auth if service == "s3" else SigV4Auth
    auth(known, service, "us-east-1").add_auth(request)
    return {name: str(value) for name, value in request.headers.items()}


def objects(endpoint: Endpoint, bucket: str) -> set[str]:
    found = aws(endpoint, "s3").list_objects_v2(Bucket=bucket)
    return {one["Key"] for one in found.get("Contents", ())}


def bucket_of(grid: LocalGrid) -> str:
    place = grid.home.place("ministack")
    assert place
    return place.bucket


def test_a_job_cannot_be_forged_without_a_signature(grid: LocalGrid, endpoint: Endpoint) -> None:
    """Before, any user of this machine could write a job's definition into the bucket."""
    path, body = f"/{bucket_of(grid)}{KEY}", json.dumps(FORGED).encode()
    for headers in (
        {},
        {"authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"},
        signed(endpoint, "PUT", path, body, keys=("test", "test")),
        signed(endpoint, "PUT", path, body, keys=(endpoint.access_key, "test")),
        signed(endpoint, "PUT", path, body, keys=("123456789012", "test")),
        signed(endpoint, "PUT", path, b"another body"),
        signed(endpoint, "GET", path, body),
        signed(endpoint, "PUT", path + "x", body),
        signed(endpoint, "PUT", path, body) | {"X-Amz-Date": "20200101T000000Z"},
    ):
        status, told, text = ask(endpoint, "PUT", path, body, headers)
        assert status == 403, (headers, text)
        assert not [name for name in told if name.startswith("access-control-")]
    assert KEY.removeprefix("/") not in objects(endpoint, bucket_of(grid))


def test_queues_refuse_requests_without_keys(endpoint: Endpoint) -> None:
    """Before, an unsigned message reached the events queue, and the message of another client could be deleted."""
    status, told, text = ask(endpoint, "POST", "/", b"{}", JSON)
    assert (status, told["content-type"]) == (403, "application/x-amz-json-1.0")
    assert json.loads(text)["__type"] == "AccessDenied"
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert ask(endpoint, "POST", "/", b"Action=ListQueues", form)[0] == 403
    assert ask(endpoint, "GET", "/?Action=ListQueues")[0] == 403
    headers = signed(endpoint, "POST", "/", b"{}", service="sqs", headers=JSON)
    assert ask(endpoint, "POST", "/", b"{}", headers)[0] == 200
    assert ask(endpoint, "POST", "/", b'{"a": 1}', headers)[0] == 403
    assert ask(endpoint, "POST", "/", b" " * 5_000_000, headers)[0] == 403
    for path in ("/_ministack/reset", "/_ministack/state", "/_localstack/health"):
        assert ask(endpoint, "POST", path)[0] == 403


def test_a_web_page_is_refused_even_with_a_signature(grid: LocalGrid, endpoint: Endpoint) -> None:
    """Web pages must not read the emulator. Before, MiniStack allowed pages of every origin to read its answers."""
    path = f"/{bucket_of(grid)}?list-type=2"
    headers = signed(endpoint, "GET", path)
    status, told, _ = ask(endpoint, "GET", path, headers=headers)
    assert status == 200
    assert not [name for name in told if name.startswith("access-control-")]
    for origin in ("http://evil.example", "http://127.0.0.1:9", "null"):
        status, told, _ = ask(endpoint, "GET", path, headers=headers | {"origin": origin})
        assert status == 403
        assert not [name for name in told if name.startswith("access-control-")]
    asks = {"origin": "http://127.0.0.1:9", "access-control-request-method": "PUT"}
    status, told, _ = ask(endpoint, "OPTIONS", path, headers=asks)
    assert status == 403
    assert not [name for name in told if name.startswith("access-control-")]
    assert ask(endpoint, "GET", "/_ministack/health", headers=asks)[0] == 403


def test_a_rebound_name_is_refused(grid: LocalGrid, endpoint: Endpoint) -> None:
    """A page whose name resolves to 127.0.0.1 does not send an Origin header to its own host."""
    assert endpoint.url
    port = urlsplit(endpoint.url).port
    path = f"/{bucket_of(grid)}?list-type=2"
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        headers = signed(endpoint, "GET", path, headers={"host": host} if host else {})
        status, _, text = ask(endpoint, "GET", path, headers=headers | {"host": host})
        assert (status, b"loopback" in text) == (403, True), host


def test_a_presigned_url_works_until_it_expires(grid: LocalGrid, endpoint: Endpoint) -> None:
    """The check also covers signatures in the query string."""
    s3 = client(endpoint, "s3", connections=1)
    bucket = bucket_of(grid)
    s3.put_object(Bucket=bucket, Key="shared/a b+ü", Body=b"content")
    request = AWSRequest("GET", f"{endpoint.url}/{bucket}/shared/a%20b%2B%C3%BC")
    known = Credentials(endpoint.access_key, endpoint.secret_key)
    S3SigV4QueryAuth(known, "s3", "us-east-1", expires=60).add_auth(request)
    path = str(request.url).removeprefix(str(endpoint.url))
    assert ask(endpoint, "GET", path)[::2] == (200, b"content")
    assert ask(endpoint, "DELETE", path)[0] == 403
    assert ask(endpoint, "GET", path.replace("X-Amz-Expires=60", "X-Amz-Expires=600"))[0] == 403
    s3.delete_object(Bucket=bucket, Key="shared/a b+ü")
    s3.close()


def test_the_keys_are_the_owners_alone(grid: LocalGrid, endpoint: Endpoint) -> None:
    """Each grid has its own random keys, which other users cannot read."""
    file = grid.home.backend_folder("ministack") / "keys.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = json.loads(file.read_text())
    assert kept == {"access_key": endpoint.access_key, "secret_key": endpoint.secret_key}
    assert len(endpoint.secret_key) >= 40
    command = Path(f"/proc/{grid.emulator()}/cmdline").read_bytes()
    environment = Path(f"/proc/{grid.emulator()}/environ").read_bytes()
    for secret in kept.values():
        assert secret.encode() not in command + environment


def test_an_emulator_of_release_0_1_0_is_replaced(tmp_path: Path) -> None:
    """An emulator that does not check signatures ends when a newer manager takes over."""
    python = ministack_python()
    with Emulator(python, tmp_path, orphan_s=60.0) as first:
        old, record = first.pid, tmp_path / "emulator.json"
        fields = json.loads(record.read_text())
        del fields["checks_signatures"]
        record.write_text(json.dumps(fields))
        # The first manager is treated as killed.
        assert first._owner_lock
        assert first._listener
        first._owner_lock.close()
        first._listener.close()
        with Emulator(python, tmp_path) as second:
            assert second.pid != old
            assert not first.is_running()
            assert ask(second.endpoint, "GET", "/")[0] == 403
