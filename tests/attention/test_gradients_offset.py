"""The fused kernels' gradients where bfloat16, or the range of float32, could lose them.

Keys that share an offset, values nearly constant and far from 0, and cotangents of extreme size,
against the float64 oracle. What bfloat16 operands alone cost is 0.3 % of dQ for standard attention
and 0.4 % for LASER, whose exponentials and quotients are rounded too.

Shapes: (batch, length, heads, size).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, chunked
from laser.attention.kernels import fused
from laser.attention.kernels.blocks import BlockSizes
from tests.attention.closeness import errors
from tests.attention.implementations import rounded

pytestmark = pytest.mark.slow  # kernels of head size 64, for each kind and dtype

B, T, H, D = 2, 192, 1, 64
SIZES = {"one-block": BlockSizes(192, 96, 96), "blocks": BlockSizes(96, 96, 96)}
SEGMENTS = np.stack([np.repeat([0, 1], [100, 92]), np.repeat([0, 1, 2], [50, 50, 92])])
ORACLE_LIMIT = {"standard": 4e-3, "laser": 5e-3}  # of dQ, whatever the offset
KINDS = pytest.mark.parametrize("kind", ["standard", "laser"])


def make_inputs(dtype=jnp.bfloat16, key_offset=0.0, value_mean=0.0, value_std=1.0, d_out=1.0):
    """query, key, value and a cotangent, of float64, without what the dtype would round off."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (rng.normal(size=(B, T, H, D)) for _ in range(4))
    key += key_offset * rng.choice([-1, 1], size=(1, 1, H, D))
    arrays = (query, key, value_mean + value_std * value, d_out * cotangent)
    return [np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays]


@functools.cache
def compiled(where, kind, **options):
    def function(segment_ids, query, key, value):
        given = {"kind": kind, "segment_ids": segment_ids, **options}
        if where in ("reference", "chunked"):
            return attention(query, key, value, implementation=where, **given)
        given = {"logits_scale": D**-0.5, "causal": True, "logits_soft_cap": None, **given}
        return fused.attention(query, key, value, sizes=SIZES[where], interpret=True, **given)[0]

    def run(segment_ids, query, key, value, d_out):
        out, vjp = jax.vjp(functools.partial(function, segment_ids), query, key, value)
        return out, *vjp(d_out.astype(out.dtype))

    return jax.jit(run)


def found_errors(where, kind, inputs, dtype=jnp.bfloat16, segment_ids=None, **options):
    arrays = [jnp.asarray(x, dtype) for x in inputs]
    found = compiled(where, kind, **options)(segment_ids, *arrays)
    with jax.enable_x64(True):
        exact = compiled("reference", kind, **options)(segment_ids, *map(jnp.asarray, inputs))
    return errors([np.asarray(x, np.float64) for x in found], [np.asarray(x) for x in exact])


@KINDS
@pytest.mark.parametrize("where", SIZES)
@pytest.mark.parametrize("offset", [0.4, 1.0, 32.0])
def test_keys_that_share_an_offset(where, kind, offset):
    found = found_errors(where, kind, make_inputs(key_offset=offset))
    assert found["d_query"] < ORACLE_LIMIT[kind], found
    assert max(found.values()) < 5e-3, found


@KINDS
def test_keys_that_share_an_offset_in_packed_rows(kind):
    inputs = make_inputs(key_offset=32.0)
    found = found_errors("one-block", kind, inputs, segment_ids=SEGMENTS)
    assert max(found.values()) < 5e-3, found


@KINDS
def test_slopes_of_a_soft_cap_keep_the_offset(kind):
    """Rows of dlogits do not sum to 0 there: keys may not be centred."""
    inputs = make_inputs(key_offset=1.0)
    found = found_errors("one-block", kind, inputs, logits_soft_cap=2.0)
    assert max(found.values()) < 1.5e-2, found


@pytest.mark.parametrize("std", [0.05, 0.02])
@pytest.mark.parametrize("mean", [-1.5, -0.6, 1.5])
def test_values_nearly_constant(mean, std):
    """Standard attention is held back by its output's rounding there; LASER is as good as twice."""
    inputs = make_inputs(value_mean=mean, value_std=std)
    laser, standard = (found_errors("one-block", kind, inputs) for kind in ("laser", "standard"))
    for name in ("d_query", "d_key"):
        assert laser[name] < 2 * standard[name], (laser, standard)


@pytest.mark.parametrize("where", ["one-block", "chunked"])
@pytest.mark.parametrize(
    ("mean", "d_out"), [(55, 1e-14), (-55, 1e15), (10, 1e-25), (-10, 1e15), (-100, 1e30)]
)
def test_cotangents_of_any_size(where, mean, d_out):
    inputs = make_inputs(jnp.float32, value_mean=mean, d_out=d_out)
    found = found_errors(where, "laser", inputs, jnp.float32)
    assert max(found.values()) < 2e-4, found


def test_cotangents_of_any_size_beside_a_large_range():
    inputs = make_inputs(jnp.float32, value_std=15.0, d_out=1e20)
    for where in ("one-block", "chunked"):
        found = found_errors(where, "laser", inputs, jnp.float32)
        assert max(found.values()) < 2e-4, found
    assert inputs[2].max() - inputs[2].min() > chunked.RANGE_LIMIT_NATS


@KINDS
def test_the_keys_gradient_of_many_chunks_is_rounded_once(kind, monkeypatch):
    """Queries that are alike pull a key the same way in each of 16 chunks, short ones here."""
    monkeypatch.setattr(chunked, "chunk_length", lambda length: length // 16)
    rng = np.random.default_rng(0)
    shape = (1, 512, 1, 32)
    query, d_out = (rng.normal(size=(1, 1, 1, 32)) + 0.1 * rng.normal(size=shape) for _ in range(2))
    inputs = rounded([query, rng.normal(size=shape), rng.normal(size=shape), d_out])
    assert found_errors("chunked", kind, inputs)["d_key"] < 2.2e-3  # rounding alone: 1.7e-3
