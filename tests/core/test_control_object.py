"""The control object of a job. Only a cancellation replaces a value that another writer has set meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core import commit
from batchlab.core.commit import StoredCommand
from batchlab.core.errors import Malformed, NotFound
from batchlab.core.model import Control, JobId, JobState
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.json_format import MAX_CONTROL_BYTES, ControlCommand

JOB = JobId("sums-1")
RUN, PAUSE = ControlCommand(Control.RUN), ControlCommand(Control.PAUSE)
CANCEL = ControlCommand(Control.CANCEL, JobState.CANCELLED, "enough", 2)


async def acts() -> None:
    objects, patience = SimObjects(), Patience(Random(1), limit_s=0.0)

    async def spoken() -> StoredCommand:
        found = await commit.read_stored(objects, JOB, patience)
        assert found
        return found

    # The control object does not exist.
    assert await commit.read_stored(objects, JOB, patience) is None
    with pytest.raises(NotFound):
        await commit.read_if_changed(objects, JOB, None)
    with pytest.raises(NotFound):
        await commit.read_command(objects, JOB, patience)
    assert not await commit.replace_command(objects, JOB, RUN, patience, over=StoredCommand(RUN, '"gone"'))

    assert await commit.replace_command(objects, JOB, RUN, patience, over=None)
    first = await spoken()
    assert first.command == RUN
    assert await commit.read_if_changed(objects, JOB, first.etag) is None
    assert not await commit.replace_command(objects, JOB, PAUSE, patience, over=None)
    assert await commit.replace_command(objects, JOB, PAUSE, patience, over=first)
    assert (await commit.read_command(objects, JOB, patience)) == PAUSE
    assert not await commit.replace_command(objects, JOB, RUN, patience, over=first), "it was paused since"

    paused = await spoken()
    assert await commit.write_cancellation(objects, JOB, CANCEL, patience) == CANCEL
    assert not await commit.replace_command(objects, JOB, RUN, patience, over=paused)
    found = await commit.read_if_changed(objects, JOB, paused.etag)
    assert found
    assert found.command == CANCEL

    # The first cancellation of a round stays in place.
    other = replace(CANCEL, reason="another reason")
    assert await commit.write_cancellation(objects, JOB, other, patience) == CANCEL
    assert await commit.read_command(objects, JOB, patience) == CANCEL

    # A retry replaces the command of an earlier round. The command of the retry's own round is not replaced.
    await commit.permit_round(objects, JOB, 3, patience)
    allowed = ControlCommand(Control.RUN, round=3)
    assert await commit.read_command(objects, JOB, patience) == allowed
    assert await commit.write_cancellation(objects, JOB, CANCEL, patience) is None, "its round is over"
    assert await commit.read_command(objects, JOB, patience) == allowed
    late = replace(CANCEL, round=3)
    assert await commit.write_cancellation(objects, JOB, late, patience) == late
    await commit.permit_round(objects, JOB, 3, patience)
    assert await commit.read_command(objects, JOB, patience) == late, "that round was cancelled since"


def test_a_word_is_written_over_what_was_read_and_only_while_that_stands() -> None:
    asyncio.run(acts())


def test_a_control_object_that_is_too_large_is_damaged_and_replaced() -> None:
    async def main() -> None:
        objects, patience = SimObjects(), Patience(Random(1), limit_s=0.0)
        await objects.put(object_keys.control(JOB), json_format.control_to_bytes(PAUSE) + b" " * MAX_CONTROL_BYTES)
        with pytest.raises(Malformed, match="cannot be read"):
            await commit.read_if_changed(objects, JOB, None)
        with pytest.raises(Malformed, match="cannot be read"):
            await commit.read_command(objects, JOB, patience)
        await commit.repair_command(objects, JOB, Control.PAUSE, 1, patience)
        assert await commit.read_command(objects, JOB, patience) == replace(PAUSE, round=1)

    asyncio.run(main())


def test_a_late_word_changes_nothing_although_the_same_word_stands_again() -> None:
    """An ETag of S3 depends only on the content, so a late pause must not undo a resume."""

    async def main() -> None:
        objects, patience = SimObjects(), Patience(Random(1), limit_s=0.0)
        assert await commit.replace_command(objects, JOB, RUN, patience, over=None)
        read = await commit.read_stored(objects, JOB, patience)
        for word in (PAUSE, RUN):
            found = await commit.read_stored(objects, JOB, patience)
            assert await commit.replace_command(objects, JOB, word, patience, over=found)
        assert not await commit.replace_command(objects, JOB, PAUSE, patience, over=read)
        assert await commit.read_command(objects, JOB, patience) == RUN

    asyncio.run(main())
