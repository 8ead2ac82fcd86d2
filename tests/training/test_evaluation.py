"""The loss on the validation split: the device has its next batch before the host reads."""

from types import SimpleNamespace

import pytest

from laser.training.evaluation import on_validation
from laser.training.objectives.base import Sums
from laser.training.rows import Validation


class Read:
    """A number on a device, which notes when the host waits for it."""

    def __init__(self, events, name, value):
        self.events, self.name, self.value = events, name, value

    def __float__(self):
        self.events.append(f"read {self.name}")
        return self.value


def test_every_batch_counts_once_and_is_read_when_the_next_is_on_its_way():
    events = []

    def eval_step(params, batch):
        events.append(f"start {batch}")
        nll = Read(events, batch, 3.0 * batch)
        return Sums(loss=0.0, nll=nll, tokens=2.0, attention_range=0.0, shares={})

    program = SimpleNamespace(config=None, batch_sharding=None, eval_step=eval_step)
    part = Validation("", 1.0, iter([1, 2, 3]), tokens=6, bytes=12)
    rows = SimpleNamespace(validation_parts=lambda config, sharding: [part])
    metrics = on_validation(program, rows, SimpleNamespace(params=None))
    assert events == ["start 1", "start 2", "read 1", "start 3", "read 2", "read 3"]
    assert metrics["eval/loss"] == pytest.approx(18 / 6)
    assert metrics["eval/bits_per_byte"] == pytest.approx(18 / 0.6931471805599453 / 12)


@pytest.mark.parametrize(
    ("step", "names"), [(7, {"eval/loss"}), (8, {"eval/loss", "eval/loss/train"})]
)
def test_a_part_of_the_end_waits_for_the_last_step(step, names):
    def eval_step(params, nll):
        return Sums(loss=0.0, nll=nll, tokens=2.0, attention_range=0.0, shares={})

    config = SimpleNamespace(training=SimpleNamespace(steps=8))
    program = SimpleNamespace(config=config, batch_sharding=None, eval_step=eval_step)
    parts = [Validation("", 1.0, iter([3.0])), Validation("train", 0.0, iter([2.0]), at_end=True)]
    rows = SimpleNamespace(validation_parts=lambda config, sharding: parts)
    metrics = on_validation(program, rows, SimpleNamespace(params=None, step=step))
    assert {*metrics} == names
    assert metrics["eval/loss"] == 1.5
    assert metrics.get("eval/loss/train", 1.0) == 1.0


def test_a_part_without_a_share_is_told_and_counts_for_nothing():
    def eval_step(params, nll):
        return Sums(loss=0.0, nll=nll, tokens=2.0, attention_range=0.0, shares={"error": nll / 4})

    program = SimpleNamespace(config=None, batch_sharding=None, eval_step=eval_step)
    parts = [Validation("", 1.0, iter([3.0])), Validation("test", 0.0, iter([float("inf")]))]
    rows = SimpleNamespace(validation_parts=lambda config, sharding: parts)
    assert on_validation(program, rows, SimpleNamespace(params=None)) == {
        "eval/loss": 1.5,
        "eval/loss/test": float("inf"),
        "eval/error": 0.375,
        "eval/error/test": float("inf"),
    }
