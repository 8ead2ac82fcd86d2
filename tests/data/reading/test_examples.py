"""Examples as rows: what is learned, which example comes when, and what happens to long prompts."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.reading.examples import (
    Examples,
    Pair,
    eval_example_batches,
    eval_ids,
    example_ids,
    steps_per_epoch,
    train_example_batches,
)
from data.tokenizer import Tokenizer

PAIRS = [Pair(f"And he said {i}:", (" yes" if i % 2 else " no",)) for i in range(21)]
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer(store):
    return Tokenizer(store / "tokenizer.model")


@pytest.fixture(scope="module")
def examples(tokenizer):
    return Examples(PAIRS, tokenizer, LENGTH)


def train(examples, start_step=0, stop_step=9, sharding=None):
    options = {"seq_len": LENGTH, "batch_size": 8, "seed": 3, "sharding": sharding}
    with train_example_batches(
        examples, start_step=start_step, stop_step=stop_step, **options
    ) as batches:
        return {step: jax.device_get(batch) for step, batch in batches}


def test_a_row_is_eos_prompt_target_eos_and_the_target_is_learned(examples, tokenizer):
    arrays = examples.arrays([5], 1, LENGTH)
    prompt, target = tokenizer.encode(PAIRS[5].prompt), tokenizer.encode(" yes")
    row = [tokenizer.eos_id, *prompt, *target, tokenizer.eos_id]
    assert arrays["inputs"][0, : len(row) - 1].tolist() == row[:-1]
    assert arrays["targets"][0, : len(row) - 1].tolist() == row[1:]
    learned = arrays["targets"][0][arrays["weights"][0] == 1]
    assert learned.tolist() == [*target, tokenizer.eos_id]
    assert (arrays["inputs"][0, len(row) :] == tokenizer.pad_id).all()
    assert [arrays[name].dtype.name for name in ("inputs", "targets", "weights")] == [
        "int32", "int32", "float32",
    ]  # fmt: skip


def test_each_epoch_has_each_example_once_and_ends_with_a_smaller_batch():
    assert steps_per_epoch(21, 8) == 3
    orders = []
    for epoch in range(3):
        ids = [example_ids(3, epoch * 3 + i, 8, 21) for i in range(3)]
        assert [len(part) for part in ids] == [8, 8, 5]
        orders.append(np.concatenate(ids).tolist())
        assert sorted(orders[-1]) == list(range(21))
    assert orders[0] != orders[1]
    assert example_ids(4, 0, 8, 21).tolist() != example_ids(3, 0, 8, 21).tolist()
    assert len(example_ids(0, 5, 8, 3)) == 3  # fewer examples than rows


def test_batches_are_those_of_their_step_and_filled_up_with_weight_0(examples):
    batches = train(examples)
    assert sorted(batches) == list(range(9))
    for step, batch in batches.items():
        ids = example_ids(3, step, 8, 21)
        expected = examples.arrays(ids, 8, LENGTH)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, expected[name])
        assert (batch["weights"].sum(1) > 0).sum() == len(ids)
    for step, batch in train(examples, start_step=4).items():
        for name, array in batch.items():
            np.testing.assert_array_equal(array, batches[step][name])


def test_every_shard_has_its_rows(examples):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    whole, split = train(examples), train(examples, sharding=sharding)
    for step, batch in split.items():
        for name, array in batch.items():
            np.testing.assert_array_equal(array, whole[step][name])


def test_evaluation_has_each_example_once_in_order(examples):
    batches = [
        jax.device_get(b) for b in eval_example_batches(examples, seq_len=LENGTH, batch_size=8)
    ]
    assert len(batches) == 3
    inputs = np.concatenate([batch["inputs"] for batch in batches])
    expected = examples.arrays(range(21), 24, LENGTH)
    np.testing.assert_array_equal(inputs, expected["inputs"])
    weights = np.concatenate([batch["weights"] for batch in batches])
    np.testing.assert_array_equal(weights, expected["weights"])
    assert not weights[21:].any()


def test_an_evaluation_of_some_examples_is_of_any_of_them(examples):
    """The first ones may all be of one class."""
    few = eval_example_batches(examples, seq_len=LENGTH, batch_size=8, max_batches=2)
    inputs = np.concatenate([jax.device_get(batch)["inputs"] for batch in few])
    ids = eval_ids(21, 8, 2)
    assert sorted(ids.tolist()) != list(range(16))
    np.testing.assert_array_equal(inputs, examples.arrays(ids, 16, LENGTH)["inputs"])


def test_a_long_prompt_loses_its_left_and_leaves_room_for_any_answer(tokenizer):
    long = "In the beginning God created the heaven and the earth. And the end:"
    answers = (" yes", " the answer of all")
    examples = Examples([Pair(long, answers), Pair("Short:", (" no",))], tokenizer, LENGTH)
    assert examples.truncated == 1
    kept = examples.prompts[0]
    assert long.endswith(kept)
    assert kept != long
    longest = len(tokenizer.encode(answers[1])) + 1
    assert examples.max_target == longest
    assert 1 + len(tokenizer.encode(kept)) + longest <= LENGTH + 1
    assert 1 + len(tokenizer.encode(kept)) + longest >= LENGTH - 2  # no more is lost than needed
    assert examples.prompts[1] == "Short:"
    assert examples.longest <= LENGTH


def test_the_longest_prompt_has_room_for_the_longest_answer(tokenizer):
    """Which may be another example's: any of them may be what a model answers."""
    long, short = Pair("And the evening and the morning:", (" no",)), Pair("It:", (" entailment",))
    examples = Examples([long, short], tokenizer, LENGTH)
    prompt, answer = tokenizer.encode(long.prompt), tokenizer.encode(" entailment")
    assert examples.max_target == len(answer) + 1
    # EOS, the prompt, the answer; its own EOS is not fed.
    assert examples.longest_decoded == 1 + len(prompt) + len(answer)
    own = tokenizer.encode(" no")
    assert examples.longest == 1 + len(prompt) + len(own)


def test_characters_of_several_bytes_are_cut_somewhere(tokenizer):
    examples = Examples([Pair("𝕏" * 40 + ":", (" yes",))], tokenizer, LENGTH)
    assert examples.truncated == 1
    assert len(tokenizer.encode(examples.prompts[0])) + examples.max_target <= LENGTH


def test_the_fingerprint_is_that_of_the_content(tokenizer, examples):
    assert Examples(PAIRS, tokenizer, LENGTH).fingerprint == examples.fingerprint
    other = [*PAIRS[:-1], Pair(PAIRS[-1].prompt, (" yes",))]
    assert Examples(other, tokenizer, LENGTH).fingerprint != examples.fingerprint


def test_an_answer_that_fills_the_row_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"data.seq_len=8: the answer ' a very long .* no room"):
        Examples([Pair("Why:", (" a very long answer to it",))], tokenizer, 8)
