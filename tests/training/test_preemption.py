"""Signals are requests to save and leave; a second Ctrl-C, and nothing else, stops at once."""

import os
import signal

import pytest

from laser.training import preemption


@pytest.fixture
def stopped():
    """How often the handler of Ctrl-C from before was called."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGINT, before)


def test_only_a_second_ctrl_c_stops_at_once(stopped):
    with preemption.watch() as watched:
        assert not watched.stops()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.stops()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped == []
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [signal.SIGINT]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_each_signal_asks_to_save_and_leave(stopped, name):
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have it ignored
    with preemption.watch() as watched:
        os.kill(os.getpid(), getattr(signal, name))
        assert watched.stops()
        assert watched.name == name
    signal.signal(signal.SIGHUP, hung_up)
    assert stopped == []


def test_an_evaluation_is_given_up(stopped):
    signs = []
    preemption.between_batches()
    with preemption.watch(lambda: signs.append("alive")):
        preemption.between_batches()
        assert signs == ["alive"]
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(preemption.Interrupted, match="SIGTERM"):
            preemption.between_batches()
    preemption.between_batches()
    assert stopped == []
