"""A job's control object, which says whether its tasks may start: how it is read and written.

Invariant: every word is put under the condition that the word it replaces still stands, and names
the round that it is for. A word has the number of words before it, since equal contents have equal
ETags on S3. So a request that arrives late never undoes a later word.
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
    """A word as it was read."""

    word: Word
    etag: str


async def look(objects: Objects, job: JobId, etag: str | None) -> Spoken | None:
    """The word where it is another one than that with `etag`; NotFound where there is none."""
    found = await objects.get_if_changed(object_keys.control(job), etag)
    return Spoken(json_format.word_from_bytes(found[0]), found[1]) if found else None


async def spoken(objects: Objects, job: JobId, patience: Patience) -> Spoken | None:
    """Return the word, to write another one over it; None if there is no object. An object that
    cannot be read, or has an unknown word, counts as permission of the first round, which every
    word may replace."""
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
    """The word; NotFound where there is none."""
    return json_format.word_from_bytes(
        await patience(partial(objects.get, object_keys.control(job)))
    )


async def say(
    objects: Objects, job: JobId, word: Word, patience: Patience, *, over: Spoken | None
) -> bool:
    """Write it in the place of the one that was read; False where another one, such as a
    cancellation, has taken that meanwhile, or ours has and its answer was lost."""
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
    """Write a cancellation over every other word of its round or an earlier one, and return the
    cancellation of that round which stands then: the first one stays. Return None, and write
    nothing, where the bucket has a word of a later round."""
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
    """Write the word of the ledger if the object of the word is gone or cannot be read. A word that
    another manager has written meanwhile stays."""
    try:
        await word_of(objects, job, patience)
        return
    except (Malformed, NotFound):
        found = await spoken(objects, job, patience)
    await say(objects, job, Word(control, round=round), patience, over=found)


async def permit(objects: Objects, job: JobId, round: int, patience: Patience) -> None:
    """Write the word that lets the tasks of a new round start, over the words of earlier rounds. A
    word of that round or a later one stays."""
    while True:
        found = await spoken(objects, job, patience)
        if found and found.word.round >= round:
            return
        if await say(objects, job, Word(Control.RUN, round=round), patience, over=found):
            return
