"""Queue port over SQS, on AWS or at an emulator's endpoint: `SqsQueue(endpoint, prefix="grid-")`.

Invariant: each message that this process receives from SQS is returned to a caller, or made visible again immediately.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from botocore import xform_name
from botocore.exceptions import ClientError

from batchlab.adapters.aws.endpoint import Endpoint, client, code_of, session_of, short_code, translate_errors
from batchlab.adapters.aws.sqs_wire import connect
from batchlab.adapters.limits import body_bytes, check_batch, check_changes, check_queue_name, check_receive, check_send
from batchlab.adapters.local.local_wakeup_queue import IdleTime
from batchlab.core.errors import BackendError, NotFound, Throttled
from batchlab.core.ports import MAX_MESSAGE_BYTES, Depth, Message, Outgoing, QueueSpec
from batchlab.core.pricing.request_costs import RequestCounter
from batchlab.core.service_settings import MAX_VISIBILITY_S

if TYPE_CHECKING:
    from mypy_boto3_sqs.literals import QueueAttributeNameType
    from mypy_boto3_sqs.type_defs import BatchResultErrorEntryTypeDef, MessageTypeDef

T = TypeVar("T")

BILLED_POLL_S = 5
IDLE_POLL_S = 20
FREE_POLL_S = 1
"""Duration of one request of a long poll in seconds.

A long-poll request to an emulator lasts `FREE_POLL_S`. AWS bills each request, so a long-poll request to AWS lasts
`BILLED_POLL_S`. After `IDLE_AFTER_S` seconds without a message, a long-poll request to AWS lasts `IDLE_POLL_S`.

A long-poll request that has been sent cannot be canceled. The process cannot exit while a long-poll request is open. If
the process is killed, the next messages go to the lost request and stay hidden for their visibility timeout.
"""

IDLE_AFTER_S = 20.0

_FRACTION_S = 0.1
"""Interval of polls in seconds for a wait below one second, because SQS accepts only whole seconds."""

_ATTRIBUTES = ["ApproximateReceiveCount", "SentTimestamp", "ApproximateFirstReceiveTimestamp"]
_RECEIVES = 32
_CALLS = 16

# Codes of SQS and its emulators for a receipt that does not belong to a message in flight.
_BAD_RECEIPT = {"InvalidParameterValue", "MessageNotInflight", "MissingParameter", "ReceiptHandleIsInvalid"}
# LocalStack reports InvalidMessageContents as a server error, although the body of the message causes the error.
_BAD_BODY = {"InvalidMessageContents"}


class SqsQueue:
    """Queue port over SQS. The name of a queue in SQS is `prefix` followed by the name that batchlab uses.

    An SQS call blocks its thread, so the queue makes SQS calls in separate threads. At most 32 receives run at once, in
    their own threads, so receives do not delay other calls. SQS supports only whole seconds, so times are rounded up.
    """

    def __init__(
        self, endpoint: Endpoint, *, prefix: str = "", makes: bool = True, tally: RequestCounter | None = None
    ) -> None:
        """With `makes`, `ensure` creates missing queues. Without `makes`, a stack must have created the queues.

        `tally` counts every request, also failed requests, because AWS bills failed requests too.
        """
        self._makes = makes
        session = session_of(endpoint)
        self._sqs = client(endpoint, "sqs", connections=_RECEIVES + _CALLS, of=session)
        with translate_errors("AWS"):
            self._wire = connect(session, self._sqs.meta.endpoint_url, loopback=bool(endpoint.loopback))
        self._prefix = prefix
        self._tally = tally or RequestCounter()
        self._is_billed = endpoint.url is None
        self._idle_times: dict[str, IdleTime] = {}
        self._urls: dict[str, str] = {}
        self._receivers = ThreadPoolExecutor(_RECEIVES, thread_name_prefix="sqs-receive")
        self._callers = ThreadPoolExecutor(_CALLS, thread_name_prefix="sqs")

    async def close(self) -> None:
        """Wait for the submitted calls, then end the threads and close the connections."""
        await asyncio.to_thread(self._receivers.shutdown)
        await asyncio.to_thread(self._callers.shutdown)
        self._sqs.close()
        if self._wire:
            self._wire.close()

    def _call(self, operation: str, request: Mapping[str, Any]) -> Any:
        """Call an SQS operation over `SqsWire` if possible, else over boto3.

        An SQS operation over boto3 takes three times the CPU time of `SqsWire`, so the operations for every message use
        `_call`.
        """
        if self._wire:
            return self._wire.call(operation, request)
        return getattr(self._sqs, xform_name(operation))(**request)

    async def _run(self, queue: str, call: Callable[[str], T]) -> T:
        return await asyncio.wrap_future(self._callers.submit(self._at, queue, call))

    def _at(self, queue: str, call: Callable[[str], T]) -> T:
        """Return the result of `call`, which gets the queue's url."""
        try:
            with translate_errors(f"Queue {queue!r}"):
                url = self._urls.get(queue)
                if url is None:
                    self._tally.sqs()
                    url = self._sqs.get_queue_url(QueueName=self._prefix + queue)["QueueUrl"]
                    self._urls[queue] = url
                return call(url)
        except NotFound:
            self._urls.pop(queue, None)
            raise

    async def ensure(self, spec: QueueSpec) -> None:
        check_queue_name(self._prefix + spec.name)
        if not self._makes:
            await self._check_exists(spec.name)
            return
        redrive = ""
        if spec.dead_letters is not None:
            arn = await self._run(spec.dead_letters, self._arn)
            redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": spec.max_receives})
        await asyncio.wrap_future(self._callers.submit(self._ensure, spec, redrive))

    async def _check_exists(self, queue: str) -> None:
        try:
            await self._run(queue, lambda url: url)
        except NotFound as error:
            # The error is not NotFound, because the caller would create a queue after NotFound.
            raise BackendError(
                f"The queue {self._prefix + queue!r} does not exist.",
                remedy="Create it with the grid's stack: `batchlab deploy apply`.",
            ) from error

    def _arn(self, url: str) -> str:
        self._tally.sqs()
        answer = self._sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        return answer["Attributes"]["QueueArn"]

    def _ensure(self, spec: QueueSpec, redrive: str) -> None:
        wanted: dict[QueueAttributeNameType, str] = {
            "VisibilityTimeout": str(math.ceil(spec.visibility_s)),
            "MessageRetentionPeriod": str(math.ceil(spec.retention_s)),
            "MaximumMessageSize": str(MAX_MESSAGE_BYTES),
        }
        if redrive:
            wanted["RedrivePolicy"] = redrive
        with translate_errors(f"Queue {spec.name!r}"):
            try:
                self._tally.sqs()
                answer = self._sqs.create_queue(QueueName=self._prefix + spec.name, Attributes=wanted)
                self._urls[spec.name] = answer["QueueUrl"]
                if redrive:
                    return
            except ClientError as error:
                if code_of(error) not in ("QueueNameExists", "QueueAlreadyExists"):
                    raise
        # The queue exists with other attributes, or may have a redrive policy that must be removed. CreateQueue does
        # not compare attributes that a request leaves out.
        wanted["RedrivePolicy"] = redrive
        self._tally.sqs()
        self._at(spec.name, lambda url: self._sqs.set_queue_attributes(QueueUrl=url, Attributes=wanted))

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        check_send(messages)
        if messages:
            await self._run(queue, lambda url: self._send(url, messages))

    def _send(self, url: str, messages: Sequence[Outgoing]) -> None:
        self._tally.sqs(sum(body_bytes(message.body) for message in messages))
        entries = [
            {"Id": str(number), "MessageBody": message.body, "DelaySeconds": math.ceil(message.delay_s)}
            for number, message in enumerate(messages)
        ]
        for failed in self._call("SendMessageBatch", {"QueueUrl": url, "Entries": entries}).get("Failed", ()):
            raise _failure(failed)

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s)
        whole_s, fraction_s = divmod(wait_s, 1)
        clock = asyncio.get_running_loop().time
        while whole_s:
            idle_time = self._idle_times.setdefault(queue, IdleTime(clock()))
            poll_s = min(whole_s, self._poll_s(idle_time.idle_s(clock())))
            if messages := await self._receive(queue, max_messages, int(poll_s), visibility_s):
                idle_time.halve(clock())
                return messages
            whole_s -= poll_s
        while not (messages := await self._receive(queue, max_messages, 0, visibility_s)):
            if fraction_s <= 0:
                break
            await asyncio.sleep(min(fraction_s, _FRACTION_S))
            fraction_s -= _FRACTION_S
        return messages

    def _poll_s(self, idle_s: float) -> int:
        if not self._is_billed:
            return FREE_POLL_S
        return IDLE_POLL_S if idle_s > IDLE_AFTER_S else BILLED_POLL_S

    async def _receive(self, queue: str, limit: int, poll_s: int, visibility_s: float | None) -> list[Message]:
        receiving = self._receivers.submit(
            self._at, queue, lambda url: self._receive_now(url, limit, poll_s, visibility_s)
        )
        try:
            return await asyncio.wrap_future(receiving)
        except asyncio.CancelledError:
            # The receive request continues after the cancellation, and the received messages would stay hidden for a
            # visibility timeout. `_return_messages` is submitted now, because the threads of an ending process do not
            # accept new calls.
            self._receivers.submit(self._return_messages, queue, receiving)
            raise

    def _receive_now(self, url: str, limit: int, poll_s: int, visibility_s: float | None) -> list[Message]:
        request = {
            "QueueUrl": url,
            "MaxNumberOfMessages": limit,
            "WaitTimeSeconds": poll_s,
            "MessageSystemAttributeNames": _ATTRIBUTES,
        }
        if visibility_s is not None:
            request["VisibilityTimeout"] = math.ceil(visibility_s)
        try:
            received: list[MessageTypeDef] = self._call("ReceiveMessage", request).get("Messages", [])
        except BaseException:
            self._tally.received(0, 0)
            raise
        self._tally.received(sum(body_bytes(message["Body"]) for message in received), len(received))
        return [_message(message) for message in received]

    def _return_messages(self, queue: str, receiving: Future[list[Message]]) -> None:
        try:
            if messages := receiving.result():
                changes = [(message.receipt, 0.0) for message in messages]
                self._at(queue, lambda url: self._change(url, changes))
        except (concurrent.futures.CancelledError, BackendError):
            # No message is lost: the receive was empty, or its messages become visible at their visibility timeout.
            return

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        check_batch(receipts)
        return await self._run(queue, lambda url: self._delete(url, receipts))

    def _delete(self, url: str, receipts: Sequence[str]) -> list[str]:
        return self._failed_ids("DeleteMessageBatch", url, [{"ReceiptHandle": receipt} for receipt in receipts])

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        check_changes(changes)
        return await self._run(queue, lambda url: self._change(url, changes))

    def _change(self, url: str, changes: Sequence[tuple[str, float]]) -> list[str]:
        # Some emulators ignore the maximum number of messages.
        too_long = [receipt for receipt, visibility_s in changes if visibility_s > MAX_VISIBILITY_S]
        entries = [
            {"ReceiptHandle": receipt, "VisibilityTimeout": math.ceil(visibility_s)}
            for receipt, visibility_s in changes
            if visibility_s <= MAX_VISIBILITY_S
        ]
        return too_long + self._failed_ids("ChangeMessageVisibilityBatch", url, entries)

    def _failed_ids(self, operation: str, url: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
        """Call the batch operation of SQS. Return the receipts that SQS refuses."""
        if not entries:
            return []
        self._tally.sqs()
        numbered = [{"Id": str(number), **entry} for number, entry in enumerate(entries)]
        try:
            failures = self._call(operation, {"QueueUrl": url, "Entries": numbered}).get("Failed", ())
        except ClientError as error:
            if code_of(error) not in _BAD_RECEIPT:
                raise
            if len(entries) == 1:
                return [entries[0]["ReceiptHandle"]]
            # One invalid receipt made the batch request fail for all entries, so each entry is now sent in its own
            # request.
            return [receipt for entry in entries for receipt in self._failed_ids(operation, url, [entry])]
        for failed in failures:
            if short_code(failed["Code"]) not in _BAD_RECEIPT:
                raise _failure(failed)
        return [entries[int(failed["Id"])]["ReceiptHandle"] for failed in failures]

    async def depth(self, queue: str) -> Depth:
        return await self._run(queue, self._depth)

    def _depth(self, url: str) -> Depth:
        self._tally.sqs()
        names: list[QueueAttributeNameType] = [
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
        ]
        answer = self._sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)
        return Depth(*(int(answer["Attributes"][name]) for name in names))

    async def purge(self, queue: str) -> None:
        await self._run(queue, self._purge)

    def _purge(self, url: str) -> None:
        self._tally.sqs()
        try:
            self._sqs.purge_queue(QueueUrl=url)
        except ClientError as error:
            if code_of(error) != "PurgeQueueInProgress":
                raise

    async def remove(self, queue: str) -> None:
        try:
            self._tally.sqs()
            await self._run(queue, lambda url: self._sqs.delete_queue(QueueUrl=url))
        except NotFound:
            return


def _message(received: MessageTypeDef) -> Message:
    facts = received["Attributes"]
    return Message(
        id=received["MessageId"],
        body=received["Body"],
        receipt=received["ReceiptHandle"],
        receive_count=int(facts["ApproximateReceiveCount"]),
        sent_s=int(facts["SentTimestamp"]) / 1000,
        first_received_s=int(facts["ApproximateFirstReceiveTimestamp"]) / 1000,
    )


def _failure(failed: BatchResultErrorEntryTypeDef) -> BackendError:
    ours = failed["SenderFault"] or short_code(failed["Code"]) in _BAD_BODY
    text = (failed.get("Message") or failed["Code"]).rstrip(".")
    return (BackendError if ours else Throttled)(f"SQS refused a part of a call: {text}.")
