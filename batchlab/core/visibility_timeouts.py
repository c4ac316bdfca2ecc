"""Visibility timeouts of task messages, which follow the measured run times of a stage.

The manager measures the run times and sends them in task messages. A worker chooses a timeout when it receives a
message, and again at each extension.

Invariants: a measured run time only changes how often a worker extends a timeout. A worker extends the timeout of each
message that it holds, whatever run time the message contains. Each extension is at least the backend's visibility
timeout and at most MAX_EXTENSION times this timeout.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from batchlab.core.service_settings import MAX_VISIBILITY_S

MIN_SAMPLES = 5
"""Number of outcomes of a stage from which an expected run time can be computed."""
MAX_SAMPLES = 100
"""Number of recent outcomes of a stage from which the expected run time is computed."""
QUANTILE = 0.95
"""Quantile of the measured run times that counts as the expected run time."""
MIN_TIMEOUT_S = 30.0
"""Shortest timeout in seconds that a measured run time can cause. A backend may have a shorter timeout."""
MAX_EXTENSION = 8.0
"""Longest timeout, as a multiple of the backend's visibility timeout.

The message of a dead worker stays hidden until its timeout ends if the manager has also ended, so the limit bounds the
effect of a wrong run time.
"""


def expected_run_s(samples_s: Collection[float]) -> float | None:
    """Return the expected run time in seconds of one task, or None if there are too few samples."""
    if len(samples_s) < MIN_SAMPLES:
        return None
    return sorted(samples_s)[math.ceil(QUANTILE * len(samples_s)) - 1]


def shortest_s(visibility_s: float) -> float:
    """Return the timeout in seconds of the messages of short bundles."""
    return min(MIN_TIMEOUT_S, visibility_s)


def receive_s(run_s: float | None, visibility_s: float) -> float:
    """Return the timeout in seconds of messages whose bundles are expected to run for `run_s` seconds. A bundle that
    would need an extension of the shortest timeout gets the backend's timeout."""
    is_short = run_s is not None and run_s <= shortest_s(visibility_s) / 3
    return shortest_s(visibility_s) if is_short else visibility_s


def extension_s(run_s: float | None, held_s: float, visibility_s: float) -> float:
    """Return the timeout in seconds of the next extension of a message that a worker has held for `held_s` seconds.

    The timeout covers the expected rest of the run. A run that takes longer than expected has the backend's timeout
    again, so its worker soon notices that another worker has committed the bundle.
    """
    if run_s is None:
        return visibility_s
    longest_s = min(MAX_EXTENSION * visibility_s, MAX_VISIBILITY_S - held_s)
    return max(visibility_s, min(run_s - held_s + visibility_s, longest_s))


def longest_timeout_s(run_s: float, visibility_s: float) -> float:
    """Return the longest timeout in seconds of the messages of bundles that are expected to run for `run_s` seconds."""
    if run_s <= shortest_s(visibility_s) / 3:
        return receive_s(run_s, visibility_s)
    return extension_s(run_s, visibility_s / 3, visibility_s)


def extend_after_s(timeout_s: float, visibility_s: float) -> float:
    """Return the seconds after which a worker extends a timeout of `timeout_s`. The worker can repeat a failed
    extension for two thirds of the timeout, or of the backend's timeout if that is shorter."""
    return timeout_s - min(timeout_s, visibility_s) * 2 / 3


def extensions(run_s: float, visibility_s: float) -> float:
    """Return the number of extensions of the message of a bundle that runs for `run_s` seconds, as expected.

    A bundle that runs for longer than SQS's maximum has a proportional number of extensions.
    """
    long_s, count, held_s = min(run_s, MAX_VISIBILITY_S), 0, 0.0
    timeout_s = receive_s(run_s, visibility_s)
    while (held_s := held_s + extend_after_s(timeout_s, visibility_s)) < long_s:
        count += 1
        timeout_s = extension_s(run_s, held_s, visibility_s)
    return count * run_s / long_s if run_s > long_s else float(count)
