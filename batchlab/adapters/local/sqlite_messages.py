"""Queues and messages in one SQLite file. Each call on the queue file is one transaction.

Invariant: after SIGKILL at any time, a message is in exactly one queue or deleted. Every query reads one range of one
index, so its time does not depend on the depth of the queues.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from batchlab.adapters.limits import MAX_IN_FLIGHT
from batchlab.core.atomic_write import make_private, private
from batchlab.core.errors import BackendError, NotFound, Throttled, Unreachable
from batchlab.core.ports import Clock, Depth, Message, Outgoing, QueueSpec
from batchlab.core.service_settings import MAX_VISIBILITY_S

_BUSY_S = 10.0
_AT_ONCE_S = 0.01
_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB
_DROPPED_AT_ONCE = 1000

# AUTOINCREMENT keeps the ids of rows unique, because a receipt contains the id of its row. A message with `visible_s`
# in the future is in flight if the message has been received, and delayed otherwise. The column `total` lets `depth`
# skip a count of the visible messages, which may be a million.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS queues (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    visibility_s REAL NOT NULL,
    retention_s REAL NOT NULL,
    dead_letters TEXT,
    max_receives INTEGER NOT NULL,
    total INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue INTEGER NOT NULL,
    visible_s REAL NOT NULL,
    receives INTEGER NOT NULL DEFAULT 0,
    sent_s REAL NOT NULL,
    received_s REAL,
    first_received_s REAL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS due ON messages (queue, visible_s, receives);
"""

_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    # SQLite's write-ahead log must shrink again after a purge of a million messages.
    "PRAGMA journal_size_limit = 67108864",
    # A checkpoint every 4,096 pages (16 MiB) is four times the default interval. Checkpoints wait for the disk, so
    # longer intervals are better.
    "PRAGMA wal_autocheckpoint = 4096",
)

_PROBE = """
SELECT id, visibility_s, retention_s, dead_letters, max_receives, total,
    (SELECT visible_s FROM messages WHERE queue = queues.id ORDER BY visible_s LIMIT 1)
FROM queues WHERE name = ?
"""
_VISIBLE = """
SELECT id, receives, sent_s, first_received_s, body FROM messages
WHERE queue = ? AND visible_s <= ? ORDER BY visible_s
"""
_EXPIRE = """
DELETE FROM messages WHERE id IN
    (SELECT id FROM messages WHERE queue = ? AND visible_s <= ? ORDER BY visible_s LIMIT 10000)
"""
_DEPTH = """
SELECT total, (SELECT count(*) FROM messages WHERE queue = queues.id AND visible_s > ?),
    (SELECT count(*) FROM messages WHERE queue = queues.id AND visible_s > ? AND receives > 0)
FROM queues WHERE id = ?
"""
_IN_FLIGHT = "SELECT count(*) FROM messages WHERE queue = ? AND visible_s > ? AND receives > 0"


@dataclass(frozen=True, slots=True)
class ReceiveResult:
    """Result of a receive. `due_in_s` is the time until the next message becomes visible, or None.

    `moved` is the number of messages that moved to `dead_letters`. `more` means that the receive may have left further
    messages to move or to drop.
    """

    messages: Sequence[Message] = ()
    due_in_s: float | None = None
    more: bool = False
    dead_letters: str | None = None
    moved: int = 0
    over_limit: bool = False


class _Queue:
    """A row of the table `queues`, with the time at which its first message is or becomes visible."""

    __slots__ = ("dead_letters", "first_s", "id", "max_receives", "retention_s", "total", "visibility_s")

    def __init__(self, row: tuple[int, float, float, str | None, int, int, float | None]) -> None:
        (
            self.id,
            self.visibility_s,
            self.retention_s,
            self.dead_letters,
            self.max_receives,
            self.total,
            self.first_s,
        ) = row


class SqliteMessages:
    """One connection to the queue file, for one call at a time.

    A call waits while another process holds the lock of the queue file. Within `at_once`, a call raises Throttled
    instead of waiting, and changes nothing.
    """

    def __init__(self, path: Path, clock: Clock, *, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._path = path
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._connection: sqlite3.Connection | None = None
        self._turn = -1
        self._waits = self._has_patience = True
        """Whether calls wait for the queue file's lock, and whether the SQLite connection is set to wait.

        The setting of the SQLite connection is changed only if a call needs the other setting.
        """

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the calls in the context raise Throttled instead of waiting. The queue file must already be open."""
        self._waits = False
        try:
            yield
        finally:
            self._waits = True

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._turn >= 0:
            os.close(self._turn)
            self._turn = -1

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._turn < 0:
                self._turn = private(f"{self._path}-turn", os.O_CREAT | os.O_RDWR)
            make_private(self._path)
            db = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                # Without this file lock, two processes that create the queue file at the same time would get SQLite's
                # error for a locked file.
                with self._my_turn():
                    for pragma in _PRAGMAS:
                        db.execute(pragma)
                    db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            except sqlite3.Error:
                db.close()
                raise
            self._connection, self._has_patience = db, True
        if self._has_patience is not self._waits:
            busy_s = _BUSY_S if self._waits else _AT_ONCE_S
            self._connection.execute(f"PRAGMA busy_timeout = {busy_s * 1000:.0f}")
            self._has_patience = self._waits
        return self._connection

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        # SQLite waits for its own lock with an unfair backoff. Some of 16 busy processes made only 10% of the calls of
        # others, and waited up to 2 s. The kernel's file lock is fair and cheap, and the kernel releases the lock of a
        # killed process.
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX if self._waits else _AT_ONCE)
        except BlockingIOError as error:
            raise Throttled(f"Another process holds the lock of the queue file {self._path}.") from error
        try:
            yield
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _translate_errors(self._path):
            db = self._db
            with self._my_turn():
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise

    def _queue(self, name: str) -> _Queue:
        row = self._db.execute(_PROBE, (name,)).fetchone()
        if row is None:
            raise NotFound(f"No queue {name!r}.")
        return _Queue(row)

    def ensure(self, spec: QueueSpec) -> None:
        with self._transaction() as db:
            if spec.dead_letters is not None:
                self._queue(spec.dead_letters)
            values = (spec.visibility_s, spec.retention_s, spec.dead_letters, spec.max_receives)
            db.execute(
                "INSERT INTO queues (name, visibility_s, retention_s, dead_letters, max_receives)"
                " VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
                " visibility_s = excluded.visibility_s, retention_s = excluded.retention_s,"
                " dead_letters = excluded.dead_letters, max_receives = excluded.max_receives",
                (spec.name, *values),
            )

    def send(self, name: str, messages: Sequence[Outgoing]) -> None:
        with self._transaction() as db:
            queue, now_s = self._queue(name), self._clock.now_s()
            db.executemany(
                "INSERT INTO messages (queue, visible_s, sent_s, body) VALUES (?, ?, ?, ?)",
                [(queue.id, now_s + message.delay_s, now_s, message.body) for message in messages],
            )
            _grow(db, queue.id, len(messages))

    def receive(self, name: str, limit: int, visibility_s: float | None) -> ReceiveResult:
        # The first query of a receive does not take a lock, so idle receivers do not delay senders.
        with _translate_errors(self._path):
            due_in_s = self._due_in_s(self._queue(name))
        if due_in_s is None or due_in_s > 0:
            return ReceiveResult(due_in_s=due_in_s)
        with self._transaction() as db:
            return self._receive(db, self._queue(name), limit, visibility_s)

    def _due_in_s(self, queue: _Queue) -> float | None:
        return None if queue.first_s is None else queue.first_s - self._clock.now_s()

    def _receive(self, db: sqlite3.Connection, queue: _Queue, limit: int, visibility_s: float | None) -> ReceiveResult:
        now_s = self._clock.now_s()
        if queue.total >= self._max_in_flight:
            (in_flight,) = db.execute(_IN_FLIGHT, (queue.id, now_s)).fetchone()
            limit = min(limit, self._max_in_flight - in_flight)
            if limit <= 0:
                return ReceiveResult(over_limit=True)
        dead = self._dead_letters(queue)
        messages: list[Message] = []
        expired: list[tuple[int]] = []
        moved: list[tuple[int]] = []
        more = False
        rows = db.execute(_VISIBLE, (queue.id, now_s))
        for number, receives, sent_s, first_s, body in rows:
            more = len(expired) + len(moved) == _DROPPED_AT_ONCE
            if more or len(messages) == limit:
                break
            if sent_s + queue.retention_s <= now_s:
                expired.append((number,))
            elif dead is not None and receives >= queue.max_receives:
                moved.append((number,))
            else:
                count = receives + 1
                first_s = now_s if first_s is None else first_s
                receipt = f"{number}.{count}"
                messages.append(Message(str(number), body, receipt, count, sent_s, first_s))
        rows.close()
        hidden_s = now_s + (queue.visibility_s if visibility_s is None else visibility_s)
        db.executemany(
            "UPDATE messages SET visible_s = ?, receives = receives + 1, received_s = ?,"
            " first_received_s = ? WHERE id = ?",
            [(hidden_s, now_s, message.first_received_s, int(message.id)) for message in messages],
        )
        if expired:
            db.executemany("DELETE FROM messages WHERE id = ?", expired)
        if dead is not None and moved:
            # A moved message keeps its sent time and its receive count, so its retention period and its history
            # continue.
            db.executemany(
                "UPDATE messages SET queue = ?, visible_s = ? WHERE id = ?",
                [(dead, now_s, number) for (number,) in moved],
            )
            _grow(db, dead, len(moved))
        if expired or moved:
            _grow(db, queue.id, -len(expired) - len(moved))
        return ReceiveResult(messages, more=more, dead_letters=queue.dead_letters, moved=len(moved))

    def _dead_letters(self, queue: _Queue) -> int | None:
        if queue.dead_letters is None:
            return None
        row = self._db.execute("SELECT id FROM queues WHERE name = ?", (queue.dead_letters,)).fetchone()
        # If the dead-letter queue was removed, receives continue to return the messages, as with SQS. A missing
        # dead-letter queue does not lose messages.
        return None if row is None else int(row[0])

    def undo(self, name: str, messages: Sequence[Message]) -> None:
        """Make the messages of a canceled receive visible again."""
        with self._transaction() as db:
            queue, now_s = self._queue(name), self._clock.now_s()
            db.executemany(
                "UPDATE messages SET visible_s = ?, receives = receives - 1"
                " WHERE id = ? AND receives = ? AND queue = ?",
                [(now_s, int(message.id), message.receive_count, queue.id) for message in messages],
            )

    def delete(self, name: str, receipts: Sequence[str]) -> list[str]:
        refused = []
        with self._transaction() as db:
            queue = self._queue(name)
            for receipt in receipts:
                done = db.execute(
                    "DELETE FROM messages WHERE id = ? AND receives = ? AND queue = ?",
                    (*_parse_receipt(receipt), queue.id),
                )
                if not done.rowcount:
                    refused.append(receipt)
            _grow(db, queue.id, len(refused) - len(receipts))
        return refused

    def change_visibility(self, name: str, changes: Sequence[tuple[str, float]]) -> list[str]:
        refused = []
        with self._transaction() as db:
            queue, now_s = self._queue(name), self._clock.now_s()
            for receipt, visibility_s in changes:
                # The visibility timeout of a message can change only in flight, and can end at most 12 hours after the
                # receive.
                done = db.execute(
                    "UPDATE messages SET visible_s = ? WHERE id = ? AND receives = ? AND queue = ?"
                    " AND visible_s > ? AND received_s >= ?",
                    (
                        now_s + visibility_s,
                        *_parse_receipt(receipt),
                        queue.id,
                        now_s,
                        now_s + visibility_s - MAX_VISIBILITY_S,
                    ),
                )
                if not done.rowcount:
                    refused.append(receipt)
        return refused

    def depth(self, name: str) -> Depth:
        with _translate_errors(self._path):
            queue, now_s = self._queue(name), self._clock.now_s()
        expired_s = now_s - queue.retention_s
        if queue.first_s is not None and queue.first_s <= expired_s:
            # Expired messages are deleted by receives, but nothing receives from a dead-letter queue.
            with self._transaction() as db:
                gone = db.execute(_EXPIRE, (queue.id, expired_s)).rowcount
                _grow(db, queue.id, -gone)
        with _translate_errors(self._path):
            row = self._db.execute(_DEPTH, (now_s, now_s, queue.id)).fetchone()
        if row is None:
            raise NotFound(f"No queue {name!r}.")
        total, ahead, in_flight = row
        return Depth(visible=total - ahead, in_flight=in_flight, delayed=ahead - in_flight)

    def purge(self, name: str) -> None:
        with self._transaction() as db:
            queue = self._queue(name)
            db.execute("DELETE FROM messages WHERE queue = ?", (queue.id,))
            db.execute("UPDATE queues SET total = 0 WHERE id = ?", (queue.id,))

    def remove(self, name: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM messages WHERE queue = (SELECT id FROM queues WHERE name = ?)", (name,))
            db.execute("DELETE FROM queues WHERE name = ?", (name,))


def _grow(db: sqlite3.Connection, queue: int, by: int) -> None:
    db.execute("UPDATE queues SET total = total + ? WHERE id = ?", (by, queue))


def _parse_receipt(receipt: str) -> tuple[int, int]:
    number, dot, count = receipt.partition(".")
    if dot and number.isdecimal() and count.isdecimal() and len(receipt) < 20:
        return int(number), int(count)
    # No message has the id -1, so the receipt is refused like any other unknown receipt.
    return -1, -1


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        kinds = {
            sqlite3.SQLITE_BUSY: Throttled,
            sqlite3.SQLITE_CANTOPEN: Unreachable,
            # A full disk raises Unreachable, so the caller retries.
            sqlite3.SQLITE_FULL: Unreachable,
        }
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        damaged = code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
        raise kinds.get(code, BackendError)(
            f"The queue file {path} cannot be used: {error}.",
            remedy="Move the file away and start the grid again. The manager sends its messages again."
            if damaged
            else "",
        ) from error
