"""FIFOs with the replies of workers to clients on the same machine."""

from __future__ import annotations

import asyncio
import os
import select
import time
from pathlib import Path

import pytest

from batchlab.adapters.local.replies import FifoInbox, FifoReplies


def test_a_waiting_client_gets_each_reply_once(tmp_path: Path) -> None:
    async def main() -> None:
        inbox, replies = FifoInbox(tmp_path), FifoReplies(tmp_path)
        waiting = asyncio.create_task(inbox.receive(10.0))
        await asyncio.sleep(0.01)
        assert replies.send(inbox.name, "first ✓")
        assert await waiting == ["first ✓"]
        assert replies.send(inbox.name, "second")
        assert replies.send(inbox.name, "third")
        assert await inbox.receive(10.0) == ["second", "third"]
        began_s = time.monotonic()
        assert not await inbox.receive(0.02)
        assert time.monotonic() - began_s >= 0.015
        inbox.close()

    asyncio.run(main())


def test_a_worker_learns_that_the_client_has_left(tmp_path: Path) -> None:
    inbox, replies = FifoInbox(tmp_path), FifoReplies(tmp_path)
    assert replies.send(inbox.name, "just in time")
    assert inbox.close() == ["just in time"]
    assert not replies.send(inbox.name, "too late")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "0" * 15, "0123456789ABCDEF"])
def test_a_name_outside_of_the_folder_gets_no_reply(tmp_path: Path, name: str) -> None:
    assert not FifoReplies(tmp_path).send(name, "text")


def test_a_reply_may_contain_any_character_except_the_end_of_a_line(tmp_path: Path) -> None:
    inbox, replies = FifoInbox(tmp_path), FifoReplies(tmp_path)
    text = "".join(map(chr, [*range(10), *range(11, 0xD800), 0x10FFFF]))
    size = select.PIPE_BUF // 4  # a character has at most 3 bytes in this part of the text
    sent = [text[n : n + size] for n in range(0, 0x3000, size)]
    for reply in sent:
        assert replies.send(inbox.name, reply)
    assert inbox.close() == sent


def test_foreign_bytes_do_not_disturb_a_client(tmp_path: Path) -> None:
    inbox = FifoInbox(tmp_path)
    with (tmp_path / inbox.name).open("wb", buffering=0) as fifo:
        fifo.write(b"\xff\nreply\nhalf of a")
    assert inbox.close()[1:] == ["reply"]


def test_a_reply_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    inbox, replies = FifoInbox(tmp_path), FifoReplies(tmp_path)
    assert not replies.send(inbox.name, "x" * select.PIPE_BUF)
    sent = 0
    reply = "x" * (select.PIPE_BUF // 2)
    while replies.send(inbox.name, reply):
        sent += 1
    assert sent
    assert inbox.close() == [reply] * sent


def test_the_fifo_of_a_killed_client_is_removed(tmp_path: Path) -> None:
    killed = tmp_path / ("0" * 16)
    os.mkfifo(killed)
    alive = FifoInbox(tmp_path)
    assert not killed.exists()
    later = FifoInbox(tmp_path)
    assert FifoReplies(tmp_path).send(alive.name, "still here")
    assert alive.close() == ["still here"]
    later.close()
