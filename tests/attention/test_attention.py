"""The oracle, the paper's wrapper, and what the interface says of its arguments."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import (
    attention,
    cached_attention,
    chunked,
    dot_product_attention,
    interface,
)
from laser.attention.products import platform_of_program
from tests.attention.closeness import NAMES, assert_close, errors
from tests.attention.implementations import CHUNKED, PAPER, oracle, rounded


def test_the_papers_wrapper_fails_where_the_default_does_not():
    """What `implementation="paper"` is: the paper's formula, its failure included."""
    inputs = CHUNKED.inputs()
    assert_close(PAPER.run(inputs, kind="laser")[0], oracle(inputs, kind="laser"), 1e-5)
    inputs[2][:, CHUNKED.late] = 120.0
    assert not np.isfinite(PAPER.run(inputs, kind="laser")[0][0]).all()


def test_range_is_reported_and_decides():
    """The default on a CPU is `chunked`, to the bit."""
    inputs = CHUNKED.inputs()
    value = inputs[2]
    given = [jnp.float32(x) for x in inputs[:3]]
    call = functools.partial(attention, kind="laser", return_range=True)
    out, range_nats = jax.jit(call)(*given)
    # The reference is a power of two at or below the largest visible value, so at most that far
    # above.
    assert 0 < range_nats < value.max() - np.asarray(out).min() + 1e-3
    chosen = jax.jit(functools.partial(call, implementation="chunked"))(*given)
    np.testing.assert_array_equal(out, chosen[0])
    value[:, CHUNKED.early] = 120.0
    assert CHUNKED.run(inputs, kind="laser")[1] > chunked.RANGE_LIMIT_NATS
    assert call(*(x[:, :1] for x in given))[1] == 0  # of one key, whose value is the output


@pytest.mark.parametrize("value_std", [0.05, 0.3, 1.0, 3.0, 10.0])
@pytest.mark.slow
def test_bfloat16_is_no_worse_than_the_papers_wrapper(value_std):
    inputs = rounded(CHUNKED.inputs(value_std))
    expected = oracle(inputs, kind="laser")
    ours, papers = (
        errors(tried.run(inputs, jnp.bfloat16, kind="laser")[0], expected)
        for tried in (CHUNKED, PAPER)
    )
    for name in NAMES:
        assert ours[name] < 1.05 * papers[name], (name, ours, papers)


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_oracle_gradients_by_finite_differences(kind):
    """The oracle's autodiff against central differences of its own values, in float64."""
    inputs = CHUNKED.inputs(length=7)
    expected = oracle(inputs, kind=kind)[1:]
    direction = CHUNKED.inputs(seed=1, length=7)
    step = 1e-6
    with jax.enable_x64(True):
        for i, name in enumerate(NAMES[1:]):
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[i] = inputs[i] + sign * step * direction[i]
                out = attention(*map(jnp.asarray, moved[:3]), kind=kind, implementation="reference")
                ends.append(float((out * inputs[3]).sum()))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(
                slope, (expected[i] * direction[i]).sum(), rtol=1e-7, err_msg=name
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lazer"}, "kind='lazer'"),
        ({"implementation": "flash"}, "implementation='flash'"),
        ({"kind": "standard", "implementation": "paper"}, "use kind='laser'"),
        ({"segment_ids": jnp.zeros((1, 3))}, "segment_ids must be"),
        ({"key": jnp.zeros((1, 4, 1, 8), jnp.bfloat16)}, "got float32, bfloat16, float32"),
        ({"value": jnp.zeros((1, 4, 1, 8), jnp.int32)}, "got float32, float32, int32"),
    ],
)
def test_mistakes_are_named(change, message):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match=message):
        attention(**{"query": x, "key": x, "value": x, "kind": "laser", **change})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn])
def test_no_implementation_takes_other_dtypes(dtype):
    x = jnp.zeros((1, 4, 1, 8), dtype)
    for implementation in ("auto", "chunked", "reference"):
        with pytest.raises(ValueError, match="must be of one dtype, float32, bfloat16"):
            attention(x, x, x, kind="standard", implementation=implementation)


def test_float64_is_the_oracles_alone():
    with jax.enable_x64(True):
        x = jnp.zeros((1, 4, 1, 8), jnp.float64)
        assert attention(x, x, x, kind="laser", implementation="reference").dtype == jnp.float64
        for implementation in ("auto", "chunked", "pallas", "cudnn"):
            with pytest.raises(ValueError, match="'reference' alone, float64; got float64"):
                attention(x, x, x, kind="laser", implementation=implementation)


def test_nothing_is_named():
    x = jnp.zeros((1, 0, 1, 8))
    with pytest.raises(ValueError, match="query, key and value must not be empty"):
        attention(x, x, x, kind="laser")


@pytest.mark.parametrize("function", [attention, dot_product_attention, cached_attention])
def test_the_kind_must_be_named(function):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(TypeError, match="kind"):
        function(x, x, x, *[x, 4] * (function is cached_attention))


@pytest.mark.parametrize("function", [attention, dot_product_attention])
def test_kernels_for_tpus_are_refused_elsewhere(function):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"'pallas' runs on TPUs.* for cpu; use 'auto' or"):
        function(x, x, x, kind="laser", implementation="pallas")


def test_on_a_cpu_no_choice_is_a_warning(caplog):
    """`chunked` is what runs there."""
    interface._log_choice.cache_clear()
    x = jnp.zeros((1, 4, 1, 8))
    with caplog.at_level(logging.INFO, "laser.attention"):
        for _ in range(2):
            jax.eval_shape(lambda x: dot_product_attention(x, x, x, kind="laser"), x)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "laser attention on cpu: chunked")
    ]


def test_derivatives_that_would_be_wrong_are_refused():
    """By the oracle they are there; docs/drop-ins.md says both."""
    x = jnp.float32(np.random.default_rng(0).normal(size=(1, 6, 1, 4)))

    def total(x, implementation):
        out = attention(x, x, x, kind="laser", implementation=implementation)
        return jnp.sin(out).sum()

    def forward(implementation):
        return jax.jvp(lambda x: total(x, implementation), (x,), (x,))[1]

    def second(implementation):
        return jax.grad(lambda x: jax.grad(total)(x, implementation).sum())(x)

    assert np.isfinite(forward("reference"))
    assert np.isfinite(second("reference")).all()
    with pytest.raises(TypeError, match="custom_vjp"):
        forward("chunked")
    with pytest.raises(NotImplementedError, match="for second ones use implementation='reference'"):
        second("chunked")


@pytest.mark.parametrize("by_name", [True, False])
def test_the_platform_is_that_of_the_default_device(by_name, monkeypatch):
    """Such as the host of a TPU, where a layer is initialised."""

    class Device:
        platform = "tpu"

    devices = jax.local_devices
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(
        jax, "local_devices", lambda backend=None: devices(backend=backend) if backend else [Device]
    )
    assert platform_of_program() == "tpu"
    with jax.default_device("cpu" if by_name else devices()[0]):
        assert platform_of_program() == "cpu"


def test_shapes_that_do_not_fit_are_named():
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"\(1, 4, 1, 8\), \(1, 4, 2, 8\)"):
        attention(x, jnp.zeros((1, 4, 2, 8)), x, kind="laser")
