"""Reads and writes of a job's control object, which permits or forbids the start of tasks.

The content of a control object is a word (`Word`). Each write is conditional: it succeeds only if
the word that it replaces has not changed. A word contains its round, and the number of words before
it, because equal contents have equal ETags on S3.

Invariant: a request that arrives late never replaces a later word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from batchlab.core.errors import AlreadyExists, Malformed, NotFound, TooNew
from batchlab.core.model import Control, JobId
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.json_format import Word
from batchlab.core.retry import Patience


@dataclass(frozen=True, slots=True)
class Spoken:
    """A word with the ETag of the object that it was read from."""

    word: Word
    etag: str


async def look(objects: Objects, job: JobId, etag: str | None) -> Spoken | None:
    """Return the word, or None if its ETag is still `etag`. Raise NotFound if it does not exist."""
    found = await objects.get_if_changed(object_keys.control(job), etag)
    return Spoken(json_format.word_from_bytes(found[0]), found[1]) if found else None


async def spoken(objects: Objects, job: JobId, patience: Patience) -> Spoken | None:
    """Return the current word so that another one can replace it, or None if the object does not
    exist.

    An object that cannot be read, or that has an unknown word, counts as RUN in the first round.
    Every word may replace that.
    """
    try:
        found = await patience(partial(objects.get_if_changed, object_keys.control(job), None))
    except NotFound:
        return None
    assert found
    data, etag = found
    try:
        return Spoken(json_format.word_from_bytes(data), etag)
    except (Malformed, TooNew):
        return Spoken(Word(Control.RUN), etag)


async def word_of(objects: Objects, job: JobId, patience: Patience) -> Word:
    """Return the word. Raise NotFound if it does not exist."""
    return json_format.word_from_bytes(
        await patience(partial(objects.get, object_keys.control(job)))
    )


async def say(
    objects: Objects, job: JobId, word: Word, patience: Patience, *, over: Spoken | None
) -> bool:
    """Replace the word `over` by `word`, and return whether this succeeded.

    Return False if the object has changed since it was read. The new word may be a cancellation, or
    our own word if the response to our write was lost.
    """
    numbered = replace(word, number=over.word.number + 1 if over else 0)
    put = partial(
        objects.put,
        object_keys.control(job),
        json_format.word_to_bytes(numbered),
        if_absent=over is None,
        if_match=over.etag if over else None,
    )
    try:
        await patience(put)
    except (AlreadyExists, NotFound):
        return False
    return True


async def insist(objects: Objects, job: JobId, word: Word, patience: Patience) -> Word | None:
    """Write a cancellation over every other word of the same or an earlier round.

    Return the cancellation in effect, which is the first one of that round. Return None and write
    nothing if the bucket has a word of a later round.
    """
    while True:
        found = await spoken(objects, job, patience)
        if found and found.word.round > word.round:
            return None
        if found and found.word.control is Control.CANCEL and found.word.round == word.round:
            return found.word
        if await say(objects, job, word, patience, over=found):
            return word


async def mend(
    objects: Objects, job: JobId, control: Control, round: int, patience: Patience
) -> None:
    """Write the word of the ledger if the control object is missing or cannot be read.

    A word that another manager wrote in between stays.
    """
    try:
        await word_of(objects, job, patience)
        return
    except (Malformed, NotFound):
        found = await spoken(objects, job, patience)
    await say(objects, job, Word(control, round=round), patience, over=found)


async def permit(objects: Objects, job: JobId, round: int, patience: Patience) -> None:
    """Write the word that permits the tasks of a new round over the words of earlier rounds.

    A word of that round or a later one stays.
    """
    while True:
        found = await spoken(objects, job, patience)
        if found and found.word.round >= round:
            return
        if await say(objects, job, Word(Control.RUN, round=round), patience, over=found):
            return
