"""Small jobs beside the loop: done in time, one after the other, until they are closed."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time

import pytest
from stoker.periodic import Periodic, Task, backoff

from support import LONG, until


def test_jobs_are_done_every_so_many_seconds_until_they_are_closed() -> None:
    often, seldom = _Count(), _Count()
    jobs = Periodic([Task(0.02, often), Task(3600.0, seldom)])
    until(lambda: often.times >= 3)
    jobs.close()
    done = often.times
    time.sleep(0.2)
    assert (often.times, seldom.times) == (done, 0)


def test_those_of_one_name_share_a_thread_and_an_earlier_job_wakes_it() -> None:
    first, second = _Count(), _Count()
    long = Periodic([Task(3600.0, first)], "shared")
    short = Periodic([Task(0.02, second)], "shared")
    until(lambda: second.times >= 1)
    assert [thread.name for thread in threading.enumerate()].count("shared") == 1
    long.close()
    short.close()
    again = Periodic([Task(0.02, first)], "shared")  # the thread has nothing to do then, and is still there
    until(lambda: first.times >= 1)
    again.close()
    assert [thread.name for thread in threading.enumerate()].count("shared") == 1


def test_to_close_waits_for_the_job_under_way() -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    jobs = Periodic([Task(0.01, slow)], "slow")
    assert begun.wait(LONG)
    jobs.close()
    assert ended.is_set()


def test_a_job_may_close_its_own() -> None:
    held: list[Periodic] = []
    made, done = threading.Event(), _Count()

    def once() -> None:
        done()
        made.wait(LONG)
        held[0].close()

    held.append(Periodic([Task(0.01, once)], "once"))
    made.set()
    until(lambda: done.times >= 1)
    time.sleep(0.2)
    assert done.times == 1


def test_what_fails_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries = _Count()

    def fail() -> None:
        tries()
        raise OSError("no room")

    with caplog.at_level(logging.WARNING, "stoker"):
        jobs = Periodic([Task(0.01, fail)], "fails")
        until(lambda: tries.times >= 3)
        jobs.close()
    assert [record.getMessage() for record in caplog.records] == ["OSError: no room"]


def test_a_process_made_by_fork_has_a_thread_of_its_own() -> None:
    jobs = Periodic([Task(3600.0, _Count())], "forked")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_count_in_child, args=(answers,))
    child.start()
    child.join(LONG)
    jobs.close()
    assert child.exitcode == 0
    assert answers.get() >= 1


def test_a_process_made_by_fork_closes_what_its_parent_is_doing_at_once() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(LONG)

    jobs = Periodic([Task(0.01, slow)], "forked while it works")
    assert begun.wait(LONG)
    child = multiprocessing.get_context("fork").Process(target=jobs.close)
    child.start()
    child.join(LONG)
    ended = child.exitcode
    child.kill()
    go_on.set()
    jobs.close()
    assert ended == 0


def test_a_pause_doubles_with_each_failure_up_to_the_longest_however_many_there_were() -> None:
    assert [backoff(failures, 0.5, 3.0) for failures in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff(10**6, 0.5, 30.0) == 30.0


def _count_in_child(answers: multiprocessing.SimpleQueue[int]) -> None:
    count = _Count()
    jobs = Periodic([Task(0.02, count)], "forked")
    until(lambda: count.times >= 1)
    jobs.close()
    answers.put(count.times)


class _Count:
    """How often it was called."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1
