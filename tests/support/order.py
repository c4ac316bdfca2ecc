"""In which order the processes of a run take the tests, so that no core idles and none is last.

Tests that mostly wait (for containers, leases, real time) leave their core to others; left to the
end, as the alphabet has it, they are waited for alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

WAITS_S: Mapping[str, float] = {
    "tests/system/test_same_results.py": 375,
    "tests/system/test_replay_against_forecast.py": 290,
    "tests/system/test_boot.py": 280,
    "tests/chaos/test_chaos.py": 255,
    "tests/system/test_faults_containers.py": 170,
    "tests/system/test_aws_faults.py": 145,
    "tests/chaos/test_scaling.py": 120,
    "tests/system/test_faults_aws.py": 120,
    "tests/system/test_replay_local.py": 75,
    "tests/system/test_replay_localstack.py": 70,
    "tests/system/test_replay_cli.py": 60,
    "tests/system/test_aws_backend.py": 60,
    "tests/system/test_least_privilege.py": 55,
    "tests/system/test_containers.py": 45,
    "tests/system/test_replay_aws.py": 40,
    "tests/system/test_postgres_outages.py": 40,
    "tests/system/test_simpledb_leaders.py": 40,
    "tests/system/test_replay_faults.py": 35,
    "tests/attacks/test_containers.py": 35,
    "tests/attacks/test_power_cut.py": 25,
    "tests/system/test_postgres_leaders.py": 25,
    "tests/system/bad_input/test_bad_places.py": 25,
    "tests/system/test_follow_logs.py": 15,
}
"""Files whose tests mostly wait, and about how long in all, in CI on two cores."""


def dealt(names: Sequence[str], processes: int) -> list[int]:
    """The positions of `names` (ids of tests, file by file) in the order to run them.

    xdist's worksteal gives each process an equal and contiguous part of them, and whoever is done
    steals from another's end. So the files that wait stand at the beginnings of half of the parts,
    while the other processes compute. A file stays together, with its fixtures.
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
    """How many of them begin with what waits."""
    return (processes + 1) // 2


def _parts(total: int, processes: int) -> Iterator[int]:
    """As worksteal cuts them."""
    for left in range(processes, 0, -1):
        size = total // left
        total -= size
        yield size
