"""The order in which the processes of a test run take the tests, so that no core is idle.

Tests that mostly wait (for containers, leases, real time) leave their core to other tests. In alphabetical order, these
tests would run last, and every core would wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

WAITS_S: Mapping[str, float] = {
    "tests/system/test_boot.py": 505,
    "tests/chaos/test_chaos.py": 280,
    "tests/system/test_replay_against_forecast.py": 150,
    "tests/system/test_faults_containers.py": 190,
    "tests/system/test_aws_faults.py": 185,
    "tests/system/test_faults_processes.py": 150,
    "tests/system/deploy/test_rehearsal.py": 170,
    "tests/system/test_faults_aws.py": 130,
    "tests/system/test_replay_cli.py": 105,
    "tests/chaos/test_scaling.py": 105,
    "tests/browser/test_page.py": 100,
    "tests/contract/test_queue_waiting.py": 100,
    "tests/system/test_replay_localstack.py": 90,
    "tests/system/test_executor_cpython.py": 90,
    "tests/system/test_bare_posix.py": 130,
}
"""Files whose tests mostly wait, and the total seconds of each file in CI on two cores."""


def dealt(names: Sequence[str], processes: int) -> list[int]:
    """Return the positions of `names` (ids of tests, file by file) in the order to run them.

    xdist's worksteal gives each process an equal and contiguous part. A process that has finished its part takes tests
    from the end of another part. Half of the parts therefore begin with files whose tests mostly wait, while the other
    processes compute. The tests of a file stay together, because they share fixtures.
    """
    files: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        files.setdefault(name.partition("::")[0], []).append(position)
    hands: list[list[int]] = [[] for _ in range(waiting(processes))]
    held_s = [0.0] * len(hands)
    for file in sorted(WAITS_S.keys() & files.keys(), key=lambda one: (-WAITS_S[one], one)):
        least = held_s.index(min(held_s))
        hands[least] += files.pop(file)
        held_s[least] += WAITS_S[file]
    rest = [position for positions in files.values() for position in positions]
    order: list[int] = []
    computing: list[list[int]] = [[] for _ in range(processes - len(hands))]
    for size, hand in zip(_parts(len(names), processes), hands + computing, strict=True):
        fill = max(0, size - len(hand))
        order += hand + rest[:fill]
        del rest[:fill]
    return order + rest


def waiting(processes: int) -> int:
    """Return the number of processes that begin with files whose tests mostly wait."""
    return (processes + 1) // 2


def _parts(total: int, processes: int) -> Iterator[int]:
    """Yield the sizes of the parts that worksteal creates."""
    for left in range(processes, 0, -1):
        size = total // left
        total -= size
        yield size
