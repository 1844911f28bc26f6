"""Threads of one core each: every piece of work is done once, errors come through, and the caller's surroundings do not leak in."""

from __future__ import annotations

import functools
import multiprocessing
import threading
import time

import pytest
import torch

from sparsedsl.runtime.threads import run_all, share


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tasks_run_side_by_side(count):
    """Each waits for all others: they could not end one after the other."""
    together, seen = threading.Barrier(count, timeout=30), []

    def task(number):
        together.wait()
        seen.append((number, threading.get_ident(), torch.get_num_threads()))

    run_all([functools.partial(task, number) for number in range(count)])
    assert sorted(number for number, _, _ in seen) == list(range(count))
    assert len({thread for _, thread, _ in seen}) == count
    assert {threads for _, _, threads in seen} == {1}, "one thread inside torch"


def test_the_callers_number_of_threads_stays():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            run_all([lambda: None] * 2)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_every_piece_is_taken_once(workers, count):
    done = []
    share((functools.partial(done.append, number) for number in range(count)), workers)
    assert sorted(done) == list(range(count))


def test_pieces_are_made_by_one_thread_at_a_time():
    """They come from a generator, which two threads may not enter at once."""
    done = []

    def pieces():
        for number in range(200):
            time.sleep(1e-5)  # long enough for another thread to come by
            yield functools.partial(done.append, number)

    share(pieces(), 4)
    assert sorted(done) == list(range(200))


def test_the_first_error_is_raised_when_all_are_done():
    done = []

    def fail(text):
        raise ValueError(text)

    with pytest.raises(ValueError, match="one"):
        run_all([functools.partial(done.append, 0), lambda: fail("one"), lambda: fail("two"), functools.partial(done.append, 3)])
    assert sorted(done) == [0, 3]
    with pytest.raises(ValueError, match="in a piece"):
        share([functools.partial(done.append, 1), lambda: fail("in a piece")], 2)
    with pytest.raises(ZeroDivisionError):
        share((1 // 0 for _ in range(3)), 2)
    run_all([functools.partial(done.append, 9)] * 2)
    assert done.count(9) == 2, "the threads are still there"


def test_tasks_see_neither_gradients_nor_autocast():
    seen = []
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        run_all([lambda: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))] * 2)
    assert seen == [(False, False)] * 2


def test_tasks_may_write_to_tensors_of_inference_mode():
    with torch.inference_mode():
        t = torch.zeros(4)
        run_all([lambda: t[:2].add_(1), lambda: t[2:].add_(2)])
        assert t.tolist() == [1, 1, 2, 2]


def test_callers_on_several_threads():
    done = []

    def caller(number):
        for turn in range(20):
            run_all([functools.partial(done.append, (number, turn, part)) for part in range(2)])

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(3)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(timeout=60)
    assert sorted(done) == [(number, turn, part) for number in range(3) for turn in range(20) for part in range(2)]


def _child(queue):
    done = []
    run_all([functools.partial(done.append, 1), functools.partial(done.append, 2)])
    queue.put(sorted(done))


def test_a_forked_process_has_threads_of_its_own():
    run_all([lambda: None] * 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == [1, 2]
    finally:
        child.join(timeout=60)
        assert child.exitcode == 0
