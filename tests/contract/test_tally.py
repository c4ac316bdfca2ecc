"""The adapters' counts of requests, compared with the counts of a proxy."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.objects import open_s3
from batchlab.adapters.aws.sqs import SqsQueue
from batchlab.core.errors import NotFound
from batchlab.core.ports import Message, Objects, Outgoing, QueueSpec
from batchlab.core.pricing.request_costs import STEP_BYTES, RequestCounter, Requests
from tests.support.conform.proxy import Request, Response, Send, proxy

SPEC = QueueSpec("work", visibility_s=30.0)


class Wire:
    """A proxy that counts requests by AWS's billing rules."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, request: Request, send: Send) -> Response:
        answer = send(request)
        if request.action:
            bodies = [entry.get("MessageBody", "") for entry in request_entries(request)]
            found = received(answer) if request.action == "ReceiveMessage" else []
            size = sum(len(body.encode()) for body in (*bodies, *found))
            self.counts["sqs_bytes"] += size
            self.counts["sqs"] += max(1, -(-size // STEP_BYTES))
            self.counts["sqs_empty"] += request.action == "ReceiveMessage" and not found
        elif _is_put(request):
            self.counts["s3_puts"] += 1
        elif request.method in ("GET", "HEAD"):
            self.counts["s3_gets"] += 1
        else:
            self.counts["s3_deletes"] += 1
        return answer

    def read(self) -> Requests:
        return Requests(**self.counts)


def _is_put(request: Request) -> bool:
    """Return whether a request is billed as a PUT. PUT, POST, and LIST cost the same. DeleteObjects is a POST without a
    charge."""
    if request.method == "GET":
        return "list-type" in request.query
    return request.method in ("PUT", "POST") and "delete" not in request.query


def request_entries(request: Request) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = request.json.get("Entries", [])
    return entries


def received(answer: Response) -> list[str]:
    return [one["Body"] for one in json.loads(answer.body or b"{}").get("Messages") or ()]


@pytest.fixture
def endpoint(ministack: Endpoint) -> Endpoint:
    return ministack


def test_sqs_is_counted_in_steps_with_its_empty_receives(endpoint: Endpoint) -> None:
    wire, tally = Wire(), RequestCounter()

    async def act(url: str) -> None:
        queue = SqsQueue(Endpoint(url), prefix="tally-", tally=tally)
        await queue.ensure(SPEC)
        await queue.send("work", [Outgoing("small"), Outgoing("ä" * 10)])
        await queue.send("work", [Outgoing("x" * 50_000) for _ in range(4)])  # 200 KB are 4 steps
        taken: list[Message] = []
        while len(taken) < 6:
            taken += await queue.receive("work", wait_s=1.0)
        await queue.change_visibility("work", [(taken[0].receipt, 5.0)])
        await queue.delete("work", [message.receipt for message in taken])
        assert not await queue.receive("work", wait_s=2.0)
        await queue.depth("work")
        await queue.remove("work")
        await queue.close()

    with proxy(str(endpoint.url), wire) as url:
        asyncio.run(act(url))
    counted = tally.read()
    assert counted == wire.read()
    assert counted.sqs_empty >= 2
    assert counted.sqs >= 4 + 4


def test_s3_is_counted_by_what_a_request_costs(endpoint: Endpoint, tmp_path: Path) -> None:
    wire, tally = Wire(), RequestCounter()
    large = tmp_path / "large"
    large.write_bytes(b"x" * (20 * 1024 * 1024))

    async def act(objects: Objects) -> None:
        await objects.put("a/1", b"one")
        etag = await objects.put("a/2", b"two", if_absent=True)
        await objects.put("a/2", b"zwei", if_match=etag)
        await objects.put("a/six", b"x" * (6 * 1024 * 1024))
        await objects.get("a/1")
        await objects.get_range("a/1", 0, 2)
        found = await objects.get_if_changed("a/1", None)
        assert found
        assert await objects.get_if_changed("a/1", found[1]) is None
        with pytest.raises(NotFound):
            await objects.get("a/none")
        assert await objects.head("a/none") is None
        await objects.upload("a/large", large)
        await objects.download("a/large", tmp_path / "again")
        assert len([info async for page in objects.list("a/") for info in page]) == 4
        await objects.delete(["a/1", "a/2", "a/six", "a/large"])

    with proxy(str(endpoint.url), wire) as url:
        made = open_s3(Endpoint(url), "tally")
        asyncio.run(made.put("first", b"the bucket is made by this"))
        wire.counts.clear()
        asyncio.run(act(open_s3(Endpoint(url), "tally", tally)))
    assert tally.read() == wire.read()
