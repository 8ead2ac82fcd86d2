"""The identities that the paper proves, held to in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from laser.attention import attention, reference


def logits_to_outputs(kind, logits, value):
    """Attention from given logits, through the oracle's readouts."""
    readout = {"standard": reference.standard, "laser": reference.laser}[kind]
    return readout(jax.nn.log_softmax(logits)[None, None], value[None, :, None])[0, :, 0]


def test_gradients_for_two_tokens():
    """Eq. 7 and its standard counterpart: N = 2, d = 1."""
    with jax.enable_x64(True):
        logits = jnp.array([[0.3, -0.4], [0.0, 0.0]])
        for v1, v2 in [(1.0, -0.5), (12.0, -3.0), (-2.0, 4.0)]:
            value = jnp.array([[v1], [v2]])
            alpha = float(jax.nn.softmax(logits[0])[0])

            def slope(kind, value=value):
                gradient = jax.grad(lambda x: logits_to_outputs(kind, x, value)[0, 0])(logits)
                return float(gradient[0, 0])

            standard = (v1 - v2) * alpha * (1 - alpha)
            e1, e2 = np.exp(v1), np.exp(v2)
            laser = (e1 - e2) * alpha * (1 - alpha) / (alpha * e1 + (1 - alpha) * e2)
            np.testing.assert_allclose(slope("standard"), standard, rtol=1e-12)
            np.testing.assert_allclose(slope("laser"), laser, rtol=1e-12)
            if v1 - v2 > 10:  # the limit: LASER's gradient does not vanish as alpha goes to 0
                np.testing.assert_allclose(slope("laser"), 1 - alpha, rtol=1e-5)


def test_output_lies_between_the_max_bounds():
    """LASER's output is in [max_j(v_j + log a_j), max_j(v_j + log a_j) + log N]."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        logits, value = (
            jnp.asarray(rng.normal(size=(9, 9)) * 3),
            jnp.asarray(rng.normal(size=(9, 4)) * 5),
        )
        out = logits_to_outputs("laser", logits, value)
        largest = (jax.nn.log_softmax(logits)[:, :, None] + value[None]).max(axis=1)
        assert np.all(out >= largest)
        assert np.all(out <= largest + np.log(9))


def test_default_agrees_with_the_formula_on_a_case_done_by_hand():
    """One head, two tokens, zero logits: row 0 sees itself, row 1 the mean of both exponentials."""
    zero = jnp.zeros((1, 2, 1, 1))
    value = jnp.array([0.0, 3.0]).reshape(1, 2, 1, 1)
    out = attention(zero, zero, value, kind="laser").ravel()
    np.testing.assert_allclose(out, [0.0, np.log((1 + np.exp(3.0)) / 2)], rtol=1e-6)
    out = attention(zero, zero, value, kind="standard").ravel()
    np.testing.assert_allclose(out, [0.0, 1.5], rtol=1e-6)


def test_shifting_values_shifts_the_output():
    """log(A exp(V + c)) = log(A exp V) + c: why subtracting a maximum is allowed at all."""
    rng = np.random.default_rng(2)
    query, key, value = (jnp.float32(rng.normal(size=(1, 50, 2, 8))) for _ in range(3))
    laser = jax.jit(functools.partial(attention, kind="laser"))
    plain, shifted = laser(query, key, value), laser(query, key, value + 64.0)
    np.testing.assert_allclose(shifted, plain + 64.0, rtol=1e-6)
