"""Batches: what is in them, which host reads what, and how errors and the end arrive."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.reading import loader
from data.reading.blocks import BlockReader
from data.reading.loader import Prefetcher, eval_batches, train_batches
from data.reading.order import step_places
from data.reading.store import StoreChangedError
from tests.data.padded import padded_rows

EOS, PAD, LENGTH = 1, 0, 6


@pytest.fixture
def split(make_store):
    """200 rows of 6 tokens and 5 tokens more, documents of 10 tokens."""
    stream = [EOS if i % 10 == 0 else 100 + i for i in range(200 * LENGTH + 1 + 5)]
    return make_store(train=[stream[:500], stream[500:]]).split("train")


def _train(split, stop_step=4, **changes):
    arguments = {
        "seq_len": LENGTH,
        "batch_size": 16,
        "seed": 3,
        "start_step": 0,
        "stop_step": stop_step,
        "segment_ids": False,
        "eos_id": EOS,
    }
    return train_batches(split, **(arguments | changes))


def _eval(split, **changes):
    arguments = {"seq_len": LENGTH, "batch_size": 16, "eos_id": EOS, "pad_id": PAD}
    return eval_batches(split, **(arguments | {"segment_ids": False} | changes))


def test_a_batch_is_the_rows_of_its_step(split):
    with _train(split) as batches:
        steps = [(step, jax.device_get(batch)) for step, batch in batches]
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    for step, batch in steps:
        rows = split.rows(step_places(3, step, 16, 200).rows, LENGTH)
        assert set(batch) == {"inputs", "targets", "weights"}
        np.testing.assert_array_equal(batch["inputs"], rows[:, :-1])
        np.testing.assert_array_equal(batch["targets"], rows[:, 1:])
        np.testing.assert_array_equal(batch["weights"], np.ones((16, LENGTH)))
        assert [a.dtype.name for a in batch.values()] == ["int32", "int32", "float32"]


def test_a_later_start_gives_the_same_batches(split):
    with (
        _train(split, stop_step=20) as all_batches,
        _train(split, start_step=15, stop_step=20) as late_batches,
    ):
        expected = dict(all_batches)
        late = dict(late_batches)
    assert list(late) == [15, 16, 17, 18, 19]
    for step, batch in late.items():
        np.testing.assert_array_equal(batch["inputs"], expected[step]["inputs"])


def test_a_store_that_is_written_over_ends_training_with_the_name_of_the_file(make_store):
    store = make_store(train=[[i % 50 for i in range(200 * LENGTH + 1)]])
    path = store.path / "train-00000.bin"
    with _train(store.split("train"), stop_step=10_000) as batches:
        next(batches)
        path.write_bytes(path.read_bytes()[::-1])
        os.utime(path, ns=(0, 0))
        with pytest.raises(StoreChangedError, match=f"{path}: was written to since"):
            for _ in batches:  # those that were made before are right
                pass


class Recorded:
    """A split that counts what is read of it at a time, and what is held."""

    def __init__(self, split):
        self.split, self.pieces, self.lock = split, [], threading.Lock()
        self.under_way = self.most_under_way = 0
        self.together = None  # a barrier, to see that reads overlap

    def __getattr__(self, name):
        return getattr(self.split, name)

    def piece(self, first, count, seq_len):
        with self.lock:
            self.pieces.append((first, count))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        if self.together is not None:
            self.together.wait(10)
        found = self.split.piece(first, count, seq_len)
        with self.lock:
            self.under_way -= 1
        return found


def test_a_block_is_read_once_for_all_of_its_steps(split):
    recorded = Recorded(split)
    with _train(recorded, stop_step=12, block_rows=6) as batches:  # a round is 6 steps
        assert len(list(batches)) == 12
    assert len(recorded.pieces) == len(set(recorded.pieces)) == 2 * 16
    assert {count for _, count in recorded.pieces} == {6}


def test_reads_overlap_and_no_more_than_are_asked_for(split):
    recorded = Recorded(split)
    recorded.together = threading.Barrier(8)  # of 16 lanes: each read waits for 7 others
    with _train(recorded, stop_step=6, block_rows=6, requests=8) as batches:
        assert len(list(batches)) == 6
    assert recorded.most_under_way == 8


def test_no_more_blocks_are_kept_than_the_steps_ahead_need(split):
    plan = ((step, split.places(3, step, 16, LENGTH, 3)) for step in range(24))
    with BlockReader(split, LENGTH, plan, read_ahead=6) as reader:
        held = [reader.num_blocks for _ in reader]
    # Of each of the 16 lanes: this step is done, and the 6 after it touch 2 or 3 blocks.
    assert max(held) == 16 * 3
    assert held[-1] == 0


def test_an_eos_belongs_to_the_document_after_it(make_store):
    split = make_store(train=[[EOS, 5, 6, EOS, 7, EOS, EOS, 8, EOS, 9, 9, 9, 9]]).split("train")
    with _train(split, batch_size=2, stop_step=1, segment_ids=True) as batches:
        _, batch = next(batches)
    segments = {
        tuple(i): s.tolist() for i, s in zip(np.array(batch["inputs"]), batch["segment_ids"])
    }
    assert segments[EOS, 5, 6, EOS, 7, EOS] == [2, 2, 2, 3, 3, 4]
    assert segments[EOS, 8, EOS, 9, 9, 9] == [2, 2, 3, 3, 3, 3]
    assert batch["segment_ids"].dtype == np.int32


@pytest.mark.parametrize("batch_size", [1, 16, 40, 300])
def test_evaluation_scores_every_token_exactly_once(split, batch_size):
    scored = []
    for batch in _eval(split, batch_size=batch_size, segment_ids=True):
        assert all(array.shape == (batch_size, LENGTH) for array in batch.values())
        assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
        scored += np.array(batch["targets"])[np.array(batch["weights"]) == 1].tolist()
        assert (np.array(batch["targets"])[np.array(batch["weights"]) == 0] == PAD).all()
    stream = split.rows(range(200), LENGTH)[:, :-1].ravel().tolist()
    last, valid = padded_rows(split, [200], LENGTH, PAD)
    assert valid[0] == 5
    assert scored == stream[1:] + last[0, :6].tolist()


def test_evaluation_of_some_batches_is_the_beginning(split):
    some = list(_eval(split, max_batches=2))
    assert len(some) == 2
    np.testing.assert_array_equal(some[1]["inputs"], list(_eval(split))[1]["inputs"])
    assert len(list(_eval(split, max_batches=99))) == 13


SPECS = {
    "batch over all devices": PartitionSpec(("data", "fsdp")),
    "copies": PartitionSpec("data"),
    "sequence too": PartitionSpec("data", "fsdp"),
    "one copy for each device": PartitionSpec(),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_device_holds_its_own_part(split, name):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    sharding = NamedSharding(mesh, SPECS[name])
    with _train(split, sharding=sharding) as batches, _train(split) as plain_batches:
        for (_, batch), (_, plain) in zip(batches, plain_batches):
            for key, array in batch.items():
                assert array.sharding == sharding
                assert len(array.addressable_shards) == 8
                for shard in array.addressable_shards:
                    np.testing.assert_array_equal(shard.data, np.array(plain[key])[shard.index])
    for batch, plain in zip(_eval(split, sharding=sharding), _eval(split)):
        np.testing.assert_array_equal(batch["weights"], plain["weights"])


HOST = """
import json, os, sys
index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // count}"
import jax
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from data.reading.loader import train_batches
from data.reading.blocks import BlockReader
from data.reading.store import Split, TokenStore
rows, blocks = [], []
gather, piece = BlockReader._gather, Split.piece
def gather_and_record(self, step, places):
    rows.extend(places.rows.tolist())
    return gather(self, step, places)
def piece_and_record(self, first, count, seq_len):
    blocks.append((first, count))
    return piece(self, first, count, seq_len)
BlockReader._gather, Split.piece = gather_and_record, piece_and_record
sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
split = TokenStore(folder).split("train")
with train_batches(split, seq_len=6, batch_size=16, seed=3, start_step=5, stop_step=6,
                   segment_ids=False, eos_id=1, sharding=sharding, prefetch=1) as batches:
    _, batch = next(batches)
shards = {s.index[0].start: s.data.tolist() for s in batch["inputs"].addressable_shards}
shape = batch["inputs"].shape
print(json.dumps({"read": rows, "blocks": blocks, "shards": shards, "shape": shape}))
"""


def _hosts(count: int, folder: Path, port: int) -> list[dict]:
    """Runs `count` processes that share 8 devices; what each of them read and holds."""
    root = Path(__file__).resolve().parents[3]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(i), str(count), str(port), str(folder)],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(output) for output in outputs]


@pytest.mark.slow
def test_two_hosts_read_half_each_and_make_the_same_batch(make_store, unused_port):
    store = make_store(train=[[(i * 37) % 5000 for i in range(200 * LENGTH + 1)]])
    (alone,) = _hosts(1, store.path, unused_port)
    pair = _hosts(2, store.path, unused_port)
    expected = step_places(3, 5, 16, 200).rows.tolist()
    assert alone["read"] == expected
    assert [host["read"] for host in pair] == [expected[:8], expected[8:]]
    assert sorted(pair[0]["blocks"] + pair[1]["blocks"]) == sorted(alone["blocks"])
    assert [len(host["blocks"]) for host in pair] == [8, 8]
    assert [host["shape"] for host in pair] == [[16, LENGTH]] * 2
    assert pair[0]["shards"] | pair[1]["shards"] == alone["shards"]


@pytest.fixture
def unused_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _fail_at_two(step):
    if step == 2:
        raise OSError("disk gone")
    return step, {}


def test_an_error_in_the_thread_reaches_next_with_its_traceback():
    batches = Prefetcher(_fail_at_two, range(5), prefetch=4)
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(OSError) as error:
        next(batches)
    assert "disk gone" in str(error.value)
    assert "_fail_at_two" in "".join(traceback.format_tb(error.value.__traceback__))
    assert not _threads()
    with pytest.raises(StopIteration):
        next(batches)


def _threads():
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def test_close_ends_the_thread_even_when_nobody_took_the_batches():
    made = []
    batches = Prefetcher(lambda step: (made.append(step), {}), range(10**9), prefetch=2)
    while len(made) < 3:
        time.sleep(0.01)
    batches.close()
    batches.close()
    assert not _threads()
    assert len(made) == 3  # two ready, and one in hand: no further ahead
    with pytest.raises(StopIteration):
        next(batches)


def test_leaving_the_context_by_an_error_ends_the_thread(split):
    def interrupted():
        with _train(split, stop_step=10**6) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not _threads()


def test_the_next_batch_is_ready_before_the_step_asks_for_it():
    begun = [threading.Event() for _ in range(9)]

    def make_batch(step):
        begun[step].set()
        return step, {}

    with Prefetcher(make_batch, range(9), prefetch=2) as batches:
        for step, _ in batches:
            # While the step computes: where batch step + 2 is begun, step + 1 lies ready.
            assert begun[min(step + 2, 8)].wait(10)


class Clock:
    """Stands for `time` in data/reading/loader.py; it moves only when told to."""

    def __init__(self):
        self.now = 0.0
        self.calls = 0
        self.asked = threading.Semaphore(0)  # released as often as `next` was called

    def perf_counter(self):
        before = self.now
        self.calls += 1
        if self.calls % 2:
            self.asked.release()
        return before


def test_seconds_waited_are_those_that_the_step_waits_for_a_slow_loader(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loader, "time", clock)

    def slow(step):
        assert clock.asked.acquire(timeout=10)
        clock.now += 3.0
        return step, {}

    with Prefetcher(slow, range(4), prefetch=2) as batches:
        for step, _ in batches:
            assert batches.seconds_waited == 3.0 * (step + 1)


def test_a_slow_step_waits_for_nothing(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loader, "time", clock)
    with Prefetcher(lambda step: (step, {}), range(4), prefetch=2) as batches:
        for _ in batches:
            clock.now += 5.0
        assert batches.seconds_waited == 0.0


def test_arguments_of_no_use_are_errors(split):
    with pytest.raises(ValueError) as error:
        _train(split, prefetch=0)
    assert "prefetch=0" in str(error.value)
    closed = []
    with pytest.raises(ValueError, match="prefetch=0"):
        Prefetcher(lambda step: (step, {}), range(4), 0, lambda: closed.append(True))
    assert closed == [True]
    with pytest.raises(ValueError) as error:
        _train(split, seq_len=10_000)
    assert "seq_len=10000" in str(error.value)
    assert not _threads()
