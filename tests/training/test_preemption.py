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


def test_an_evaluation_is_given_up(stopped):
    preemption.between_batches()
    with preemption.watch():
        preemption.between_batches()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(preemption.Interrupted, match="SIGTERM"):
            preemption.between_batches()
    preemption.between_batches()
    assert stopped == []
