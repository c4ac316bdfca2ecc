"""Waiting for an event, but no longer than so.

Invariant: a cancellation that comes in the same moment as the event is not lost, as
`asyncio.wait_for` loses it before Python 3.12: whoever waits in a loop could not be ended then.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, for so long at the most; whether it is."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
