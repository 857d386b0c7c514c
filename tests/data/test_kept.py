"""The bounded memory of what was read: every item is loaded once, and its bytes are counted once."""

import threading
import time

import numpy as np
import pytest

from sslvit.data.kept import Kept


def item(size=10):
    return np.zeros(size, np.uint8)


def test_the_last_used_stay_within_the_limit():
    kept, loads = Kept(30), []
    for key in "abcadab":
        kept.get(key, lambda key=key: loads.append(key) or item())
    assert loads == list("abcdb") and kept.bytes == 30 and list(kept._items) == list("dab")


def test_who_waits_for_an_item_never_loads_it_again_though_it_is_pushed_out_at_once():
    """Room for one item, three keys, eight threads: nobody loads what somebody loads, and no bytes count twice."""
    kept, busy, twice = Kept(10), set(), []

    def load(key):
        twice.extend([key] * (key in busy))
        busy.add(key)
        time.sleep(0.0005)
        busy.discard(key)
        return item()

    def ask(number):
        for turn in range(60):
            key = (turn * turn + number // 3) % 3
            kept.get(key, lambda key=key: load(key))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not twice and kept.bytes == 10 and len(kept._items) == 1


def test_an_error_is_that_of_all_who_waited_and_of_nobody_later():
    kept, got, started, go = Kept(15), [], threading.Event(), threading.Event()

    def broken():
        started.set()
        go.wait(5)
        raise ValueError("no")

    def ask():
        try:
            got.append(kept.get("a", broken))
        except ValueError as error:
            got.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert started.wait(5)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(5)
    assert got == ["no"] * 3 and len(kept.get("a", item)) == 10
    with pytest.raises(ZeroDivisionError):
        kept.get("b", lambda: 1 // 0)
