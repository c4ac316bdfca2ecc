"""Request rates of MiniStack, and the CPU time of a request in the client and in MiniStack.

The rates are an upper limit for the peers that use SQS or S3. Each request is measured with boto3 in 1, 2, and 8
threads of one process. Sends of one message are also measured with batchlab's own client of SQS.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import boto3
from botocore.config import Config

from batchlab.adapters.aws import sqs_wire
from benchmarks.peers import processes, services
from benchmarks.peers.report import table

BUCKET, REGION = "ceilings", "us-east-1"
BODY = json.dumps({"job": "j" * 16, "task": "noop", "arguments": list(range(64))})
OBJECT = b"x" * 1024
BATCH = [{"Id": str(i), "MessageBody": BODY} for i in range(10)]
THREADS = (1, 2, 8)

Request = Callable[[], object]


def requests(url: str) -> Mapping[str, Request]:
    """Return the requests by name."""
    session = boto3.Session(aws_access_key_id="test", aws_secret_access_key="test", region_name=REGION)
    config = Config(max_pool_connections=16, retries={"max_attempts": 1}, s3={"addressing_style": "path"})
    sqs = session.client("sqs", endpoint_url=url, config=config)
    s3 = session.client("s3", endpoint_url=url, config=config)
    queue, empty = (sqs.create_queue(QueueName=name)["QueueUrl"] for name in ("full", "empty"))
    s3.create_bucket(Bucket=BUCKET)
    s3.put_object(Bucket=BUCKET, Key="get", Body=OBJECT)
    numbers = itertools.count()
    wire = sqs_wire.connect(session, url, loopback=True)
    assert wire

    def receive_and_delete() -> None:
        received = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages", [])
        handles = [{"Id": str(i), "ReceiptHandle": one["ReceiptHandle"]} for i, one in enumerate(received)]
        if handles:
            sqs.delete_message_batch(QueueUrl=queue, Entries=handles)  # type: ignore[arg-type]

    return {
        "send 1 message": lambda: sqs.send_message(QueueUrl=queue, MessageBody=BODY),
        "send 1 message, batchlab's client": lambda: wire.call("SendMessage", {"QueueUrl": queue, "MessageBody": BODY}),
        "send 10 messages": lambda: sqs.send_message_batch(QueueUrl=queue, Entries=BATCH),  # type: ignore[arg-type]
        "receive and delete 10 messages": receive_and_delete,
        "receive from an empty queue": lambda: sqs.receive_message(QueueUrl=empty, MaxNumberOfMessages=10),
        "put 1 KiB": lambda: s3.put_object(Bucket=BUCKET, Key=f"put/{next(numbers)}", Body=OBJECT),
        "get 1 KiB": lambda: s3.get_object(Bucket=BUCKET, Key="get")["Body"].read(),
        "list 1 key": lambda: s3.list_objects_v2(Bucket=BUCKET, Prefix="get"),
    }


def report(venvs: Path, count: int) -> str:
    """Measure all requests at a new MiniStack, and return a table."""
    rows = []
    with services.running({"aws"}, venvs) as started:
        server = started["aws"]
        for name, request in requests(server.url).items():
            found = [measure(request, count, threads, server.pid) for threads in THREADS]
            rates = [f"{rate:,.0f}" for rate, _, _ in found]
            rows.append([name, *rates, *(f"{ms:.2f}" for ms in found[0][1:])])
    head = ["requests a second, by threads", *map(str, THREADS), "client CPU ms", "MiniStack CPU ms"]
    return table(head, rows)


def measure(request: Request, count: int, threads: int, server: int) -> tuple[float, float, float]:
    """Send `count` requests from `threads` threads. Return the rate, and the client's and server's CPU ms a request."""

    def send() -> None:
        for _ in range(count // threads):
            request()

    request()
    senders = [threading.Thread(target=send) for _ in range(threads)]
    wall_s, client_s, server_s = time.perf_counter(), time.process_time(), processes.service_cpu_s(server)
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    sent = count // threads * threads
    rate = sent / (time.perf_counter() - wall_s)
    client_s, server_s = time.process_time() - client_s, processes.service_cpu_s(server) - server_s
    return rate, 1000 * client_s / sent, 1000 * server_s / sent
