"""The order of rows: a permutation in every epoch, in blocks, from the step alone."""

import random

import numpy as np
import pytest

from data.reading.order import ROUNDS, places_at, shuffled, step_places

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def _positions(seed, start, stop, num_rows):
    """Rows at positions [start, stop) of the endless order without blocks."""
    return places_at(seed, np.arange(start, stop), num_rows, num_rows, 1).rows


def _mixed(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def _permutation(key, count):
    """Where a key's network sends 0, 1, 2...: a list, one number at a time."""
    bits = 2
    while 4**bits < count:
        bits += 1

    def once(value):
        left, right = value >> bits, value % 2**bits
        for i in range(ROUNDS):
            key_of_round = _mixed((key + (i + 1) * GOLDEN) & MASK)
            left, right = right, left ^ _mixed((right + key_of_round) & MASK) >> (64 - bits)
        return left << bits | right

    found = []
    for value in range(count):
        value = once(value)
        while value >= count:
            value = once(value)
        found.append(value)
    return found


def _epoch(seed, epoch, num_rows, lanes, block_rows):
    """The whole epoch as a list of (row, first row and length of its block), by cutting up a list
    of all rows."""
    number = _mixed(_mixed((seed + GOLDEN) & MASK) ^ (epoch * GOLDEN & MASK))
    size = min(block_rows, num_rows // lanes)
    rounds = num_rows // (lanes * size) if size else 0
    left = num_rows - rounds * lanes * size
    gap = _mixed(number ^ GOLDEN) % (rounds * lanes + 1) * size
    rows = list(range(num_rows))
    others, rows = rows[gap : gap + left], rows[:gap] + rows[gap + left :]
    short = left // lanes
    order = []
    for part, (part_rows, length) in enumerate(
        [(rows, size), (others[: short * lanes], short), (others[short * lanes :], 1)]
    ):
        own = _mixed((number + part) & MASK)
        blocks = [part_rows[i : i + length] for i in range(0, len(part_rows), length or 1)]
        inner = [
            _permutation(_mixed(own ^ _mixed((i + GOLDEN) & MASK)), length)
            for i in range(len(blocks))
        ]
        chosen = _permutation(own, len(blocks))
        while chosen:
            now, chosen = chosen[:lanes], chosen[lanes:]
            for turn in range(length):
                order += [(blocks[i][inner[i][turn]], blocks[i][0], length) for i in now]
    return order


def _random_case(rng):
    num_rows = rng.choice([rng.randrange(1, 30), 250, rng.randrange(1, 200)])
    batch = rng.choice([1, 2, rng.randrange(1, 40), rng.randrange(1, 300)])
    return rng.randrange(-5, 2**70), num_rows, batch, rng.choice([1, 2, rng.randrange(1, 300)])


@pytest.mark.slow
def test_the_order_is_that_of_whole_epochs_written_out():
    """80 random seeds, numbers of rows, batches and blocks; steps in any order, over the ends of
    epochs; batches larger than the number of blocks, and than the number of rows."""
    rng = random.Random(0)
    for _ in range(80):
        seed, num_rows, batch, block = case = _random_case(rng)
        epochs = [_epoch(seed, e, num_rows, batch, block) for e in range(2)]
        for epoch in epochs:
            assert sorted(row for row, *_ in epoch) == list(range(num_rows)), case
        steps = range(2 * num_rows // batch)
        last = max(len(steps) - 1, 0)
        for step in rng.sample(steps, min(4, len(steps))):
            places = step_places(seed, step, batch, num_rows, block)
            found = list(zip(places.rows, places.first, places.length))
            assert found == [*epochs[0], *epochs[1]][step * batch : (step + 1) * batch], case
        later = step_places(seed, last, batch, num_rows, block, steps=3)
        alone = [step_places(seed, last + i, batch, num_rows, block).rows for i in range(3)]
        assert later.rows.tolist() == np.concatenate(alone).tolist(), case
        places = step_places(seed, 0, 2 * num_rows, num_rows, block)  # more than an epoch at once
        halves = places.rows.reshape(2, num_rows)
        assert (np.sort(halves) == np.arange(num_rows)).all(), case


@pytest.mark.parametrize("hosts", [1, 4])
def test_hosts_read_each_block_once_and_alone(hosts):
    """A host has its part of each batch; in full rounds no block is read by two, or twice."""
    num_rows, batch, block = 10_000, 32, 16
    rounds, own = num_rows // (batch * block), batch // hosts
    readers = {}
    for step in range(rounds * block):
        places = step_places(3, step, batch, num_rows, block)
        assert len(set(places.first.tolist())) == batch  # as many places as rows
        for i, first in enumerate(places.first.tolist()):
            readers.setdefault(first, set()).add((i // own, step // block))
    assert len(readers) == rounds * batch
    assert all(len(by) == 1 for by in readers.values())


def test_epochs_and_seeds_differ_and_neighbours_are_unrelated():
    num_rows = 50_000
    orders = [
        _positions(0, 0, num_rows, num_rows),
        _positions(0, num_rows, 2 * num_rows, num_rows),
        _positions(1, 0, num_rows, num_rows),
        np.arange(num_rows),
    ]
    limit = 5 / np.sqrt(num_rows)  # five standard deviations of an accidental correlation
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert abs(np.corrcoef(order, other)[0, 1]) < limit
            assert (order == other).sum() < 10  # one is expected
    for order in orders[:3]:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
        steps = np.diff(order) % num_rows
        assert np.unique(steps, return_counts=True)[1].max() < 12  # one is expected


@pytest.mark.parametrize("num_rows", [50_000, 2**16, 2**16 + 1])
def test_the_ranks_of_rows_that_lie_together_are_unrelated(num_rows):
    # Rows of one document are neighbours in the store: they must not meet in a batch more often
    # than any others do.
    for epoch in range(3):
        ranks = np.argsort(_positions(5, epoch * num_rows, (epoch + 1) * num_rows, num_rows))
        limit = 5 / np.sqrt(num_rows)
        for distance in (1, 2, 3, 8, 256, 1024):
            near, far = ranks[:-distance], ranks[distance:]
            assert abs(np.corrcoef(near, far)[0, 1]) < limit
            same_batch = near // 1024 == far // 1024
            expected = len(near) * 1024 / num_rows
            assert abs(same_batch.sum() - expected) < 5 * np.sqrt(expected)


def test_the_order_is_what_it_was():
    # Frozen: another order would silently change what a resumed run reads.
    assert step_places(0, 0, 8, 1000).rows.tolist() == [724, 546, 473, 158, 978, 90, 769, 346]
    assert step_places(1, 10**6, 4, 2**40).rows.tolist() == [
        499272106909,
        278779219678,
        145477994077,
        237859037069,
    ]
    assert shuffled(0, 0, 1000)[:8].tolist() == [902, 757, 376, 785, 714, 165, 650, 542]


def test_all_orders_of_few_rows_are_equally_frequent():
    orders = _positions(0, 0, 6000 * 3, 3).reshape(6000, 3)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_late_steps_and_many_rows_cost_nothing():
    rows = step_places(-5, 10**12, 4096, 2**40).rows
    assert len(np.unique(rows)) == 4096
    assert rows.min() >= 0
    assert rows.max() < 2**40
    assert 0.45 < (rows < 2**39).mean() < 0.55


@pytest.mark.parametrize(
    "step, batch_size, num_rows, block_rows",
    [(0, 4, 0, 1), (0, 4, -1, 1), (0, 4, 2**61, 1), (-1, 4, 8, 1), (0, 0, 8, 1), (0, 4, 8, 0)],
)
def test_what_is_out_of_range_is_an_error(step, batch_size, num_rows, block_rows):
    with pytest.raises(ValueError) as error:
        step_places(0, step, batch_size, num_rows, block_rows)
    assert "=" in str(error.value)
