"""The order of rows: a permutation in every epoch, unlike its neighbours, from the step alone."""

import numpy as np
import pytest

from data.order import row_ids


def _positions(seed, start, stop, num_rows):
    """Rows at positions [start, stop) of the endless order, read in steps of one batch."""
    return row_ids(seed, 0, stop, num_rows)[start:]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_every_epoch_visits_every_row_once(num_rows):
    for epoch in range(3):
        rows = _positions(7, epoch * num_rows, (epoch + 1) * num_rows, num_rows)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(np.sort(rows), np.arange(num_rows))


def test_steps_go_over_the_ends_of_epochs():
    num_rows, batch_size = 10, 4
    steps = np.concatenate([row_ids(0, step, batch_size, num_rows) for step in range(5)])
    np.testing.assert_array_equal(np.sort(steps[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(steps[10:]), np.arange(10))


@pytest.mark.parametrize("batch_size", [1, 6, 8, 24])
def test_the_order_does_not_depend_on_the_batch_size(batch_size):
    steps = [row_ids(3, step, batch_size, 100) for step in range(240 // batch_size)]
    np.testing.assert_array_equal(np.concatenate(steps), _positions(3, 0, 240, 100))


def test_the_order_is_what_it_was():
    # Frozen: another order would silently change what a resumed run reads.
    assert row_ids(0, 0, 8, 1000).tolist() == [902, 757, 376, 785, 714, 165, 650, 542]
    assert row_ids(1, 10**6, 4, 2**40).tolist() == [
        941516131361,
        764862071464,
        981621230367,
        836300948673,
    ]


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


def test_all_orders_of_few_rows_are_equally_frequent():
    orders = _positions(0, 0, 6000 * 3, 3).reshape(6000, 3)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_late_steps_and_many_rows_cost_nothing():
    rows = row_ids(-5, 10**12, 4096, 2**40)
    assert len(np.unique(rows)) == 4096
    assert rows.min() >= 0
    assert rows.max() < 2**40
    assert 0.45 < (rows < 2**39).mean() < 0.55


@pytest.mark.parametrize(
    "step, batch_size, num_rows", [(0, 4, 0), (0, 4, -1), (0, 4, 2**61), (-1, 4, 8), (0, 0, 8)]
)
def test_what_is_out_of_range_is_an_error(step, batch_size, num_rows):
    with pytest.raises(ValueError) as error:
        row_ids(0, step, batch_size, num_rows)
    assert "=" in str(error.value)
