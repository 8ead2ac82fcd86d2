"""A Conformer on tones by the trainer: on several meshes, in micro-batches, and what it keeps."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tones
from data.speech.prepare import SpeechConfig, prepare
from eval import speech as eval_speech
from eval.speech import make_evaluation
from laser.training import sharding
from laser.training.config import load_config
from laser.training.objectives import speech
from laser.training.objectives.speech import greedy_paths
from laser.training.program import Program
from laser.training.rows import resolved
from laser.training.share import over_batch
from laser.training.speech_rows import SpeechRows
from laser.training.step import make_gradient
from models import conformer
from models.conformer import BLANK

STEPS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "tones"
    prepare(SpeechConfig("tones:14", "tones:6@1", vocab_size=12), folder)
    return folder


def make_config(store, mesh=(1, 1, 1), attention="standard", **fields):
    config = tones.get_config(f"attention={attention}")
    small = {
        "data.store": str(store), "model.num_layers": 1, "model.model_dim": 16,
        "model.mlp_dim": 32, "model.num_heads": 2,
        "model.dropout": 0.1, "training.batch_size": 4, "training.steps": STEPS,
        "optimizer.warmup_steps": 1, "mesh.max_unsharded": 1.0,
        "mesh.data": mesh[0], "mesh.fsdp": mesh[1], "mesh.tensor": mesh[2],
    }  # fmt: skip
    config.update_from_flattened_dict(small | fields)
    config = load_config(config)
    return resolved(config, SpeechRows(config))


def make_program(config):
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return Program(config, sharding.make_mesh(config, jax.devices()[: np.prod(sizes)]))


def train(config):
    """Losses of its steps, and the state after them."""
    program = make_program(config)
    state, losses = program.init_state(), []
    with SpeechRows(config).train_batches(config, 0, program.batch_sharding) as batches:
        for _, batch in batches:
            assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
                lambda x: (x.shape, x.dtype), program.abstract_batch()
            )
            state, metrics = program.train_step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, state, program


def first_gradient(config):
    """Of the first batch, by leaf; and the sums."""
    program = make_program(config)
    gradient = jax.jit(sharding.on_mesh(program.mesh, make_gradient(config)))
    with SpeechRows(config).train_batches(config, 0, program.batch_sharding) as batches:
        return jax.device_get(gradient(program.init_state().params, next(batches)[1]))


@pytest.fixture(scope="module")
def on_one_device(store):
    config = make_config(store)
    return config, *train(config)


@pytest.mark.slow
def test_devices_equal_one(store, on_one_device):
    """Batch norm's moments are those of all rows, and the gradient knows it."""
    _, expected_losses, expected, _ = on_one_device
    losses, state, _ = train(make_config(store, (2, 2, 2)))
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-4)
    # Adam divides by the root of the second moment: a parameter moves by up to a learning rate.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-3),
        jax.device_get(state.params),
        jax.device_get(expected.params),
    )


@pytest.fixture(scope="module")
def gradient_of_one_device(store):
    return first_gradient(make_config(store))


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
@pytest.mark.slow
def test_gradients_of_devices_equal_those_of_one(store, gradient_of_one_device, mesh):
    expected, sums = gradient_of_one_device
    actual, same = first_gradient(make_config(store, mesh))
    np.testing.assert_allclose(same.loss, sums.loss, rtol=1e-5)

    def close(one, other):  # some are 0 but for rounding, as of biases before batch norm
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other) + 2e-6

    jax.tree.map(close, actual, expected)


SPLIT_BY_TENSOR = {
    "subsampling/first": False, "subsampling/second": False, "subsampling/output": False,
    "blocks/convolution/value": False, "blocks/convolution/gate": False,
    "blocks/convolution/output": False, "blocks/first/up": True, "blocks/first/down": True,
    "blocks/second/up": True, "blocks/second/down": True, "blocks/attention/query": True,
    "blocks/attention/output": True, "head": True,
}  # fmt: skip


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2), (1, 2, 2)], ids=str)
def test_devices_share_every_matrix(store, mesh):
    config = make_config(store, mesh)
    made = sharding.make_mesh(config, jax.devices()[: np.prod(mesh)])
    params = Program(config, made).abstract_state.params
    for name, by_tensor in SPLIT_BY_TENSOR.items():
        weight = params
        for part in name.split("/"):
            weight = weight[part]
        weight = weight.get("kernel") if isinstance(weight, dict) else weight
        parts = weight.size // np.prod(weight.sharding.shard_shape(weight.shape))
        assert parts == mesh[1] * (mesh[2] if by_tensor else 1), name


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["standard", "laser"])
def test_what_lies_in_padding_changes_no_bit(store, attention):
    """Of the loss, the gradients and batch norm's moments: frames beyond recordings, labels beyond
    transcripts, and rows without a recording."""
    config = make_config(store, attention=attention)
    program = Program(config, sharding.make_mesh(config, jax.devices()[:1]))
    params = program.init_state().params
    with SpeechRows(config).train_batches(config, 0, program.batch_sharding) as batches:
        batch = {name: np.array(x) for name, x in next(batches)[1].items()}
    batch["inputs"] = np.pad(batch["inputs"], ((0, 0), (0, 128), (0, 0)))
    batch["frames"][3] = batch["labels"][3] = 0
    frames = np.arange(batch["inputs"].shape[1]) >= batch["frames"][:, None]
    labels = np.arange(batch["targets"].shape[1]) >= batch["labels"][:, None]
    gradient = jax.jit(sharding.on_mesh(program.mesh, make_gradient(config)))
    expected = jax.device_get(gradient(params, batch))
    for content in (np.nan, np.inf, -3e38, 7.0):
        batch["inputs"][frames] = content
        batch["targets"][labels] = np.random.default_rng(0).integers(0, 12, labels.sum())
        jax.tree.map(
            np.testing.assert_array_equal, jax.device_get(gradient(params, batch)), expected
        )
    assert np.isfinite(expected[1].loss)


def moments(params):
    norm = jax.device_get(params)["blocks"]["convolution"]["batch_norm"]
    return {name: norm[name] for name in ("mean", "variance")}


@pytest.mark.slow
def test_moments_move_in_training(on_one_device):
    _, _, state, program = on_one_device
    initial, after = moments(program.init_state().params), moments(state.params)
    for name in initial:
        assert np.abs(after[name] - initial[name]).max() > 0.01, name


@pytest.mark.slow
def test_a_step_without_an_update_keeps_the_moments(on_one_device):
    config, _, _, program = on_one_device
    state = program.init_state()
    with SpeechRows(config).train_batches(config, 0, program.batch_sharding) as batches:
        _, batch = next(batches)
    before = moments(state.params)
    state, metrics = program.train_step(state, batch | {"inputs": batch["inputs"] * np.inf})
    assert (float(metrics["skipped_steps"]), int(state.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, moments(state.params), before)


@pytest.mark.slow
def test_micro_batches_are_smaller_batches(store):
    """Two halves that are equal have the loss, and move the moments, as one of them."""
    halves = make_config(store, **{"training.accumulation": 2, "model.dropout": 0.0})
    half = make_config(store, **{"training.batch_size": 2, "model.dropout": 0.0})
    devices = jax.devices()[:1]
    programs = [Program(config, sharding.make_mesh(config, devices)) for config in (half, halves)]
    with SpeechRows(half).train_batches(half, 0, programs[0].batch_sharding) as batches:
        _, batch = next(batches)
    twice = {name: np.repeat(np.asarray(x), 2, axis=0) for name, x in batch.items()}
    results = [
        program.train_step(program.init_state(), rows)
        for program, rows in zip(programs, (batch, twice))
    ]
    (one, metrics), (two, others) = results
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        jax.device_get(two.params),
        jax.device_get(one.params),
    )


def test_the_loss_is_that_of_all_paths(monkeypatch):
    """CTC: minus the logarithm of what all paths that collapse to the labels have together."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(3, 4, 3)), jnp.float32)
    positions, labels = np.array([4, 3, 2]), np.array([2, 1, 2])
    targets = np.array([[1, 2, 0], [2, 0, 0], [1, 1, 0]])  # the last one needs a blank: 3 positions
    moments = conformer.Moments(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    outputs = conformer.Outputs(logits, jnp.asarray(positions), moments, jnp.zeros(1))
    monkeypatch.setattr(speech, "_outputs", lambda *arguments: outputs)
    loss = speech.TRANSCRIPTS.make_loss(None)
    batch = {"targets": jnp.asarray(targets), "labels": jnp.asarray(labels)}
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)

    def nll(row):
        total = 0.0
        for path in itertools.product(range(3), repeat=int(positions[row])):
            merged = [label for label, _ in itertools.groupby(path) if label != BLANK]
            if merged == targets[row, : labels[row]].tolist():
                total += math.exp(sum(log_probs[row, t, label] for t, label in enumerate(path)))
        return -math.log(total) if total else math.inf

    assert [math.isinf(nll(row)) for row in range(3)] == [False, False, True]
    batch["labels"] = jnp.asarray(labels * [1, 1, 0])  # a row without labels: all blanks
    value, sums = loss(None, batch, None)
    blanks = -log_probs[2, :2, BLANK].sum()
    np.testing.assert_allclose(value, nll(0) + nll(1) + blanks, rtol=1e-5)
    assert (float(sums.nll), float(sums.tokens)) == (float(value), 3.0)


def test_the_word_error_rate_is_that_of_the_transcripts(store, on_one_device, monkeypatch):
    config, _, state, program = on_one_device
    split = SpeechRows(config).store.validation

    def spoken(config, params, batch, share, silent=()):
        """The transcripts, a blank behind each label; of some rows nothing."""
        count = batch["targets"].shape[1]
        path = jnp.stack([batch["targets"], jnp.full_like(batch["targets"], BLANK)], axis=-1)
        said = jnp.isin(jnp.arange(len(path)), jnp.asarray(silent, jnp.int32), invert=True)
        return (path.reshape(len(path), 2 * count) * said[:, None]).astype(jnp.int32)

    rates = []
    for silent in ((), (0,)):
        monkeypatch.setattr(eval_speech, "greedy_paths", functools.partial(spoken, silent=silent))
        rates.append(make_evaluation(config, program.mesh, split)(state.params)["eval/wer"])
    some = make_config(store, **{"training.eval_batches": 1})
    monkeypatch.setattr(eval_speech, "greedy_paths", spoken)
    assert make_evaluation(some, program.mesh, split)(state.params)["eval/wer"] == 0.0
    batch_size = config.training.batch_size
    texts = [split.text(i).split() for i in range(len(split))]
    silent_words = sum(len(text) for text in texts[::batch_size])
    assert rates == [0.0, silent_words / sum(map(len, texts))]


def test_a_test_split_is_scored_apart(store, on_one_device, monkeypatch, tmp_path):
    """With a name of its own, and without a share of the loss."""
    config, _, state, program = on_one_device
    made = SpeechConfig("tones:14", "tones:6@1", "tones:5@2", vocab_size=12)
    prepare(made, tmp_path / "tones")
    rows = SpeechRows(make_config(tmp_path / "tones"))
    parts = rows.validation_parts(config, None)
    assert [(part.name, part.share, part.at_end) for part in parts] == [
        ("", 1.0, False), ("test", 0.0, False), ("train", 0.0, True),
    ]  # fmt: skip
    size = config.training.batch_size
    sampled = min(14, -(-6 // size) * size)
    assert [sum((b["frames"] > 0).sum() for b in part.batches) for part in parts] == [
        6, 5, sampled,
    ]  # fmt: skip

    def silence(config, params, batch, share):
        return jnp.zeros_like(batch["targets"])

    monkeypatch.setattr(eval_speech, "greedy_paths", silence)
    splits = (rows.store.validation, rows.store.test, rows.store.train)
    evaluate = make_evaluation(config, program.mesh, *splits)
    scores = evaluate(state.params)
    assert scores == {"eval/wer": 1.0, "eval/wer/test": 1.0}
    assert evaluate(state.params, at_end=True) == scores | {"eval/wer/train": 1.0}


@pytest.mark.slow
def test_word_error_rate_of_a_model_that_is_not_trained(on_one_device):
    config, _, state, program = on_one_device
    evaluate = make_evaluation(config, program.mesh, SpeechRows(config).store.validation)
    rate = evaluate(state.params)["eval/wer"]
    assert 0.5 < rate < 3


def test_what_is_counted(on_one_device):
    """Labels, none of which is the blank; and no label is read beyond a recording's end."""
    config, _, state, program = on_one_device
    rows = SpeechRows(config)
    for split in (rows.store.train, rows.store.validation):
        assert all((split.labels(i) != BLANK).all() for i in range(len(split)))
    with rows.train_batches(config, 0, program.batch_sharding) as batches:
        batch = {name: np.array(x) for name, x in next(batches)[1].items()}
    batch["frames"] = np.array([90, 40, 8, 0], np.int32)
    assert program.eval_step(state.params, batch).tokens == batch["labels"].sum()

    def paths(params, batch):
        greedy = functools.partial(greedy_paths, config)
        return over_batch(greedy, params, batch, lambda _, rows: rows)

    # Labels everywhere: a head that never gives the blank.
    params = jax.device_get(state.params)
    params["head"]["bias"] = np.where(np.arange(12) == BLANK, -1e3, params["head"]["bias"])
    found = jax.jit(sharding.on_mesh(program.mesh, paths))(params, batch)
    there = np.arange(found.shape[1]) < np.array([[23], [10], [2], [0]])
    np.testing.assert_array_equal(np.asarray(found) != BLANK, there)


def test_what_does_not_fit_is_refused(store):
    for field, value, message in (
        ("optimizer.name", "muon", "Muon knows no convolutions"),
        ("model.vocab_size", 11, "the tokenizer of"),
        ("data.seq_len", 90, "frames of 10 ms; set it to that or more"),
        ("model.mel_bins", 40, "model.mel_bins=40: speech has 80"),
        ("data.store", "nowhere", "no finished store of speech"),
        ("data.store", "gs://bucket/speech", "speech is read from folders alone"),
    ):
        with pytest.raises(ValueError) as error:
            make_config(store, **{field: value})
        assert message in str(error.value)
