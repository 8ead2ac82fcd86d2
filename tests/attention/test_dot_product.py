"""`dot_product_attention`: every option against the float64 oracle, and beside jax.nn's own.

Chunks are made short here, so that small arrays have several.

Shapes: (batch, length, heads, size); a row of a batch is a case of its own.
"""

import functools
import inspect
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import chunked, dot_product_attention, interface
from tests.attention.test_kernels import described_mesh

pytestmark = pytest.mark.usefixtures("own_programs")

B, D = 17, 8  # cases of a program; size of queries and keys
CHUNK = 16
BIG = 1e30

# What a program is specialised on: lengths, heads, options, and the shapes of bias and mask, in
# which a letter stands for the whole dim and 1 for one that is broadcast. "q" and "k" in `lengths`:
# there are lengths of queries and of keys.
CASES = {
    "masked": {"T": 40, "S": 40, "N": 2, "K": 2, "is_causal": True, "mask": "B1TS"},
    "cross": {"T": 24, "S": 50, "N": 4, "K": 2, "bias": "BNTS", "lengths": "k"},
    "beyond-the-keys": {
        "T": 50, "S": 24, "N": 4, "K": 1, "local_window_size": (7, 0), "lengths": "q",
    },
    "window": {
        "T": 40, "S": 40, "N": 4, "K": 2, "local_window_size": 5, "mask": "1N1S", "bias": "11TS",
    },
    "padded": {"T": 20, "S": 33, "N": 2, "K": 1, "D_v": 4, "bias": "B11S", "lengths": "qk"},
    "all": {
        "T": 40, "S": 37, "N": 4, "K": 2, "is_causal": True, "local_window_size": (9, 3),
        "scale": 0.3, "mask": "B1T1", "bias": "BN1S", "lengths": "qk",
    },
}  # fmt: skip
TRIED = [
    *((name, "laser", jnp.float32) for name in CASES),
    *((name, "laser", jnp.bfloat16) for name in ("window", "padded", "all")),
    *((name, "standard", jnp.float32) for name in ("beyond-the-keys", "all")),
    ("cross", "standard", jnp.bfloat16),
]
QUICK = ("masked", "cross", "all")  # the programs of the others are compiled by slow tests alone
PROGRAMS = pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (one[0] not in QUICK)) for one in TRIED],
)
GRADIENTS = ("d_query", "d_key", "d_value", "d_bias")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_length", lambda length: CHUNK)


def shape_of(letters, case):
    return tuple(1 if x == "1" else {"B": B, **case}[x] for x in letters)


def make(name, kind, dtype=jnp.float32, seed=0):
    """Arrays (query, key, value, bias, cotangent) in float64, and mask and lengths."""
    case, rng = CASES[name], np.random.default_rng(seed)
    d_v = case.get("D_v", D)
    shapes = [(B, case["T"], case["N"], D), (B, case["S"], case["K"], D),
              (B, case["S"], case["K"], d_v)]  # fmt: skip
    query, key, value = (rng.normal(size=shape) for shape in shapes)
    query *= rng.choice([0.3, 1, 5], (B, 1, 1, 1))
    value *= rng.choice([0.05, 1, 10], (B, 1, 1, 1))
    if kind == "laser":  # in half of the cases some are of any size that the dtype has
        size = np.exp(rng.uniform(0, math.log(3e38), value.shape)) * rng.choice(
            [-1, 1], value.shape
        )
        hostile = (rng.random(value.shape) < 0.1) & (rng.random((B, 1, 1, 1)) < 0.5)
        value = np.where(hostile, size, value)
    bias = rng.normal(size=shape_of(case["bias"], case)) * 3 if "bias" in case else None
    if bias is not None:
        bias[rng.random(bias.shape) < 0.1] = -np.inf
    mask = rng.random(shape_of(case["mask"], case)) < 0.7 if "mask" in case else None
    lengths = {}
    for letter, word, longest in (("q", "query", case["T"]), ("k", "key_value", case["S"])):
        if letter in case.get("lengths", ""):
            lengths[f"{word}_seq_lengths"] = rng.integers(0, longest + 1, B).astype(np.int32)
    d_out = rng.normal(size=(B, case["T"], case["N"], d_v))
    arrays = [np.array(jnp.asarray(x, dtype), np.float64) for x in (query, key, value, d_out)]
    return (*arrays[:3], bias, arrays[3]), {"mask": mask, **lengths}


def statics(name):
    words = ("is_causal", "local_window_size", "scale")
    return {word: CASES[name][word] for word in words if word in CASES[name]}


@functools.cache
def compiled(name, kind, implementation):
    def run(arrays, hidden):
        *given, d_out = arrays

        def function(query, key, value, bias):
            return dot_product_attention(
                query, key, value, bias, kind=kind, implementation=implementation,
                **statics(name), **hidden,
            )  # fmt: skip

        out, vjp = jax.vjp(function, *given)
        return out, *vjp(d_out.astype(out.dtype))

    return jax.jit(run)


def run(name, kind, arrays, hidden, dtype=jnp.float32, implementation="auto"):
    query, key, value, bias, d_out = arrays
    wide = dtype if dtype == jnp.float64 else jnp.float32
    bias = None if bias is None else jnp.asarray(bias, wide)
    given = [*(jnp.asarray(x, dtype) for x in (query, key, value)), bias, jnp.asarray(d_out, dtype)]
    found = compiled(name, kind, implementation)(given, hidden)
    return [None if x is None else np.asarray(x, np.float64) for x in found]


def oracle(name, kind, arrays, hidden):
    with jax.enable_x64(True):
        return run(name, kind, arrays, hidden, jnp.float64, "reference")


def visible(name, arrays, hidden):
    """(B, N, T, S) bool, written out apart from the code that is tried."""
    case, (*_, bias, _) = CASES[name], arrays
    t, s = np.arange(case["T"])[:, None], np.arange(case["S"])
    seen = np.ones((B, case["N"], case["T"], case["S"]), bool)
    if case.get("is_causal"):
        seen &= s <= t
    if (window := case.get("local_window_size")) is not None:
        left, right = (window, window) if isinstance(window, int) else window
        seen &= (t - left <= s) & (s <= t + right)
    if hidden["mask"] is not None:
        seen &= hidden["mask"]
    if bias is not None:
        seen &= bias > -np.inf
    for lengths, position in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
        if lengths in hidden:
            seen &= (position < hidden[lengths][:, None, None])[:, None]
    return seen


@PROGRAMS
def test_equals_the_oracle(name, kind, dtype):
    """Every case, values and all gradients, each of its own size; 0 where nothing is seen."""
    arrays, hidden = make(name, kind, dtype)
    found = run(name, kind, arrays, hidden, dtype)
    expected = oracle(name, kind, arrays, hidden)
    tolerance = 2e-5 if dtype == jnp.float32 else 1.5e-2
    size = np.maximum(np.abs(expected[0]), 1)
    np.testing.assert_array_less(np.abs(found[0] - expected[0]) / size, tolerance)
    for word, actual, exact in zip(GRADIENTS, found[1:], expected[1:], strict=True):
        if actual is None:
            continue
        axes = (1, 2, 3)
        error, size = (np.sqrt(np.square(x).sum(axes)) for x in (actual - exact, exact))
        rounding = 1e-6 + 1e-7 * size.max()  # where the exact gradient is 0, beside the largest
        np.testing.assert_array_less(error, 5 * tolerance * size + rounding, err_msg=word)
    seen = visible(name, arrays, hidden).any(-1).transpose(0, 2, 1)
    assert not found[0][~seen].any()
    assert not found[1][~seen].any()


def test_the_cases_are_what_they_are_for():
    blind = {}
    for name in CASES:
        arrays, hidden = make(name, "laser")
        rows = visible(name, arrays, hidden).any(-1)
        blind[name] = (~rows).mean()
        assert rows.any(), name
    assert 0.2 < blind["beyond-the-keys"] < 0.9, blind
    assert min(blind["all"], blind["padded"]) > 0.1, blind
    assert len(TRIED) * B >= 200


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_a_key_that_none_sees_changes_no_bit(kind):
    """Hidden by the mask, a bias of -inf or the lengths, from all queries of a head."""
    name = "all"
    arrays, hidden = make(name, kind, seed=1)
    query, key, value, bias, d_out = arrays
    value = np.clip(value, -10, 10)
    changed_key, changed_value = key.copy(), value.copy()
    unseen = ~visible(name, arrays, hidden).reshape(B, CASES[name]["K"], -1, key.shape[1]).any(2)
    unseen = unseen.transpose(0, 2, 1)
    assert unseen.mean() > 0.2
    changed_key[unseen], changed_value[unseen] = BIG, 3e38
    before = run(name, kind, (query, key, value, bias, d_out), hidden)
    after = run(name, kind, (query, changed_key, changed_value, bias, d_out), hidden)
    for word, a, b in zip(("out", *GRADIENTS), before, after, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=word)
    assert not before[2][unseen].any()
    assert not before[3][unseen].any()


@pytest.mark.parametrize("kind", ["standard", "laser"])
@pytest.mark.parametrize(
    "name", ["masked", "cross", pytest.param("window", marks=pytest.mark.slow)]
)
def test_no_query_is_changed_by_a_key_that_it_does_not_see(name, kind):
    """By a bit, as long as values stay within the range of the certificate."""
    arrays, hidden = make(name, kind, seed=2)
    query, key, value, bias, d_out = arrays
    value = np.clip(value, -3, 3)
    at = key.shape[1] // 2
    blind = ~visible(name, arrays, hidden)[..., at].transpose(0, 2, 1)
    changed_key, changed_value = key.copy(), value.copy()
    changed_key[:, at] *= -2
    changed_value[:, at] += 20
    before = run(name, kind, (query, key, value, bias, d_out), hidden)[0]
    after = run(name, kind, (query, changed_key, changed_value, bias, d_out), hidden)[0]
    np.testing.assert_array_equal(before[blind], after[blind])
    assert not np.array_equal(before[~blind], after[~blind])


@pytest.mark.parametrize(
    ("length", "heads", "rows"), [(10 * CHUNK, 1, 1), (CHUNK, 16, CHUNK)], ids=["keys", "grouped"]
)
def test_the_gradient_of_a_broadcast_bias_is_rounded_once(length, heads, rows):
    """All chunks, or heads of a group, pull it the same way: sums in bfloat16 drift."""
    rng = np.random.default_rng(0)
    query = jnp.ones((1, length, heads, D))
    key, value = jnp.float32(rng.normal(size=(2, 1, 16, 1, D)))
    bias = jnp.zeros((1, 1, rows, 16), jnp.bfloat16)

    def loss(bias):
        return dot_product_attention(query, key, value, bias, kind="standard").sum()

    rounded, exact = (
        np.float64(jax.jit(jax.grad(loss))(bias.astype(dtype)))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_allclose(rounded, exact, rtol=2**-8, atol=1e-5)


def test_arguments_are_those_of_jax():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert set(theirs) - set(ours) == {"return_residual"}
    assert set(ours) - set(theirs) == {"kind", "return_range"}
    assert [x for x in theirs if x in ours] == [x for x in ours if x in theirs]
    for name in set(ours) & set(theirs):
        assert ours[name].kind == theirs[name].kind, name
        default = None if name == "implementation" else theirs[name].default
        assert ours[name].default == ("auto" if name == "implementation" else default), name


@pytest.mark.parametrize(
    "name", ["cross", pytest.param("beyond-the-keys", marks=pytest.mark.slow), "all"]
)
def test_standard_is_that_of_jax(name):
    """Values of every query that sees a key."""
    arrays, hidden = make(name, "standard")
    query, key, value, bias, _ = arrays
    given = [None if x is None else jnp.float32(x) for x in (query, key, value, bias)]
    theirs = jax.nn.dot_product_attention(*given, implementation="xla", **statics(name), **hidden)
    ours = run(name, "standard", arrays, hidden)[0]
    seen = visible(name, arrays, hidden).any(-1).transpose(0, 2, 1)
    np.testing.assert_allclose(ours[seen], np.asarray(theirs)[seen], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_without_a_batch(kind):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.float32(rng.normal(size=(9, heads, D))) for heads in (4, 2, 2))
    mask, bias = jnp.tri(9, dtype=bool), jnp.float32(rng.normal(size=(4, 9, 9)))
    one = dot_product_attention(query, key, value, bias, mask, kind=kind)
    batch = dot_product_attention(
        query[None], key[None], value[None], bias[None], mask[None, None], kind=kind,
        implementation="xla",
    )  # fmt: skip
    np.testing.assert_array_equal(one, batch[0])
    causal = dot_product_attention(query, key, value, bias, is_causal=True, kind=kind)
    np.testing.assert_allclose(one, causal, rtol=1e-6, atol=1e-6)


def test_nothing_as_large_as_lengths_times_size():
    """Forward and backward of grouped cross attention: at most the logits of one chunk."""
    batch, length, keys, heads, size = 1, 96, 160, 4, 64
    query = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.float32)
    key = jax.ShapeDtypeStruct((batch, keys, 2, size), jnp.float32)
    short = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def loss(query, key, value, lengths):
        return dot_product_attention(
            query, key, value, kind="laser", local_window_size=(40, 50),
            key_value_seq_lengths=lengths,
        ).sum()  # fmt: skip

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key, short).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    largest = max(math.prod(int(x) for x in shape.split("x")[:-1]) for shape in shapes)
    # One query of the exact path meets (S, D); a chunk has (heads, CHUNK, S) logits.
    assert largest <= max(heads * keys * size, heads * CHUNK * keys)
    seen_at_once = {
        int(shape.split("x")[-2]) for shape in shapes if f"{heads * CHUNK // 2}x" in shape
    }
    assert max(seen_at_once) <= 40 + 50 + CHUNK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lazer"}, "kind='lazer'"),
        ({"implementation": "flash"}, "implementation='flash'"),
        ({"mask": np.ones((4, 4))}, "mask has dtype float.*a mask is bool"),
        ({"bias": np.ones((4, 4), bool)}, "bias has dtype bool"),
        ({"mask": np.ones((2, 3, 4, 6), bool)}, r"= \(2, 2, 4, 6\); got \(2, 3, 4, 6\)"),
        ({"mask": np.ones((1, 2, 2, 4, 6), bool)}, r"mask must broadcast"),
        ({"local_window_size": -1}, "local_window_size=-1: must not be negative"),
        ({"local_window_size": (1, 2, 3)}, "must be an int or a pair"),
        ({"local_window_size": 1.5}, "must be an int or a pair"),
        ({"query_seq_lengths": np.ones(3, np.int32)}, r"query_seq_lengths must be \(2,\) of int"),
        ({"key_value_seq_lengths": np.ones(2)}, "key_value_seq_lengths must be.* float"),
        ({"key": np.ones((2, 6, 3, D), np.float32)}, "value must have the shape of key"),
        ({"key": np.ones((1, 6, 1, D), np.float32)}, "one batch and one head size"),
        ({"value": np.ones((2, 6, 1, D), np.int32)}, "of one dtype.*got float32, float32, int32"),
        ({"query": np.ones((2, 4, 2, D), np.float16)}, "of one dtype.*got float16, float32"),
        ({"query": np.ones((2, D), np.float32)}, r"query must be \(batch, length, heads, size\)"),
        ({"query": np.ones((2, 0, 2, D), np.float32)}, "must not be empty"),
        ({"implementation": "pallas"}, "'pallas' has no keys of another length"),
        (
            {"implementation": "cudnn", "mask": np.ones((4, 6), bool)},
            "'cudnn' has no mask and no keys of another length than queries; use 'chunked'",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    x = {"query": np.ones((2, 4, 2, D), np.float32), "key": np.ones((2, 6, 1, D), np.float32)}
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**{**x, "value": x["key"], "kind": "laser", **change})


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="heads of keys must divide the heads of queries"):
        dot_product_attention(jnp.ones((4, 3, D)), *2 * [jnp.ones((4, 2, D))], kind="laser")


@pytest.mark.parametrize(
    ("platform", "options", "chosen"),
    [
        ("tpu", {}, "pallas"),
        ("tpu", {"is_causal": True}, "pallas"),
        ("tpu", {"mask": np.tri(128, dtype=bool)}, "chunked (implementation='pallas' has no mask"),
        ("tpu", {"local_window_size": (16, 4)}, "pallas"),
        (
            "gpu",
            {"local_window_size": 16},
            "chunked (implementation='cudnn' has no window of later",
        ),
        ("gpu", {"bias": np.ones((128, 128))}, "chunked (implementation='cudnn' has no bias"),
    ],
)
def test_the_fused_kernels_take_what_they_know(platform, options, chosen, caplog):
    interface._log_choice.cache_clear()
    query = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    call = functools.partial(dot_product_attention, kind="laser", **options)
    with (
        caplog.at_level(logging.INFO, "laser.attention"),
        jax.sharding.use_abstract_mesh(described_mesh(platform)),
    ):
        jax.eval_shape(call, query, key, key)
    assert f"laser attention on {platform}: {chosen}" in caplog.text
    (record,) = caplog.records
    assert record.levelname == ("WARNING" if chosen.startswith("chunked") else "INFO")


def test_grouped_without_options_is_attention_itself():
    rng = np.random.default_rng(0)
    query, key = (jnp.float32(rng.normal(size=(2, 40, heads, D))) for heads in (4, 2))
    ours = functools.partial(dot_product_attention, is_causal=True, kind="laser")
    plain = functools.partial(interface.attention, kind="laser")
    np.testing.assert_array_equal(*(jax.jit(call)(query, key, key) for call in (ours, plain)))


def test_the_range_is_that_of_attention_and_tells_of_the_exact_path():
    rng = np.random.default_rng(0)
    query, value = (jnp.float32(rng.normal(size=(40, 2, D))) for _ in range(2))
    call = functools.partial(dot_product_attention, kind="laser", is_causal=True)
    out, range_nats = jax.jit(functools.partial(call, return_range=True))(query, query, value)
    np.testing.assert_array_equal(out, jax.jit(call)(query, query, value))
    given = (x[None] for x in (query, query, value))
    expected = interface.attention(*given, kind="laser", return_range=True)[1]
    assert 0 < range_nats == expected < chunked.RANGE_LIMIT_NATS
    outlier = value.at[-1, 0, 0].set(100)
    assert call(query, query, outlier, return_range=True)[1] > chunked.RANGE_LIMIT_NATS


def test_queries_that_see_nothing_do_not_take_the_exact_path():
    x = jnp.ones((1, 40, 2, D))
    mask = jnp.zeros((1, 1, 40, 40), bool).at[..., 20:, :].set(True)
    call = functools.partial(
        chunked.attention, kind="laser", logits_scale=1.0, causal=False, segment_ids=None,
        logits_soft_cap=None, extras=chunked.Extras(mask=mask),
    )  # fmt: skip
    out, range_nats = jax.jit(call)(x, x, x)
    assert range_nats < chunked.RANGE_LIMIT_NATS
    np.testing.assert_allclose(out[:, 20:], 1, rtol=1e-6)
    assert not out[:, :20].any()
