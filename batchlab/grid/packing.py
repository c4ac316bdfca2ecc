"""An executor's calls on their way: functions pickled once, arguments encoded.

Invariant: a call that cannot be pickled is rejected by itself, and the others go.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchlab.grid.outgoing import Chunk
from batchlab.grid.shipping import Shipping, pickled
from batchlab.manager.plans import PART_ITEMS
from batchlab.model import JobId, Json
from batchlab.protocol import values
from batchlab.worker.calls import Calls, Initializer

if TYPE_CHECKING:
    from batchlab.grid.calls import CallFuture

KNOWN = 4096
"""So many functions are remembered as having been sent."""

_PLAIN = frozenset({type(None), bool, int, float, str})


@dataclass(slots=True)
class Call:
    """`function(*args, **kwargs)`, wanted by `future`."""

    future: CallFuture
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Packed:
    """The handler, pickled; and the calls as items, in the order of `futures`."""

    handler: bytes
    chunks: list[Chunk]
    futures: list[CallFuture]
    rejected: list[tuple[CallFuture, Exception]]


class Packer:
    """Packs the calls of one executor."""

    def __init__(self, shipping: Shipping, initializer: Initializer | None) -> None:
        self._shipping = shipping
        self._initializer = initializer
        self._known: dict[bytes, None] = {}

    def pack(self, job: JobId, calls: Sequence[Call]) -> Packed:
        """Encode these as the items of `job`."""
        with self._shipping.by_value():
            functions = self._functions(calls)
            table: dict[bytes, int] = {}
            packed = Packed(b"", [], [], [])
            for call in calls:
                if not len(packed.futures) % PART_ITEMS:
                    chunk = Chunk(len(packed.futures), [], [])
                try:
                    function = _reference(call.function, functions.get(id(call.function)), table)
                    item = [function, *_arguments(call, chunk, job)]
                except Exception as error:  # noqa: BLE001 - pickling runs the objects' own code
                    packed.rejected.append((call.future, error))
                    continue
                if not chunk.items:
                    packed.chunks.append(chunk)
                chunk.items.append(item)
                packed.futures.append(call.future)
        packed.handler = pickle.dumps(Calls(list(table), self._initializer))
        return packed

    def _functions(self, calls: Sequence[Call]) -> dict[int, tuple[bytes, bool]]:
        """By id, each function that can be pickled, and whether it belongs into the table.

        The table is sent once, however often its functions are called, but every process loads
        all of it: what is called once (a bound method, a partial) goes with its call.
        """
        found: dict[int, bytes] = {}
        uses: Counter[bytes] = Counter()
        for call in calls:
            key = id(call.function)
            if key not in found:
                with suppress(Exception):  # raised again where the call is packed
                    found[key] = pickled(call.function)
            if key in found:
                uses[found[key]] += 1
        shared = {}
        for data, count in uses.items():
            digest = hashlib.sha256(data).digest()
            shared[data] = count > 1 or digest in self._known
            self._known[digest] = None
        while len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]
        return {key: (data, shared[data]) for key, data in found.items()}


def _reference(
    function: Callable[..., Any], known: tuple[bytes, bool] | None, table: dict[bytes, int]
) -> Json:
    if not callable(function):
        raise TypeError(f"{function!r} is not callable")
    # Where it is not known it could not be pickled, and each of its calls gets an error of its own.
    data, shared = known or (pickled(function), False)
    if shared:
        return table.setdefault(data, len(table))
    return {"$pickle": base64.b64encode(data).decode()}


def _arguments(call: Call, chunk: Chunk, job: JobId) -> list[Json]:
    try:
        if not call.kwargs and all(type(one) in _PLAIN for one in call.args):
            return [values.encode_object(one) for one in call.args]
        return [values.encode_object((call.args, call.kwargs), chunk.file(job))]
    except values.NotAValue as error:
        if error.__cause__ is None:
            raise
        # pickle's own error, which the user of any executor may expect.
        raise error.__cause__ from None
