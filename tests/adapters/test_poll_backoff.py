"""Idle time of a queue: the poll interval of an idle grid, and the delay until work is noticed."""

from __future__ import annotations

from batchlab.adapters.aws.sqs import IDLE_AFTER_S
from batchlab.adapters.local.local_wakeup_queue import MAX_IDLE_S, POLL_S, POLL_SHARE, IdleTime


def test_two_workers_that_only_live_leave_it_idle_time() -> None:
    idle_time, now_s = IdleTime(0.0), 0.0
    for _ in range(100):
        now_s += 30.0
        idle_time.halve(now_s)

    # At this idle time, each long poll on SQS has its full length, and an emulator is polled twice per heartbeat.
    assert idle_time.idle_s(now_s) > IDLE_AFTER_S
    assert POLL_SHARE * idle_time.idle_s(now_s) > 30.0 / 3


def test_message_wakes_the_receiver_after_any_idle_time() -> None:
    idle_time, now_s = IdleTime(0.0), 86_400.0
    for _ in range(6):
        now_s += 0.01
        idle_time.halve(now_s)

    assert POLL_SHARE * idle_time.idle_s(now_s) < POLL_S


def test_one_message_leaves_at_most_half_of_what_counts() -> None:
    idle_time = IdleTime(0.0)
    idle_time.halve(86_400.0)

    assert idle_time.idle_s(86_400.0) == MAX_IDLE_S / 2
    assert idle_time.idle_s(86_410.0) == MAX_IDLE_S / 2 + 10.0


def test_new_queue_is_not_idle() -> None:
    assert IdleTime(1000.0).idle_s(1000.0) == 0.0
