"""The requests of the SQS adapter, and its reaction to answers that emulators do not return."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from batchlab.adapters.aws.sqs import _RECEIVES, SqsQueue
from batchlab.core.errors import BackendError, Denied, NotFound, Throttled, TooLarge, Unreachable
from batchlab.core.ports import Depth, Outgoing, QueueSpec
from tests.support.aws.scripted_sqs import Answer, Script, refusal, scripted

LONG_S = 60.0
"""A timeout that only a failed test reaches."""

T = TypeVar("T")
Calls = list[tuple[str, dict[str, Any]]]


def _asked(script: Script, call: Callable[[SqsQueue], Awaitable[T]]) -> tuple[T, Calls]:
    """Return the result of the adapter's call and the requests that it made."""

    async def run() -> tuple[T, Calls]:
        with scripted(script) as (endpoint, calls):
            queue = SqsQueue(endpoint, prefix="grid-")
            try:
                return await call(queue), calls
            finally:
                await queue.close()

    return asyncio.run(run())


def _says(*answer: Any) -> Script:
    return lambda _operation, _sent: (answer[0], answer[1])


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal("QueueDoesNotExist"), NotFound),
        (refusal("AWS.SimpleQueueService.NonExistentQueue"), NotFound),
        (refusal("RequestThrottled"), Throttled),
        (refusal("ThrottlingException"), Throttled),
        (refusal("OverLimit", 403), Throttled),
        (refusal("KmsThrottled"), Throttled),
        (refusal("QueueDeletedRecently"), Throttled),
        (refusal("ServiceUnavailable", 503), Throttled),
        (refusal("InternalFailure", 500), Unreachable),
        ((502, "<html>Bad gateway</html>"), Unreachable),
        (refusal("BatchRequestTooLong"), TooLarge),
        (refusal("AccessDeniedException", 403), Denied),
        (refusal("InvalidClientTokenId", 403), Denied),
        (refusal("UnsupportedOperation"), BackendError),
    ],
)
def test_refusal_suggests_a_remedy(answer: Answer, kind: type[BackendError]) -> None:
    with pytest.raises(BackendError) as caught:
        _asked(_says(*answer), lambda queue: queue.depth("q"))
    assert type(caught.value) is kind
    assert caught.value.__cause__ is not None
    assert "'q'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_denied_caller_is_told_to_check_its_credentials() -> None:
    with pytest.raises(BackendError, match="credentials"):
        _asked(_says(*refusal("AccessDenied", 403)), lambda queue: queue.depth("q"))


def test_each_call_is_made_once() -> None:
    """The callers retry failed calls. A second retry below them would multiply the load on a busy service."""
    calls: Calls = []

    def busy(operation: str, sent: dict[str, Any]) -> Answer:
        calls.append((operation, sent))
        return refusal("ServiceUnavailable", 503)

    with pytest.raises(Throttled):
        _asked(busy, lambda queue: queue.send("q", [Outgoing("a")]))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("failed", "kind"),
    [
        ({"Code": "InternalError", "SenderFault": False}, Throttled),
        ({"Code": "InvalidMessageContents", "SenderFault": True}, BackendError),
        # LocalStack's.
        ({"Code": "InvalidMessageContents", "SenderFault": False}, BackendError),
    ],
)
def test_a_batch_sent_in_part_is_not_sent(failed: dict[str, Any], kind: type[BackendError]) -> None:
    answer = {
        "Successful": [{"Id": "0", "MessageId": "m", "MD5OfMessageBody": "x"}],
        "Failed": [{"Id": "1", "Message": "No.", **failed}],
    }
    with pytest.raises(BackendError, match="No") as caught:
        _asked(_says(200, answer), lambda queue: queue.send("q", [Outgoing("a"), Outgoing("b")]))
    assert type(caught.value) is kind


def test_invalid_receipts_and_service_failures_are_different_errors() -> None:
    def answer(code: str, *, ours: bool) -> Script:
        failed = [{"Id": "1", "Code": code, "SenderFault": ours}]
        return _says(200, {"Successful": [{"Id": "0"}], "Failed": failed})

    for code in ("ReceiptHandleIsInvalid", "InvalidParameterValueException"):
        refused, _ = _asked(answer(code, ours=True), lambda queue: queue.delete("q", ["a", "b"]))
        assert list(refused) == ["b"]
    for call in (
        lambda queue: queue.delete("q", ["a", "b"]),
        lambda queue: queue.change_visibility("q", [("a", 1.0), ("b", 1.0)]),
    ):
        with pytest.raises(Throttled):
            _asked(answer("InternalError", ours=False), call)


def test_one_invalid_receipt_does_not_fail_the_others() -> None:
    def answer(_: str, sent: dict[str, Any]) -> Answer:
        if any(entry["ReceiptHandle"] == "bad" for entry in sent["Entries"]):
            return refusal("ReceiptHandleIsInvalid", 404)
        return 200, {"Successful": [{"Id": entry["Id"]} for entry in sent["Entries"]]}

    refused, calls = _asked(answer, lambda queue: queue.delete("q", ["a", "bad", "b"]))
    assert list(refused) == ["bad"]
    deleted = [[entry["ReceiptHandle"] for entry in sent["Entries"]] for _, sent in calls]
    assert deleted == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]


def test_times_are_whole_seconds_and_rounded_up() -> None:
    def answer(operation: str, _: dict[str, Any]) -> Answer:
        return 200, {"Successful": [], "Messages": []}

    async def calls(queue: SqsQueue) -> None:
        await queue.send("q", [Outgoing("a"), Outgoing("b", 0.2), Outgoing("c", 900)])
        await queue.change_visibility("q", [("a", 0.0), ("b", 0.5), ("c", 43_200.0)])
        await queue.receive("q", wait_s=0, visibility_s=29.5)

    _, asked = _asked(answer, calls)
    assert [entry["DelaySeconds"] for entry in asked[0][1]["Entries"]] == [0, 1, 900]
    assert [entry["VisibilityTimeout"] for entry in asked[1][1]["Entries"]] == [0, 1, 43_200]
    assert asked[2][1]["VisibilityTimeout"] == 30


def test_timeout_above_12_hours_is_refused_without_a_request() -> None:
    def answer(_: str, sent: dict[str, Any]) -> Answer:
        return 200, {"Successful": [{"Id": entry["Id"]} for entry in sent["Entries"]]}

    changes = [("a", 43_201.0), ("b", 1.0)]
    refused, asked = _asked(answer, lambda queue: queue.change_visibility("q", changes))
    assert list(refused) == ["a"]
    assert [entry["ReceiptHandle"] for entry in asked[0][1]["Entries"]] == ["b"]


def test_a_long_wait_is_made_of_short_polls() -> None:
    """A process that ends waits for at most one short request instead of 20 s."""
    _, asked = _asked(_says(200, {}), lambda queue: queue.receive("q", wait_s=4.15))
    assert [sent["WaitTimeSeconds"] for _, sent in asked] == [1, 1, 1, 1, 0, 0, 0]
    _, asked = _asked(_says(200, {}), lambda queue: queue.receive("q", wait_s=0))
    assert [sent["WaitTimeSeconds"] for _, sent in asked] == [0]


def test_receives_that_wait_keep_no_other_call_waiting() -> None:
    arrived, answered = threading.Semaphore(0), threading.Event()

    async def calls(queue: SqsQueue) -> Depth:
        waiting = [asyncio.create_task(queue.receive("q")) for _ in range(_RECEIVES + 8)]
        for _ in range(_RECEIVES):
            assert await asyncio.to_thread(arrived.acquire, timeout=LONG_S)
        try:
            return await asyncio.wait_for(queue.depth("q"), LONG_S)
        finally:
            for one in waiting:
                one.cancel()
            answered.set()
            await asyncio.gather(*waiting, return_exceptions=True)

    def answer(operation: str, _: dict[str, Any]) -> Answer:
        if operation == "ReceiveMessage":
            arrived.release()
            answered.wait()
            return 200, {}
        names = ("", "NotVisible", "Delayed")
        return 200, {"Attributes": {f"ApproximateNumberOfMessages{name}": "0" for name in names}}

    assert _asked(answer, calls)[0] == Depth(0, 0, 0)


def test_empty_batch_sends_no_request() -> None:
    async def calls(queue: SqsQueue) -> None:
        await queue.send("q", [])
        assert list(await queue.delete("q", [])) == []
        assert list(await queue.change_visibility("q", [])) == []

    assert _asked(_says(500, "no"), calls) == (None, [])


def test_a_purge_that_is_under_way_is_a_purge() -> None:
    _asked(_says(*refusal("PurgeQueueInProgress", 403)), lambda queue: queue.purge("q"))


def test_existing_queue_gets_all_attributes_again() -> None:
    def answer(operation: str, _: dict[str, Any]) -> Answer:
        if operation == "CreateQueue":
            return refusal("QueueNameExists")
        return 200, {"Attributes": {"QueueArn": "arn:of-the-dead"}}

    spec = QueueSpec("q", visibility_s=29.5, retention_s=60, dead_letters="dead", max_receives=3)
    _, asked = _asked(answer, lambda queue: queue.ensure(spec))
    assert [operation for operation, _ in asked] == ["GetQueueAttributes", "CreateQueue", "SetQueueAttributes"]
    create, change = asked[1][1], asked[2][1]
    assert create["QueueName"] == "grid-q"
    assert change["QueueUrl"].endswith("/grid-q")
    assert (
        create["Attributes"]
        == change["Attributes"]
        == {
            "VisibilityTimeout": "30",
            "MessageRetentionPeriod": "60",
            # The default limit is 1 MiB, which would hide the limit of a call.
            "MaximumMessageSize": "262144",
            "RedrivePolicy": '{"deadLetterTargetArn": "arn:of-the-dead", "maxReceiveCount": 3}',
        }
    )


def test_nothing_of_the_users_aws_configuration_reaches_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAREAL",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "real-token",
        "AWS_PROFILE": "not-there",
        "AWS_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    counts = {"": 1, "NotVisible": 2, "Delayed": 3}
    attributes = {f"ApproximateNumberOfMessages{name}": str(n) for name, n in counts.items()}
    depth, asked = _asked(_says(200, {"Attributes": attributes}), lambda queue: queue.depth("q"))
    assert depth == Depth(1, 2, 3)
    assert "Credential=test/" in asked[0][1]["authorization"]
    assert "/us-east-1/sqs/" in asked[0][1]["authorization"]
    assert asked[0][1]["token"] is None


def test_a_cancelled_receive_gives_back_what_its_request_still_brings() -> None:
    """A canceled receive returns its messages. Messages that were received just before a shutdown must not stay hidden
    for the full timeout (I6)."""
    message = {
        "MessageId": "m",
        "Body": "a",
        "ReceiptHandle": "held",
        "Attributes": {
            "ApproximateReceiveCount": "1",
            "SentTimestamp": "1000",
            "ApproximateFirstReceiveTimestamp": "2000",
        },
    }

    arrived, answered = threading.Event(), threading.Event()

    def answer(operation: str, sent: dict[str, Any]) -> Answer:
        if operation == "ReceiveMessage":
            arrived.set()
            answered.wait()
            return 200, {"Messages": [message]}
        return 200, {"Successful": [{"Id": "0"}]}

    async def calls(queue: SqsQueue) -> None:
        receive = asyncio.create_task(queue.receive("q"))
        assert await asyncio.to_thread(arrived.wait, LONG_S)
        receive.cancel()
        try:
            # The caller does not wait for the receive's request, which is not answered yet.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(receive, LONG_S)
        finally:
            answered.set()

    _, asked = _asked(answer, calls)
    assert [operation for operation, _ in asked] == ["ReceiveMessage", "ChangeMessageVisibilityBatch"]
    (entry,) = asked[1][1]["Entries"]
    assert (entry["ReceiptHandle"], entry["VisibilityTimeout"]) == ("held", 0)
