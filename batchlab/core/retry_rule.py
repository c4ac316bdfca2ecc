"""Retry rule of a stage: whether a failed task is retried, and after which backoff.

Invariant: the decision about a retry depends only on the rule and the failure, so every program makes the same
decision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from batchlab.core.model import Bundle, Failure, FailureKind

_HOPELESS = frozenset({FailureKind.IMPORT, FailureKind.RESULT, FailureKind.LOST})
_MAX_NUMBER = 2**31 - 1
_MAX_S = 1e11


@dataclass(frozen=True, slots=True)
class RetryRule:
    """Rule for the retries of a failed task.

    `attempts` is the maximum number of attempts, including the first. The wait before attempt n+1 is `backoff_s ·
    factor^(n-1)`, at most `max_backoff_s`, times a jitter within ±`jitter`. If `kinds` is empty, all kinds of failure
    are retried except LOST, and except IMPORT and RESULT, which a retry cannot fix. A failure of the kind LOST is never
    retried. If `exit_codes` or `exceptions` is not empty, a failure of the kind EXIT or EXCEPTION is retried only if
    the list contains it.
    """

    attempts: int = 3
    backoff_s: float = 1.0
    factor: float = 2.0
    max_backoff_s: float = 900.0
    jitter: float = 0.25
    kinds: tuple[FailureKind, ...] = ()
    exit_codes: tuple[int, ...] = ()
    exceptions: tuple[str, ...] = ()

    @property
    def max_attempts(self) -> int:
        """Return the largest number of attempts that the rule permits for any kind of failure."""
        return self.attempts

    def attempts_after(self, failure: Failure) -> int:
        """Return the maximum number of attempts of a task with the given failure."""
        if failure.kind in _HOPELESS if not self.kinds else failure.kind not in self.kinds:
            return 1
        if self.exit_codes and failure.kind is FailureKind.EXIT and failure.exit_code not in self.exit_codes:
            return 1
        if self.exceptions and failure.kind is FailureKind.EXCEPTION and failure.error not in self.exceptions:
            return 1
        return self.attempts

    def allows_retry(self, failure: Failure, attempt: int) -> bool:
        """Return whether a task is retried after its attempt number `attempt` ended with the given failure."""
        return attempt < self.attempts_after(failure)

    def wait_s(self, bundle: Bundle) -> float:
        """Return the backoff in seconds before the attempt that follows the attempt of `bundle`.

        The jitter is derived from the bundle's id, so every program calculates the same wait.
        """
        digest = hashlib.sha256(f"{bundle.job}/{bundle.stage}/{bundle.id}".encode()).digest()
        unit = int.from_bytes(digest[:4]) / 2**32
        return float(self._base_s(bundle.attempt) * (1 + self.jitter * (2 * unit - 1)))

    def wait_range_s(self, attempt: int) -> tuple[float, float]:
        """Return the shortest and the longest backoff in seconds after attempt number `attempt`."""
        base = self._base_s(attempt)
        return base * (1 - self.jitter), base * (1 + self.jitter)

    def _base_s(self, attempt: int) -> float:
        try:
            # Use a float, because an integer power with a forged attempt number could exhaust the memory.
            return min(self.max_backoff_s, self.backoff_s * float(self.factor) ** (attempt - 1))
        except OverflowError:
            return self.max_backoff_s if self.backoff_s else 0.0

    def divided(self, factor: float) -> RetryRule:
        """Return a copy of the rule with all backoffs divided by `factor`."""
        return replace(self, backoff_s=self.backoff_s / factor, max_backoff_s=self.max_backoff_s / factor)

    def limits(self) -> Iterator[tuple[str, float, float]]:
        """Yield the name, the value, and the maximum of each number of the rule."""
        yield "number of attempts", self.attempts, _MAX_NUMBER
        yield "backoff", self.backoff_s, _MAX_S
        yield "longest backoff", self.max_backoff_s, _MAX_S
        yield "factor of the backoff", self.factor, _MAX_NUMBER
        yield "jitter of the backoff", self.jitter, _MAX_NUMBER
