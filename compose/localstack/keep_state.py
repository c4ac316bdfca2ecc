"""Init script of LocalStack 4.14 that stores the state of S3 and SQS in a folder, so that a restart loses nothing.

LocalStack runs this script in its own process before it serves requests. The script restores the stored state, and then
changes LocalStack's classes, so that each change is stored.

Invariants: an object or a message is in the folder before another request can see it, and before its writer gets an
answer. The folder never contains a part of a record, because each record is written to another name first. A change
that cannot be stored fails with status 500. If the state cannot be restored, LocalStack exits, so that an empty bucket
never looks like the grid's bucket. Only the settings of buckets and queues are flushed to the disk, so a power loss may
lose the objects and messages of the last seconds, but never a bucket or a queue.

The folder contains:

    s3/buckets/<bucket>                       settings of a bucket
    s3/keys/<bucket>/<hash of the key>        metadata of an object, and the name of the file with its content
    s3/content/<bucket>/<name>                content of an object
    sqs/queues/<account>.<region>.<queue>     attributes and tags of a queue
    sqs/messages/<account>.<region>.<queue>   one file for each message, with its receives

The script does not store unfinished uploads in parts, tags of objects, and the topics of SNS. Buckets cannot have
versions. Messages in flight keep their receipts and visibility timeouts, except in FIFO queues.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import pickle
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

from localstack.constants import VERSION

if not VERSION.startswith("4.14."):
    # LocalStack logs the error and continues.
    raise RuntimeError(f"LocalStack {VERSION} loses its state at a restart. Only LocalStack 4.14 stores its state.")

from localstack.aws.api import CommonServiceException
from localstack.constants import AWS_REGION_US_EAST_1
from localstack.services.plugins import SERVICE_PLUGINS
from localstack.services.s3 import models as s3
from localstack.services.s3.constants import DEFAULT_BUCKET_ENCRYPTION
from localstack.services.s3.storage import ephemeral
from localstack.services.sqs import models as sqs
from localstack.services.sqs.provider import resolve_queue_location

LOG = logging.getLogger("localstack.batchlab")

FOLDER = Path(os.environ.get("BATCHLAB_LOCALSTACK_STATE", "/var/lib/batchlab"))
BUCKETS, KEYS, CONTENT = (FOLDER / "s3" / name for name in ("buckets", "keys", "content"))
QUEUES, MESSAGES = (FOLDER / "sqs" / name for name in ("queues", "messages"))

SETTINGS = threading.RLock()
"""Lock for changes of buckets and queues. Objects and messages have finer locks."""


class DamagedSettingsError(Exception):
    """The settings of a bucket or a queue cannot be read."""


def save(path: Path, record: object) -> None:
    """Write a record atomically."""
    write(path, pickle.dumps(record))


def save_settings(path: Path, settings: object) -> None:
    """Write the settings of a bucket or a queue atomically, and wait until they are on the disk. Write nothing if the
    file has the same settings, because each start of a manager sets all queues."""
    data = pickle.dumps(settings)
    if not path.exists() or path.read_bytes() != data:
        write(path, data, is_flushed=True)
        flush(path.parent)


def write(path: Path, data: bytes, *, is_flushed: bool = False) -> None:
    staged = path.with_name(f".{secrets.token_hex(8)}")
    try:
        staged.write_bytes(data)
        if is_flushed:
            flush(staged)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def records(folder: Path) -> Iterator[tuple[Path, list[Any]]]:
    """Yield the paths of a folder's records, and the values in each record. Delete incomplete records, and truncate
    damaged ones to the last complete value, because later values would be unreadable behind the damage. Raise
    DamagedSettingsError if the record of a bucket or a queue is damaged."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            path.unlink()
            continue
        values: list[Any] = []
        end = 0
        with path.open("rb") as file:
            try:
                while True:
                    values.append(pickle.load(file))  # noqa: S301 - only LocalStack writes the folder
                    end = file.tell()
            except (EOFError, pickle.UnpicklingError):
                is_damaged = not values or end < path.stat().st_size
        if is_damaged and folder in (BUCKETS, QUEUES):
            raise DamagedSettingsError(
                f"{path} is damaged, so LocalStack cannot restore this {'bucket' if folder == BUCKETS else 'queue'}: "
                f"restore the file from a backup, or run `batchlab grid down`, which deletes all objects and messages."
            )
        if is_damaged:
            LOG.warning("a power loss has damaged %s", path)
            os.truncate(path, end)
        if values:
            yield path, values
        else:
            path.unlink()


def replace(kind: type, name: str, method: Callable[..., Any]) -> None:
    """Replace a method of LocalStack by `method`, whose second argument is LocalStack's method."""
    setattr(kind, name, partialmethod(method, getattr(kind, name)))


# --- S3 ------------------------------------------------------------------------------------------


class ContentFile(ephemeral.LockedFileMixin):
    """Content of one object or of one part of an upload, in place of LocalStack's temporary file.

    New content is staged in a file of its own. `keep` replaces the old content by the staged content.
    """

    def __init__(self, dir: str, max_size: int = 0) -> None:  # noqa: A002, ARG002 - LocalStack's names
        super().__init__()
        self._folder = Path(dir)
        self._position = 0
        self.kept: Path | None = None
        self.staged: Path | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        path = self.staged or self.kept
        end = path.stat().st_size if path and whence == os.SEEK_END else 0
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        path = self.staged or self.kept
        if path is None:
            return b""
        with path.open("rb") as file:
            file.seek(self._position)
            data = file.read(size)
        self._position += len(data)
        return data

    def truncate(self, size: int | None = None) -> int:  # noqa: ARG002 - LocalStack removes the whole content only
        """Begin new content."""
        self.close()
        self.staged = self._folder / secrets.token_hex(16)
        self.staged.touch()
        return 0

    def write(self, data: bytes) -> int:
        assert self.staged
        with self.staged.open("ab") as file:
            file.write(data)
        self._position += len(data)
        return len(data)

    def keep(self) -> None:
        self.kept, self.staged = self.staged, None

    def close(self) -> None:
        """Delete the staged content."""
        if self.staged:
            self.staged.unlink(missing_ok=True)
            self.staged = None


class StoredKeys(s3.KeyStore):
    """Objects of one bucket, which are stored before they are visible."""

    def __init__(self, bucket: str) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._keys = KEYS / bucket
        self._content = CONTENT / bucket
        self._keys.mkdir(parents=True, exist_ok=True)
        self._content.mkdir(parents=True, exist_ok=True)

    def set(self, object_key: str, s3_object: s3.S3Object) -> None:
        # A copy of an object to itself changes only the metadata, and has no file.
        file: ContentFile | None = vars(s3_object).pop("file", None)
        with self._lock:
            old = self.get(object_key)
            if file and not file.staged:
                raise RuntimeError(f"another request has replaced the content of {object_key}")
            s3_object.content = file.staged.name if file else old.content
            try:
                save(self._path(object_key), s3_object)
            except BaseException:
                if file:
                    file.close()
                raise
            if file:
                file.keep()
            super().set(object_key, s3_object)
            if old and old.content != s3_object.content:
                (self._content / old.content).unlink(missing_ok=True)

    def pop(self, object_key: str, default: Any = None) -> Any:
        with self._lock:
            if not (s3_object := self.get(object_key)):
                return default
            self._path(object_key).unlink(missing_ok=True)
            (self._content / s3_object.content).unlink(missing_ok=True)
            return super().pop(object_key, default)

    def restore(self) -> int:
        """Read the stored objects, delete content without an object, and return the number of objects."""
        for path, (s3_object,) in records(self._keys):
            content = self._content / s3_object.content
            if not content.is_file() or content.stat().st_size != s3_object.size:
                LOG.warning("a power loss has damaged the object %s", s3_object.key)
                path.unlink()
                continue
            super().set(s3_object.key, s3_object)
        used = {s3_object.content for s3_object in self.values()}
        for left in self._content.iterdir():
            if left.is_dir():
                shutil.rmtree(left)  # parts of an unfinished upload
            elif left.name not in used:
                left.unlink()
        return len(used)

    def _path(self, key: str) -> Path:
        return self._keys / hashlib.sha256(key.encode()).hexdigest()


def save_bucket(bucket: s3.S3Bucket) -> None:
    left_out = {"objects": None, "multiparts": {}}
    save_settings(BUCKETS / bucket.name, {**vars(bucket), **left_out})


def restore_buckets() -> tuple[int, int]:
    """Restore the buckets, and return the numbers of buckets and objects."""
    objects = 0
    paths = [*records(BUCKETS)]
    for path, (fields,) in paths:
        bucket = s3.S3Bucket.__new__(s3.S3Bucket)
        vars(bucket).update(fields)
        if bucket.encryption_rule == DEFAULT_BUCKET_ENCRYPTION:
            bucket.encryption_rule = DEFAULT_BUCKET_ENCRYPTION  # LocalStack compares the identity
        bucket.objects = StoredKeys(path.name)
        objects += bucket.objects.restore()
        store = s3.s3_stores[bucket.bucket_account_id][AWS_REGION_US_EAST_1]
        store.buckets[bucket.name] = bucket
        store.global_bucket_map[bucket.name] = bucket.bucket_account_id
    return len(paths), objects


def new_bucket(bucket: s3.S3Bucket, init: Callable[..., None], *args: Any, **fields: Any) -> None:
    init(bucket, *args, **fields)
    if bucket.versioning_status:
        refuse_versions()
    bucket.objects = StoredKeys(bucket.name)
    save_bucket(bucket)


def open_content(
    store: ephemeral.EphemeralS3ObjectStore,
    open_: Callable[..., Any],
    bucket: str,
    s3_object: s3.S3Object,
    mode: str = "r",
) -> ephemeral.EphemeralS3StoredObject:
    stored = open_(store, bucket, s3_object, mode)
    if mode == "w":
        s3_object.file = stored.file
    elif not stored.file.kept and not stored.file.staged and hasattr(s3_object, "content"):
        stored.file.kept = CONTENT / bucket / s3_object.content
        stored.file.internal_last_modified = s3_object.internal_last_modified
    return stored


def close_content(
    stored: ephemeral.EphemeralS3StoredObject, leave: Callable[..., None], kind: Any = None, *error: Any
) -> None:
    if kind and stored._mode == "w":
        stored.file.close()  # a failed request must not change the object
    leave(stored, kind, *error)


def store_s3() -> None:
    """Change LocalStack's S3 so that each change is stored."""
    replace(s3.S3Bucket, "__init__", new_bucket)
    replace(ephemeral.EphemeralS3ObjectStore, "open", open_content)
    replace(ephemeral.EphemeralS3StoredObject, "__exit__", close_content)
    ephemeral.EphemeralS3ObjectStore.close = lambda _: None  # LocalStack would delete the objects when it stops
    ephemeral.LockedSpooledTemporaryFile = ContentFile
    service = SERVICE_PLUGINS.require("s3")
    service._provider._storage_backend.root_directory = str(CONTENT)
    operations = service.skeleton.dispatch_table
    for name, call in operations.items():
        if re.match("(Create|Put|Delete)(Bucket|PublicAccessBlock)", name):
            operations[name] = partial(change_bucket, call)
    operations["PutBucketVersioning"] = refuse_versions
    operations["CompleteMultipartUpload"] = partial(one_at_a_time, operations["CompleteMultipartUpload"])


def change_bucket(call: Callable[..., Any], context: Any, request: dict[str, Any]) -> Any:
    """Change the settings of a bucket, and store the bucket."""
    name = request["Bucket"]
    with SETTINGS:
        result = call(context, request)
        store = s3.s3_stores[context.account_id][AWS_REGION_US_EAST_1]
        if account := store.global_bucket_map.get(name):
            save_bucket(s3.s3_stores[account][AWS_REGION_US_EAST_1].buckets[name])
        else:
            (BUCKETS / name).unlink(missing_ok=True)
            delete(KEYS / name)
            delete(CONTENT / name)
        return result


def one_at_a_time(call: Callable[..., Any], context: Any, request: dict[str, Any]) -> Any:
    """Complete an upload. LocalStack would mix the contents of two uploads that write one key at the same time."""
    with SETTINGS:
        return call(context, request)


def refuse_versions(*_: Any) -> None:
    raise CommonServiceException("NotImplemented", "This LocalStack does not support versions of objects.", 501)


# --- SQS -----------------------------------------------------------------------------------------


def file_name(queue: sqs.SqsQueue) -> str:
    return f"{queue.account_id}.{queue.region}.{queue.name}"


def message_file(queue: sqs.SqsQueue, message_id: str) -> Path:
    return MESSAGES / file_name(queue) / message_id


def save_queue(queue: sqs.SqsQueue) -> None:
    tags = sqs.sqs_stores[queue.account_id][queue.region].tags.get_tags(queue.arn)
    save_settings(QUEUES / file_name(queue), (dict(queue.attributes), tags))


def append(queue: sqs.SqsQueue, message: sqs.SqsMessage, receipt: str) -> None:
    """Store the last receive and the visibility timeout of a message, unless the message has been deleted. Raise
    OSError if the disk is full."""
    seen = (message.receive_count, message.first_received, message.last_received, message.visibility_deadline, receipt)
    data = pickle.dumps(seen)
    try:
        file = message_file(queue, message.message_id).open("r+b", buffering=0)
    except FileNotFoundError:
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two receives may append at the same time
        end = file.seek(0, os.SEEK_END)
        if file.write(data) != len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def restore_queues() -> tuple[int, int]:
    """Restore the queues, and return the numbers of queues and messages."""
    queues = messages = 0
    for path, ((attributes, tags),) in records(QUEUES):
        account, region, name = path.name.split(".", 2)
        queue = (sqs.FifoQueue if name.endswith(".fifo") else sqs.StandardQueue)(name, region, account)
        queue.attributes = attributes
        if isinstance(queue, sqs.FifoQueue):
            queue.deduplication_scope = attributes["DeduplicationScope"]
        folder = MESSAGES / path.name
        folder.mkdir(exist_ok=True)  # a power loss may have lost a new folder
        found = [values for _, values in records(folder)]
        for (sent_s, message, options), *receives in sorted(found, key=lambda values: values[0][0]):
            restore_message(queue, sent_s, message, options, receives)
        store = sqs.sqs_stores[account][region]
        store.tags.update_tags(queue.arn, tags)
        store.queues[name] = queue
        queues, messages = queues + 1, messages + len(found)
    for folder in MESSAGES.iterdir():
        if not (QUEUES / folder.name).exists():
            delete(folder)  # a deletion of a queue did not end
    return queues, messages


def restore_message(
    queue: sqs.SqsQueue, sent_s: float, message: dict[str, Any], options: dict[str, Any], receives: list[Any]
) -> None:
    standard = isinstance(queue, sqs.StandardQueue)
    if standard:
        delay_s = options.get("delay_seconds")
        delay_s = queue.delay_seconds if delay_s is None else delay_s
        options = {**options, "delay_seconds": sent_s + delay_s - time.time()}  # noqa: TID251
    restored = queue.put(message, **options)
    if not receives:
        return
    count, first_s, last_s, deadline_s, _ = receives[-1]
    restored.receive_count, restored.first_received, restored.last_received = count, first_s, last_s
    restored.message["Attributes"]["ApproximateReceiveCount"] = str(count)
    if standard:
        restored.visibility_deadline = deadline_s
        restored.receipt_handles = {receipt for *_, receipt in receives}
        queue.receipts.update(dict.fromkeys(restored.receipt_handles, restored))
        if not restored.is_visible:
            queue.visible.queue.pop()  # the newest message is the last one in the heap
            queue.add_inflight_message(restored)


def new_queue(queue: sqs.SqsQueue, init: Callable[..., None], *args: Any, **fields: Any) -> None:
    init(queue, *args, **fields)
    (MESSAGES / file_name(queue)).mkdir(exist_ok=True)
    save_queue(queue)


def put_message(queue: sqs.SqsQueue, put: Callable[..., Any], message: dict[str, Any], **options: Any) -> Any:
    path = message_file(queue, message["MessageId"])
    save(path, (time.time(), message, options))  # noqa: TID251
    try:
        result = put(queue, message, **options)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if message["MessageId"] != path.name:
        path.unlink(missing_ok=True)  # a duplicate in a FIFO queue
    if source := message["Attributes"].get("DeadLetterQueueSourceArn"):
        region, account, name = source.split(":")[3:]
        moved_from = MESSAGES / f"{account}.{region}.{name}" / path.name
        if moved_from != path:
            moved_from.unlink(missing_ok=True)
    return result


def receive_messages(queue: sqs.StandardQueue, receive: Callable[..., Any], *args: Any, **options: Any) -> Any:
    result = receive(queue, *args, **options)
    for message, receipt in zip(result.successful, result.receipt_handles, strict=True):
        append(queue, message, receipt)
    return result


def change_visibility(queue: sqs.SqsQueue, change: Callable[..., None], receipt: str, timeout_s: int) -> None:
    with queue.mutex:
        change(queue, receipt, timeout_s)
        append(queue, queue.receipts[receipt], receipt)


def remove_message(queue: sqs.SqsQueue, remove: Callable[..., None], receipt: str) -> None:
    with queue.mutex:
        message = queue.receipts.get(receipt)
        remove(queue, receipt)
        if message:
            message_file(queue, message.message_id).unlink(missing_ok=True)


def purge(queue: sqs.SqsQueue, clear: Callable[..., None]) -> None:
    with queue.mutex:
        clear(queue)
        for path in (MESSAGES / file_name(queue)).iterdir():
            path.unlink(missing_ok=True)


def store_sqs() -> None:
    """Change LocalStack's SQS so that each change is stored."""
    replace(sqs.SqsQueue, "__init__", new_queue)
    replace(sqs.SqsQueue, "clear", purge)
    replace(sqs.SqsQueue, "remove", remove_message)
    replace(sqs.SqsQueue, "update_visibility_timeout", change_visibility)
    replace(sqs.StandardQueue, "receive", receive_messages)
    for kind in (sqs.StandardQueue, sqs.FifoQueue):
        replace(kind, "put", put_message)
    operations = SERVICE_PLUGINS.require("sqs").skeleton.dispatch_table
    for name, call in operations.items():
        if re.fullmatch("(Create|Delete|Tag|Untag)Queue|SetQueueAttributes|(Add|Remove)Permission", name):
            operations[name] = partial(change_queue, call)


def change_queue(call: Callable[..., Any], context: Any, request: dict[str, Any]) -> Any:
    """Change the settings of a queue, and store the queue."""
    with SETTINGS:
        result = call(context, request)
        account, region, name = resolve_queue_location(context, request.get("QueueName"), request.get("QueueUrl"))
        region = region or context.region
        if queue := sqs.sqs_stores[account][region].queues.get(name):
            save_queue(queue)
        else:
            path = QUEUES / f"{account}.{region}.{name}"
            path.unlink(missing_ok=True)
            delete(MESSAGES / path.name)
        return result


def main() -> None:
    try:
        for folder in (BUCKETS, KEYS, CONTENT, QUEUES, MESSAGES):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (FOLDER, BUCKETS.parent, QUEUES.parent):
            flush(folder)
        counts = (*restore_buckets(), *restore_queues())
        store_s3()
        store_sqs()
    except DamagedSettingsError as error:
        LOG.critical("%s", error)
        os._exit(1)
    except BaseException as error:  # noqa: BLE001
        # LocalStack would only log the error, and would then serve an empty bucket.
        LOG.critical("the state in %s cannot be restored: %s: %s", FOLDER, type(error).__name__, error)
        os._exit(1)
    LOG.info("restored %d buckets, %d objects, %d queues, and %d messages", *counts)


main()
