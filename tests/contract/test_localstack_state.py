"""LocalStack with the init script of the backend `localstack`, killed and started again. Nothing may be lost.

The tests share one server, because each start takes seconds of CPU time. Each test has its own bucket and queues.
"""

from __future__ import annotations

import itertools
import resource
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from batchlab.adapters.aws.endpoint import client, code_of
from tests.support.aws.emulators import Server, lasting_localstack, localstack_python
from tests.support.waiting import until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sqs import SQSClient

pytestmark = pytest.mark.slow

LARGE = bytes(range(256)) * 4 * 8192
"""8 MiB, which LocalStack itself would store in a temporary file and not in its memory."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("localstack")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = lasting_localstack(localstack_python(), folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def s3(server: Server) -> Iterator[S3Client]:
    with closing(client(server.endpoint, "s3", connections=8)) as s3:
        yield s3


@pytest.fixture(scope="module")
def sqs(server: Server) -> Iterator[SQSClient]:
    with closing(client(server.endpoint, "sqs", connections=8)) as sqs:
        yield sqs


@pytest.fixture
def bucket(s3: S3Client) -> Iterator[str]:
    """Create a bucket, and delete the bucket with its objects after the test."""
    name = f"kept-{secrets.token_hex(4)}"
    s3.create_bucket(Bucket=name)
    yield name
    for listed in s3.list_objects_v2(Bucket=name).get("Contents", []):
        s3.delete_object(Bucket=name, Key=listed["Key"])
    s3.delete_bucket(Bucket=name)


@pytest.fixture
def url(sqs: SQSClient) -> Iterator[str]:
    """Create a queue, and delete the queue after the test."""
    attributes: dict[Any, str] = {"VisibilityTimeout": "45", "MessageRetentionPeriod": "600"}
    created = sqs.create_queue(QueueName=f"tasks-{secrets.token_hex(4)}", Attributes=attributes, tags={"grid": "g"})
    yield created["QueueUrl"]
    sqs.delete_queue(QueueUrl=created["QueueUrl"])


def restart(server: Server) -> None:
    server.kill()
    server.start()


def queue_file(folder: Path, kind: str, url: str) -> Path:
    """Return the path of a queue's settings (`queues`) or of its messages (`messages`)."""
    return folder / "state/sqs" / kind / f"000000000000.us-east-1.{url.rpartition('/')[2]}"


def seen(s3: S3Client, bucket: str) -> dict[str, Any]:
    """Return everything that a client can see of the objects."""
    found: dict[str, Any] = {}
    for listed in s3.list_objects_v2(Bucket=bucket).get("Contents", []):
        got = s3.get_object(Bucket=bucket, Key=listed["Key"], ChecksumMode="ENABLED")
        facts: dict[str, Any] = {name: value for name, value in got.items() if name != "ResponseMetadata"}
        found[listed["Key"]] = listed, {**facts, "Body": got["Body"].read()}
    return found


def test_objects_survive_a_kill(server: Server, s3: S3Client, bucket: str, folder: Path) -> None:
    upload: Any = {"Bucket": bucket, "Key": "large/ä b"}
    number = s3.create_multipart_upload(**upload, Metadata={"who": "me"})["UploadId"]
    parts: list[Any] = []
    for part in (1, 2):
        etag = s3.upload_part(**upload, UploadId=number, PartNumber=part, Body=LARGE)["ETag"]
        parts.append({"PartNumber": part, "ETag": etag})
    s3.complete_multipart_upload(**upload, UploadId=number, MultipartUpload={"Parts": parts})
    s3.put_object(Bucket=bucket, Key="small", Body=b"old")
    s3.put_object(Bucket=bucket, Key="small", Body=b"new", ContentType="text/plain", Metadata={"a": "b"})
    s3.put_object(Bucket=bucket, Key="empty")
    s3.copy_object(Bucket=bucket, Key="copy", CopySource=f"{bucket}/small")
    for key in ("gone", "also gone"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"x")
    s3.delete_object(Bucket=bucket, Key="gone")
    s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "also gone"}]})
    unfinished = s3.create_multipart_upload(Bucket=bucket, Key="unfinished")["UploadId"]
    s3.upload_part(Bucket=bucket, Key="unfinished", UploadId=unfinished, PartNumber=1, Body=LARGE)
    rules = [{"ID": "r", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 3}}]
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": rules})  # type: ignore[typeddict-item]
    s3.create_bucket(Bucket="passing")
    s3.delete_bucket(Bucket="passing")
    before = seen(s3, bucket)
    assert [*before] == ["copy", "empty", "large/ä b", "small"]

    for _ in range(2):
        restart(server)
        assert seen(s3, bucket) == before
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == [bucket]
    kept = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert [(rule["ID"], rule["Expiration"]) for rule in kept] == [("r", {"Days": 3})]
    # Conditional writes depend on the stored objects.
    with pytest.raises(ClientError) as refused:
        s3.put_object(Bucket=bucket, Key="small", Body=b"x", IfNoneMatch="*")
    assert code_of(refused.value) == "PreconditionFailed"
    s3.put_object(Bucket=bucket, Key="small", Body=b"x", IfMatch=before["small"][0]["ETag"])
    # Each object has one file, and neither the old contents nor the unfinished upload has left one.
    contents = [path for path in (folder / "state/s3/content").rglob("*") if path.is_file()]
    assert len(contents) == len(before)
    assert server.log().count("restored 1 buckets, 4 objects") == 2


def test_queues_and_messages_survive_a_kill(server: Server, sqs: SQSClient, url: str, folder: Path) -> None:
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"VisibilityTimeout": "40"})
    other = sqs.create_queue(QueueName="other")["QueueUrl"]
    passing = sqs.create_queue(QueueName="passing")["QueueUrl"]
    sqs.send_message(QueueUrl=passing, MessageBody="lost with its queue")
    sqs.delete_queue(QueueUrl=passing)
    sqs.send_message(QueueUrl=other, MessageBody="purged")
    sqs.purge_queue(QueueUrl=other)
    entries: list[Any] = [{"Id": str(n), "MessageBody": f"body {n}"} for n in range(10)]
    sent = sqs.send_message_batch(QueueUrl=url, Entries=entries)["Successful"]
    ids = {int(one["Id"]): one["MessageId"] for one in sent}
    first = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=3)["Messages"]
    deleted, held, returned = (message["ReceiptHandle"] for message in first)
    sqs.delete_message(QueueUrl=url, ReceiptHandle=deleted)
    sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=returned, VisibilityTimeout=0)
    delayed = sqs.send_message(QueueUrl=url, MessageBody="delayed", DelaySeconds=15)["MessageId"]

    settings = queue_file(folder, "queues", url)
    written = settings.stat()
    restart(server)
    # The server does not write settings that have not changed.
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"VisibilityTimeout": "40"})
    assert (settings.stat().st_ino, settings.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert {other, url} == {*sqs.list_queues()["QueueUrls"]}
    found: Any = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    assert (found["VisibilityTimeout"], found["MessageRetentionPeriod"]) == ("40", "600")
    assert sqs.list_queue_tags(QueueUrl=url)["Tags"] == {"grid": "g"}
    counts = (
        "ApproximateNumberOfMessages",
        "ApproximateNumberOfMessagesNotVisible",
        "ApproximateNumberOfMessagesDelayed",
    )
    assert [found[name] for name in counts] == ["8", "1", "1"]
    # The receipt of a message in flight is still valid.
    sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=held, VisibilityTimeout=60)
    sqs.delete_message(QueueUrl=url, ReceiptHandle=held)

    got: dict[str, int] = {}

    def receive() -> None:
        answer = sqs.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=10,
            MessageSystemAttributeNames=["ApproximateReceiveCount"],
            WaitTimeSeconds=1,
        )
        for message in answer.get("Messages", []):
            got[message["MessageId"]] = int(message["Attributes"]["ApproximateReceiveCount"])

    def is_received() -> bool:
        receive()
        return delayed in got

    receive()
    again = first[2]["MessageId"]
    assert got == {again: 2} | dict.fromkeys([ids[n] for n in range(3, 10)], 1)
    until(is_received, 20)
    assert sorted(path.name for path in queue_file(folder, "messages", url).iterdir()) == sorted(got)
    assert "restored 0 buckets, 0 objects, 2 queues, and 10 messages" in server.log()
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"VisibilityTimeout": "41"})
    assert settings.stat().st_ino != written.st_ino
    sqs.delete_queue(QueueUrl=other)


def test_acknowledged_writes_survive_a_kill_at_any_moment(
    server: Server, s3: S3Client, bucket: str, sqs: SQSClient, url: str
) -> None:
    """Eight writers put objects and send messages until the server is killed."""
    acknowledged: list[tuple[str, str]] = []

    def write(writer: int) -> None:
        try:
            for n in itertools.count():
                name = f"{writer}-{n}"
                s3.put_object(Bucket=bucket, Key=name, Body=name.encode() * 100, IfNoneMatch="*")
                acknowledged.append(("object", name))
                sqs.send_message(QueueUrl=url, MessageBody=name)
                acknowledged.append(("message", name))
        except (BotoCoreError, ClientError):
            return  # the server is gone

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(acknowledged) > 400, 60)
    server.kill()
    for thread in threads:
        thread.join()
    server.start()
    stored = {("object", key) for key, (_, got) in seen(s3, bucket).items() if got["Body"] == key.encode() * 100}
    while messages := sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", []):
        stored |= {("message", message["Body"]) for message in messages}
    assert {*acknowledged} <= stored


def test_write_that_cannot_be_stored_fails(s3: S3Client, bucket: str, sqs: SQSClient, url: str, folder: Path) -> None:
    s3.put_object(Bucket=bucket, Key="a", Body=b"old")
    stores = (folder / "state/s3/keys" / bucket, queue_file(folder, "messages", url))
    for store in stores:
        store.rename(store.with_name(f"away-{store.name}"))
        store.touch()  # a file in place of the folder
    for write in (
        lambda: s3.put_object(Bucket=bucket, Key="a", Body=b"new"),
        lambda: sqs.send_message(QueueUrl=url, MessageBody="m"),
    ):
        with pytest.raises(ClientError) as failed:
            write()
        assert failed.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
    assert s3.get_object(Bucket=bucket, Key="a")["Body"].read() == b"old"
    assert not sqs.receive_message(QueueUrl=url).get("Messages")
    for store in stores:
        store.unlink()
        store.with_name(f"away-{store.name}").rename(store)


def test_damaged_state_stops_localstack_and_deletes_nothing(
    server: Server, s3: S3Client, bucket: str, sqs: SQSClient, url: str, folder: Path
) -> None:
    sqs.send_message(QueueUrl=url, MessageBody="m")
    s3.put_object(Bucket=bucket, Key="a", Body=b"x")
    server.kill()
    unreadable = folder / "state/s3/buckets/b"
    unreadable.mkdir()
    with pytest.raises(pytest.fail.Exception, match="cannot be restored"):
        server.start()
    unreadable.rmdir()
    of_bucket, of_queue = folder / "state/s3/buckets" / bucket, queue_file(folder, "queues", url)
    # One function reads the settings of buckets and of queues.
    for path, damage in (
        (of_bucket, lambda settings: settings[:-1]),
        (of_bucket, lambda settings: settings + b"x"),
        (of_queue, lambda _: b""),
    ):
        settings = path.read_bytes()
        path.write_bytes(damage(settings))
        with pytest.raises(pytest.fail.Exception, match=f"{path} is damaged, .* restore the file from a backup"):
            server.start()
        path.write_bytes(settings)
    server.start()
    assert [*seen(s3, bucket)] == ["a"]
    assert sqs.receive_message(QueueUrl=url)["Messages"][0]["Body"] == "m"


def test_receives_after_an_incomplete_record_are_restored(
    server: Server, sqs: SQSClient, url: str, folder: Path
) -> None:
    """A power loss leaves a part of a record, and the disk is full during a receive."""
    sqs.send_message(QueueUrl=url, MessageBody="m" * 2**18)

    def receives() -> int:
        answer = sqs.receive_message(
            QueueUrl=url, VisibilityTimeout=0, MessageSystemAttributeNames=["ApproximateReceiveCount"]
        )
        return int(answer["Messages"][0]["Attributes"]["ApproximateReceiveCount"])

    (path,) = queue_file(folder, "messages", url).iterdir()
    sent = path.stat().st_size
    assert receives() == 1
    whole = path.stat().st_size
    server.kill()
    with path.open("ab") as file:
        file.write(path.read_bytes()[sent : whole - 5])
    server.start()
    assert path.stat().st_size == whole
    assert receives() == 2

    before = path.read_bytes()
    with full_disk(server, len(before) + 10), pytest.raises(ClientError) as failed:
        receives()
    assert failed.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
    assert path.read_bytes() == before
    count = receives()
    restart(server)
    assert receives() == count + 1


@contextmanager
def full_disk(server: Server, size: int) -> Iterator[None]:
    """Let LocalStack write only a part of each file, with the length `size`."""
    if sys.platform != "linux":
        pytest.skip("only Linux can limit the files of another process")
    assert server._process is not None
    limits = resource.prlimit(server._process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server._process.pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(server._process.pid, resource.RLIMIT_FSIZE, limits)


def test_other_version_says_that_it_loses_its_state(tmp_path: Path) -> None:
    server = lasting_localstack(localstack_python(), tmp_path)
    script = tmp_path / "root/etc/localstack/init/start.d/keep_state.py"
    text = script.read_text()
    script.unlink()
    script.write_text(text.replace('"4.14."', '"4.13."'))
    try:
        server.start()
        assert "loses its state at a restart" in server.log()
    finally:
        server.kill()
