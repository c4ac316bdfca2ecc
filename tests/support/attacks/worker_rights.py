"""A compromised worker of the pool `default`, which has the bucket and the queues of a grid and the rights of a
worker's role.

The rights are read from the stack template.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from batchlab.core.ports import Message, Objects, Outgoing, Queue
from batchlab.core.protocol import object_keys
from tests.support.aws import cfn
from tests.support.aws.stack_shapes import RELEASE
from tests.support.grid.local_grid import LocalGrid

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Forbidden(PermissionError):
    """The worker's role does not allow the request."""


class WorkerRights:
    """Blocking requests to a grid's bucket and queues. Each request is first checked against the worker's role."""

    def __init__(self, objects: Objects, queue: Queue, run: Run) -> None:
        """`run` runs a coroutine in the event loop of both ports."""
        self._objects = objects
        self._queue = queue
        self._run = run

    # --- Bucket ----------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """Return the content of an object. Raise NotFound if the object does not exist."""
        _check("s3:GetObject", _object_arn(key))
        return self._await(self._objects.get(key))

    def readable(self) -> dict[str, bytes]:
        """Return all objects that the worker's role may read, by key."""
        return {one: self.get(one) for one in self.list() if _allows("s3:GetObject", _object_arn(one))}

    def put(self, key: str, data: bytes | str, *, if_absent: bool = False) -> None:
        """Store an object. Raise AlreadyExists if the object exists and `if_absent` is true."""
        _check("s3:PutObject", _object_arn(key))
        if not if_absent and any(one.fullmatch(_object_arn(key)) for one in _write_once()):
            raise Forbidden(f"s3:PutObject without a condition on {key}")
        content = data.encode() if isinstance(data, str) else data
        self._await(self._objects.put(key, content, if_absent=if_absent))

    def remove(self, key: str) -> None:
        """Delete an object."""
        _check("s3:DeleteObject", _object_arn(key))
        self._await(self._objects.delete([key]))

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with a prefix."""
        _check("s3:ListBucket", "<Bucket.Arn>")

        async def listed() -> list[str]:
            return [one.key async for page in self._objects.list(prefix) for one in page]

        return self._await(listed())

    # --- Queues ----------------------------------------------------------------------------------

    def send(self, queue: str, *bodies: str) -> None:
        """Send messages."""
        _check("sqs:SendMessage", *_queue_arns(queue))

        async def sent() -> None:
            for body in bodies:
                await self._queue.send(queue, [Outgoing(body)])

        self._await(sent())

    def send_events(self, *bodies: str) -> None:
        """Send messages to the queue of the manager."""
        self.send(object_keys.EVENTS, *bodies)

    def receive(self, queue: str, *, wait_s: float = 0.0, most: int = 10) -> Sequence[Message]:
        """Receive messages."""
        _check("sqs:ReceiveMessage", *_queue_arns(queue))
        return self._await(self._queue.receive(queue, max_messages=most, wait_s=wait_s))

    def delete(self, queue: str, *receipts: str) -> None:
        """Delete received messages."""
        _check("sqs:DeleteMessage", *_queue_arns(queue))
        self._await(self._queue.delete(queue, receipts))

    def release(self, queue: str, *receipts: str) -> None:
        """Make received messages visible again at once."""
        _check("sqs:ChangeMessageVisibility", *_queue_arns(queue))
        self._await(self._queue.change_visibility(queue, [(receipt, 0.0) for receipt in receipts]))

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        found: T = self._run(work)
        return found


def actions() -> set[str]:
    """Return the actions that the worker's role allows on any resource."""
    return {action for action, statements in _rights().items() if any(effect == "Allow" for effect, _ in statements)}


@contextmanager
def worker_of(grid: LocalGrid) -> Iterator[WorkerRights]:
    """Yield a compromised worker of a real grid, on any backend."""
    with asyncio.Runner() as runner:
        queue = grid.backend.open_queue(grid.home, grid.backend.open_clock())
        try:
            yield WorkerRights(grid.objects, queue, runner.run)
        finally:
            runner.run(queue.close())


def _check(action: str, *resources: str) -> None:
    if not _allows(action, *resources):
        raise Forbidden(f"{action} on {resources[0]}")


def _allows(action: str, *resources: str) -> bool:
    effects = {effect for effect, pattern in _rights().get(action, ()) if any(map(pattern.fullmatch, resources))}
    return effects == {"Allow"}


def _object_arn(key: str) -> str:
    return f"<Bucket.Arn>/{key}"


def _queue_arns(queue: str) -> tuple[str, ...]:
    """Return the ARN patterns that the template's policies use for a queue."""
    arn = f"arn:aws:sqs:us-east-1:123456789012:batchlab-{queue}"
    references = {object_keys.EVENTS: "EventsQueue", object_keys.tasks_queue("default"): "PoolTasks"}
    return (arn, f"<{references[queue]}.Arn>") if queue in references else (arn,)


@cache
def _write_once() -> list[re.Pattern[str]]:
    """Return patterns of the object keys that the bucket's policy protects from overwriting."""
    policy = cfn.Rendered(cfn.load(), Release=RELEASE).properties("BucketPolicy")["PolicyDocument"]
    (found,) = (one for one in policy["Statement"] if one["Sid"] == "CommitsAreConditional")
    return [_pattern(resource) for resource in cfn.as_list(found["Resource"])]


def _pattern(resource: str) -> re.Pattern[str]:
    text = re.escape(resource).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(text, re.DOTALL)


@cache
def _rights() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the effects and the resource patterns of the worker role's statements, by action."""
    role = cfn.Rendered(cfn.load(), Release=RELEASE).properties("PoolRole")
    rights: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for statement in cfn.statements(role):
        actions = cfn.as_list(statement["Action"])
        if actions == ["sqs:*"]:
            actions = [action for action in rights if action.startswith("sqs:")]
        for action in actions:
            for resource in cfn.as_list(statement["Resource"]):
                rights.setdefault(action, []).append((statement["Effect"], _pattern(resource)))
    return rights
