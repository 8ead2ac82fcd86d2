"""The method for MaxText's AttentionOp, on a stand-in, and beside MaxText 0.2 where it is there."""

import enum
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import dot_product_attention
from laser.dropins.maxtext import apply_attention

AttentionType = enum.Enum("AttentionType", {"GLOBAL": "global", "FULL": "full",
                          "LOCAL_SLIDING": "local_sliding", "CHUNK": "chunk"})  # fmt: skip
B, T, N, K, D = 2, 40, 4, 2, 8
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 2]], [20, 15, 5], axis=1)
WINDOW = 7  # a query sees itself and the 6 keys before it


def operator(**changes):
    given = {
        "attention_type": AttentionType.GLOBAL,
        "sliding_window_size": WINDOW,
        "attn_logits_soft_cap": None,
        "dropout_rate": 0.0,
        "_context_parallel_size": lambda: 1,
    }
    return SimpleNamespace(**{**given, **changes})


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, T, n, D)) for key, n in zip(keys, (N, K, K))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GLOBAL", "FULL", "LOCAL_SLIDING"])
def test_values(kind, arrays):
    back = np.arange(T)[:, None] - np.arange(T)
    seen = {"GLOBAL": back >= 0, "FULL": back < T,
            "LOCAL_SLIDING": (back >= 0) & (back < WINDOW)}[kind]  # fmt: skip
    seen = seen & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
    wanted = dot_product_attention(
        *arrays, mask=jnp.asarray(seen[:, None]), kind="laser", scale=1.0,
        implementation="reference",
    )  # fmt: skip
    op = operator(attention_type=AttentionType[kind])
    out, *rest = apply_attention(op, *arrays, jnp.asarray(SEGMENTS), None, None, "train")
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
    assert rest == [None, None]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"model_mode": "prefill"}, "model_mode='prefill'"),
        ({"dropout_rate": 0.1}, {}, "dropout_rate=0.1"),
        ({"attention_type": AttentionType.CHUNK}, {}, "attention_type='chunk'"),
        ({"_context_parallel_size": lambda: 2}, {}, "context parallelism"),
        ({}, {"sinks": np.zeros(N)}, "sinks"),
    ],
)
def test_what_laser_has_not_is_named(changes, options, words, arrays):
    given = {"model_mode": "train", **options}
    with pytest.raises(ValueError) as error:
        apply_attention(operator(**changes), *arrays, None, None, None, **given)
    assert words in str(error.value)


def test_what_a_newer_maxtext_adds_is_refused(arrays):
    einsums = {"qk_product_einsum": jnp.einsum, "wv_product_einsum": jnp.einsum}
    with pytest.raises(TypeError, match="'attention_bias'"):
        apply_attention(
            operator(), *arrays, None, None, None, "train", **einsums, attention_bias=None
        )


def test_it_takes_what_maxtext_gives():
    maxtext = pytest.importorskip("maxtext.layers.attention_op", reason="MaxText wants Python 3.12")
    theirs = inspect.signature(maxtext.AttentionOp.apply_attention).parameters
    inspect.signature(apply_attention).bind(**dict.fromkeys(theirs))
