"""Reading pictures in threads, one batch ahead."""

import threading
import time

import pytest

from hf_tgpt.data.read_ahead import read_batches

NAME = "read-ahead"


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_items_come_in_order_however_long_each_takes():
    def read(item):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return -item

    batches = list(read_batches(read, range(10), 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [pair for batch in batches for pair in batch] == [(i, -i) for i in range(10)]


def test_the_next_batch_is_read_while_the_caller_works_and_none_after_it():
    done = []
    batches = read_batches(lambda item: done.append(item), range(100), 3)
    for number in range(1, 5):
        next(batches)
        wait_until(lambda number=number: len(done) == 3 * (number + 1))  # without another call of next
        time.sleep(0.02)
        assert sorted(done) == list(range(3 * (number + 1)))
    batches.close()


def test_a_source_without_a_length_is_taken_batch_by_batch():
    taken = []

    def arriving():
        for item in range(100):
            taken.append(item)
            yield item

    batches = read_batches(str, arriving(), 3, ahead=False)
    for number in range(1, 4):
        assert [item for item, _ in next(batches)] == taken[-3:]
        time.sleep(0.02)
        assert len(taken) == 3 * number
    batches.close()


def test_an_abandoned_iterator_stops_reading_and_leaves_no_thread():
    done, goes_on = [], threading.Event()

    def read(item):
        if item >= 40:
            goes_on.wait(10)
        done.append(item)

    batches = read_batches(read, range(1000), 40)
    next(batches)
    assert threads()
    start = time.monotonic()
    batches.close()  # the pictures that are being read right now are not waited for
    assert time.monotonic() - start < 5
    goes_on.set()
    wait_until(lambda: not threads())
    assert len(done) <= 40 + 16  # one for each thread


def test_an_error_is_raised_at_its_batch_and_ends_the_threads():
    def read(item):
        return 1 / (item - 5)

    batches = read_batches(read, range(8), 2)
    assert [[item for item, _ in next(batches)] for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    wait_until(lambda: not threads())


def test_items_that_hold_something_in_common_are_read_in_turn_by_the_caller():
    readers = {}
    batches = read_batches(
        lambda item: readers.setdefault(item, threading.current_thread()), range(6), 3, alone=lambda item: item % 2 == 0
    )
    list(batches)
    assert [item for item, reader in sorted(readers.items()) if reader is threading.current_thread()] == [0, 2, 4]
