"""Records on their way to a slow store: in order, in batches, kept while it is away."""

import threading

import pytest

from nnx_fit.loggers.sending import Sender

PATIENCE = 30.0


class Store:
    """Takes items; away or refusing on request."""

    def __init__(self, most=3):
        self.got = []
        self.batches = []
        self.error = None
        self.sender = Sender(self.take, lambda error: isinstance(error, ValueError), most)

    def take(self, items):
        if self.error is not None:
            raise self.error
        self.got.extend(items)
        self.batches.append(len(items))


def test_everything_arrives_in_order_and_no_batch_is_too_large():
    store, gate = Store(most=3), threading.Event()
    store.sender.call(gate.wait)  # so that all that follows waits together
    store.sender.put([1, 2, 3, 4])
    store.sender.call(lambda: store.got.append("call"))
    store.sender.put([5])
    gate.set()
    store.sender.drain(PATIENCE)
    assert store.got == [1, 2, 3, 4, "call", 5]
    assert store.batches == [3, 1, 1]


def test_the_caller_does_not_wait_for_the_store():
    store, gate = Store(), threading.Event()
    store.sender.call(gate.wait)
    store.sender.put([1])  # returns although the store is busy
    assert store.got == []
    gate.set()
    store.sender.drain(PATIENCE)
    assert store.got == [1]


def test_what_is_put_while_the_store_is_away_is_sent_when_it_is_back():
    store = Store()
    store.error = ConnectionError("server gone")
    store.sender.put([1])
    with pytest.raises(ConnectionError, match="server gone"):
        store.sender.drain(PATIENCE)
    store.error = None
    store.sender.put([2])
    store.sender.drain(PATIENCE)
    assert store.got == [1, 2]


def test_an_error_is_raised_by_the_next_call_whose_items_are_taken_all_the_same():
    store, after = Store(), threading.Event()

    def bad():
        raise ValueError("no such name")

    store.sender.call(bad)
    try:
        store.sender.call(after.set)
    except ValueError:  # it met the error already
        after.set()
        return
    assert after.wait(PATIENCE)
    with pytest.raises(ValueError, match="no such name"):
        store.sender.put([1])
    store.sender.drain(PATIENCE)
    assert store.got == [1]


def test_what_the_store_refuses_does_not_hold_up_the_rest():
    store = Store()

    def bad():
        raise ValueError("no such name")

    store.sender.call(bad)
    with pytest.raises(ValueError, match="no such name"):
        store.sender.drain(PATIENCE)
    store.sender.put([1])
    store.sender.drain(PATIENCE)
    assert store.got == [1]


def test_a_store_that_hangs_is_given_up_after_the_timeout():
    store, gate = Store(), threading.Event()
    store.sender.call(gate.wait)
    with pytest.raises(TimeoutError, match="1 records"):
        store.sender.drain(0.0)
    gate.set()
    store.sender.drain(PATIENCE)


def test_the_oldest_are_given_up_where_too_many_wait(monkeypatch):
    monkeypatch.setattr("nnx_fit.loggers.sending.MOST_WAITING", 4)
    store, gate = Store(most=9), threading.Event()
    store.sender.call(gate.wait)
    store.sender.put(range(7))
    gate.set()
    store.sender.drain(PATIENCE)
    assert store.got == [3, 4, 5, 6]
