"""When containers that are being ended have to be gone: what Docker cannot keep for us.

Invariant: a note is for one container, so a folder that is older than what runs ends nothing.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from batchlab.ports import Clock
from batchlab.whole import write_whole

log = logging.getLogger(__name__)


class Endings:
    """A file for each instance that was asked to end, in `folder`."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock

    def note(self, instance: str, container: str, grace_s: float) -> None:
        """It has to be gone `grace_s` from now. Where the disk is full that is forgotten by the
        next launcher, but this one goes on: an instance that could not be ended would be worse."""
        note = {"container": container, "by_s": self._clock.now_s() + grace_s}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(instance), json.dumps(note))
        except OSError as error:
            log.warning(
                "when it has to be gone is not kept: %s", error, extra={"instance": instance}
            )

    def left_s(self, instance: str, container: str) -> float | None:
        """Seconds that are left to it, None where nobody has asked it to end."""
        try:
            note = json.loads(self._path(instance).read_text())
            if note["container"] != container:
                return None
            return max(0.0, float(note["by_s"]) - self._clock.now_s())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            # Cut short by a power failure, but only who wants it gone writes such a file.
            return 0.0

    def forget(self, instance: str) -> None:
        """It is gone."""
        self._path(instance).unlink(missing_ok=True)

    def _path(self, instance: str) -> Path:
        return self._folder / f"{instance}.json"
