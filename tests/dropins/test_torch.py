"""LASER in PyTorch beside the JAX one, where torch is installed (requirements-peers.txt)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: requirements-peers.txt")

from laser.attention import dot_product_attention
from laser.torch import scaled_dot_product_attention

pytestmark = pytest.mark.slow
laser = functools.partial(scaled_dot_product_attention, kind="laser")
B, T, S, H, K, D = 2, 150, 140, 4, 2, 8  # two chunks of queries


def inputs(seed, length=T, keys=S, kv_heads=K):
    rng = np.random.default_rng(seed)
    shapes = (B, H, length, D), (B, kv_heads, keys, D), (B, kv_heads, keys, D)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def values_and_gradients(query, key, value, d_out, mask=None, **options):
    """Of the PyTorch one, as numpy arrays; a mask of numbers has a gradient, too."""
    tensors = [torch.tensor(x).requires_grad_() for x in (query, key, value)]
    if mask is not None:
        mask = torch.tensor(mask)
        if mask.dtype != torch.bool:
            tensors.append(mask.requires_grad_())
    enable_gqa = query.shape[1] != key.shape[1]
    out = laser(*tensors[:3], attn_mask=mask, enable_gqa=enable_gqa, **options)
    gradients = torch.autograd.grad(out, tensors, torch.tensor(d_out))
    return [x.detach().numpy() for x in (out, *gradients)]


def expected(query, key, value, d_out, mask=None, **options):
    """The same of the JAX oracle, in float64."""

    def function(query, key, value, bias):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        hidden = mask if mask is not None and mask.dtype == bool else None
        out = dot_product_attention(
            q, k, v, bias, hidden, kind="laser", implementation="reference", **options
        )
        return out.transpose(0, 2, 1, 3)

    with jax.enable_x64(True):
        bias = None if mask is None or mask.dtype == bool else jnp.asarray(mask, jnp.float64)
        q, k, v, d = (jnp.asarray(x, jnp.float64) for x in (query, key, value, d_out))
        out, vjp = jax.vjp(function, q, k, v, bias)
        return [np.asarray(x) for x in (out, *vjp(d)) if x is not None]


def assert_near(found, wanted, tolerance=1e-5):
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted):
        assert np.isfinite(f).all()
        # Each head and feature of its own size: what is huge must not hide the rest.
        scale = np.maximum(np.abs(w).max(axis=-2, keepdims=True), 1)
        assert (np.abs(f - w) / scale).max() < tolerance


def hostile(value, seed=7):
    """Values of all magnitudes up to the largest at most positions from the middle on."""
    rng = np.random.default_rng(seed)
    huge = np.exp(rng.uniform(0, np.log(3.4e38), value.shape)) * rng.choice([-1, 1], value.shape)
    late = rng.random(value.shape) < 0.6
    late[:, :, : S // 2] = False
    return np.where(late, huge, value).astype(np.float32)


CAUSAL = np.tril(np.ones((T, S), bool))
CASES = {
    "causal": {"is_causal": True},
    "cross": {"scale": 0.7},
    "padded": {"mask": np.arange(S) < np.array([S, 90])[:, None, None, None]},
    "no key": {"mask": CAUSAL & (np.arange(S) >= 3)},
    "bias": {"mask": np.where(CAUSAL, np.linspace(-2, 2, H)[:, None, None], -np.inf)},
}


@pytest.mark.parametrize("kv_heads", [H, K])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case, kv_heads):
    options = dict(CASES[case])
    if "bias" in case:
        options["mask"] = options["mask"][None].astype(np.float32)
    query, key, value = inputs(1, kv_heads=kv_heads)
    d_out = np.random.default_rng(2).normal(size=query.shape).astype(np.float32)
    found = values_and_gradients(query, key, value, d_out, **options)
    if case == "no key":
        assert not found[0][:, :, :3].any()
        assert not found[1][:, :, :3].any()
    assert_near(found, expected(query, key, value, d_out, **options))
    # And of values that no single reference holds.
    value = hostile(value)
    found = values_and_gradients(query, key, value, d_out, **options)
    assert_near(found, expected(query, key, value, d_out, **options), 1e-4)


@pytest.mark.parametrize("amount", [20.0, 3e38])
def test_a_hidden_key_has_no_part(amount):
    """Within a chunk it may decide how outputs round, where its value lies far above theirs."""
    query, key, value = inputs(3, keys=T)
    d_out = np.random.default_rng(4).normal(size=query.shape).astype(np.float32)
    seen = 135  # the second chunk begins at 128
    d_out[:, :, seen:] = 0
    before = values_and_gradients(query, key, value, d_out, is_causal=True)
    value[:, :, seen:] = amount * np.linspace(-1, 1, T - seen)[:, None]
    key[:, :, seen:] *= -3
    after = values_and_gradients(query, key, value, d_out, is_causal=True)
    same = seen if amount < 80 else 128
    np.testing.assert_array_equal(after[0][:, :, :same], before[0][:, :, :same])
    for x, y in zip(after, before):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x[:, :, :seen], y[:, :, :seen], rtol=1e-4, atol=2e-6)
    for x in after[1:]:
        assert not x[:, :, seen:].any()
    # Padding sets no reference, so that no bit moves.
    padding = {"mask": (np.arange(T) < seen)[None, None, None]}
    after = values_and_gradients(query, key, value, d_out, **padding)
    value[:, :, seen:] = 0
    before = values_and_gradients(query, key, value, d_out, **padding)
    for x, y in zip(after, before):
        np.testing.assert_array_equal(x, y)


def test_operators_keep_torchs_rules_and_gradients_in_float64():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    mask = torch.randn(1, 1, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(laser, (query, key, value, mask))
    arguments = (query, key, value, mask, False, 0.5)
    torch.library.opcheck(torch.ops.laser.attention.default, arguments)


def test_gradients_lie_in_memory_as_torch_compile_expects():
    query, key, value = (torch.tensor(x) for x in inputs(5))
    # As projections give them, with a position's heads side by side.
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    arguments = (torch.ones_like(query), query, key, value, None, False, 0.5, False)
    torch.library.opcheck(torch.ops.laser.attention_backward.default, arguments)


def test_is_compiled_without_a_break():
    query, key, value = (torch.tensor(x).requires_grad_() for x in inputs(5, keys=T, kv_heads=H))

    def loss(query, key, value):
        return (2 * laser(query, key, value, is_causal=True)).square().sum()

    wanted = torch.autograd.grad(loss(query, key, value), (query, key, value))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(query, key, value), (query, key, value))
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w)


def test_keeps_nothing_but_its_inputs():
    query, key, value = (torch.tensor(x).requires_grad_() for x in inputs(6, keys=T, kv_heads=H))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        laser(query, key, value, is_causal=True)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (query, key, value)}


def test_bfloat16_and_standard():
    query, key, value = (torch.tensor(x) for x in inputs(8, keys=T, kv_heads=H))
    wanted = laser(query, key, value, is_causal=True)
    found = laser(*(x.bfloat16() for x in (query, key, value)), is_causal=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    standard = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    found = scaled_dot_product_attention(query, key, value, kind="standard")
    torch.testing.assert_close(found, standard)


@pytest.mark.parametrize("values", ["usual", "hostile"])
def test_autocast_changes_no_bit(values):
    query, key, value = inputs(10)
    value = hostile(value) if values == "hostile" else value
    d_out = np.random.default_rng(11).normal(size=query.shape).astype(np.float32)
    wanted = values_and_gradients(query, key, value, d_out)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(query, key, value, d_out)
    for f, w in zip(found, wanted):
        np.testing.assert_array_equal(f, w)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "lasr"}, "kind='lasr'"),
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"enable_gqa": False}, "enable_gqa=True"),
        ({"attn_mask": torch.ones(3, T, S, dtype=torch.bool)}, "attn_mask (3, 150, 140)"),
        ({"attn_mask": torch.ones(T, S, dtype=torch.int32)}, "attn_mask of torch.int32"),
        ({"attn_mask": torch.ones(T, S), "is_causal": True}, "is_causal=True with an attn_mask"),
        ({"query": torch.ones(B, H, T, D, dtype=torch.float64)}, "one floating-point dtype"),
        ({"key": torch.ones(B, K, S, D + 1)}, "do not fit together"),
        ({"query": torch.ones(T, D)}, "(batch, heads, length, size)"),
    ],
)
def test_mistakes_are_named(change, words):
    query, key, value = (torch.tensor(x) for x in inputs(9))
    options = {"query": query, "key": key, "value": value, "kind": "laser", "enable_gqa": True}
    with pytest.raises(ValueError) as error:
        scaled_dot_product_attention(**{**options, **change})
    assert words in str(error.value)
