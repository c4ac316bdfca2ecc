"""The lines of a trace, plain or gzip, whatever its name says.

Invariant: a file that breaks off or is no UTF-8 is read as far as it goes, and said to be odd.
"""

from __future__ import annotations

import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from batchlab.core.errors import UsageError
from batchlab.scenarios.model.values import Anomaly
from batchlab.scenarios.traces.rows import LEFT_OUT

_CHUNK = 1 << 18
_FEW = 64
"""Bytes by which text that is no UTF-8 is told."""
_GZIP = b"\x1f\x8b"
_DAMAGED = "the file is damaged from here"
_CHECKS = ("incorrect data check", "incorrect length check")
"""What zlib says where all was unpacked and the sums at the end are others."""


class _ReadProblem(NamedTuple):
    """Why a file is not read further. `whole`: what came before it is as it was written."""

    what: str
    done: str = LEFT_OUT
    detail: str = ""
    whole: bool = True


class _UnreadableError(Exception):
    """All that can be read of a file has been."""

    def __init__(self, trouble: _ReadProblem) -> None:
        super().__init__(trouble.what)
        self.trouble = trouble


def read_lines(path: Path, odd: list[Anomaly]) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of every line; what is odd is added to `odd`.

    UsageError where the file cannot be read.
    """
    number = 0
    rest = end = b""
    try:
        for chunk in _chunks(path):
            end = end or _line_end(chunk, path)
            *whole, rest = (rest + chunk).split(end)
            for line in whole:
                number += 1
                yield number, _decode(line, number, path, odd)
    except _UnreadableError as error:
        trouble = error.trouble
        # What was cut may still look like a number.
        rest = rest if trouble.whole else b""
        at = number + 1 + bool(rest)
        odd.append(Anomaly(str(path), at, trouble.what, trouble.done, trouble.detail))
    if rest:
        yield number + 1, _decode(rest, number + 1, path, odd)


def _line_end(chunk: bytes, path: Path) -> bytes:
    """By the file's first piece; UsageError where it is text that is no UTF-8 all through."""
    wide = len(chunk) >= _FEW and not (any(chunk[:_FEW:2]) and any(chunk[1:_FEW:2]))
    if wide or chunk.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise UsageError(
            f"The trace {path} is UTF-16, and only UTF-8 is read.",
            remedy="Convert it, for example with `iconv -f UTF-16 -t UTF-8`.",
        )
    return b"\r" if b"\r" in chunk and b"\n" not in chunk else b"\n"


def read_unpacked(path: Path) -> bytes:
    """The whole file, as far as it goes; UsageError where it cannot be read."""
    found = bytearray()
    try:
        for chunk in _chunks(path):
            found += chunk
    except _UnreadableError:
        return bytes(found)
    return bytes(found)


def _decode(line: bytes, number: int, path: Path, odd: list[Anomaly]) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
    except UnicodeDecodeError:
        odd.append(Anomaly(str(path), number, "not UTF-8", "its other characters were read"))
        return line.decode(errors="replace").rstrip("\r")


def _chunks(path: Path) -> Iterator[bytes]:
    """The file piece by piece, unpacked; _UnreadableError where no more of it can be read."""
    try:
        with path.open("rb") as file:
            chunk = file.read(_CHUNK)
            if chunk.startswith(_GZIP):
                yield from _gzip_members(file, chunk)
                return
            while chunk:
                yield chunk
                chunk = file.read(_CHUNK)
    except OSError as error:
        raise UsageError(
            f"The trace {path} cannot be read: {error.strerror or error}.",
            remedy="Name a file that is there; a scenario's paths are relative to its own folder.",
        ) from error


def _gzip_members(file: BinaryIO, data: bytes) -> Iterator[bytes]:
    """A gzip file may have several members, one after the other, and zeros behind each."""
    while data.startswith(_GZIP):
        unpacker = zlib.decompressobj(wbits=31)
        while data and not unpacker.eof:
            yield from _decompress(unpacker, data)
            data = unpacker.unused_data or file.read(_CHUNK)
        if not unpacker.eof:
            yield unpacker.flush()
            raise _UnreadableError(_ReadProblem(_DAMAGED, detail="it breaks off", whole=False))
        while data and not (data := data.lstrip(b"\0")):
            data = file.read(_CHUNK)
        if len(data) == 1:
            data += file.read(1)
    if data:
        raise _UnreadableError(_ReadProblem("bytes that are no gzip follow its end"))


def _decompress(unpacker: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """What `data` unpacks to, never much at once."""
    while data:
        before = unpacker.copy()
        try:
            piece = unpacker.decompress(data, _CHUNK)
        except zlib.error as error:
            yield from _decompress_until_damage(before, data)
            raise _UnreadableError(_problem_of(error)) from error
        yield piece
        data = unpacker.unconsumed_tail


def _decompress_until_damage(unpacker: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """Byte by byte: zlib keeps back all that it has unpacked in a call that fails."""
    for at in range(len(data)):
        try:
            piece = unpacker.decompress(data[at : at + 1])
        except zlib.error:
            return
        yield piece


def _problem_of(error: zlib.error) -> _ReadProblem:
    if any(check in str(error) for check in _CHECKS):
        return _ReadProblem(
            "the file's checksum is wrong here", "what is before was read, and may be spoilt"
        )
    return _ReadProblem(_DAMAGED, detail=str(error), whole=False)
