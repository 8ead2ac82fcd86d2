"""Weights from all devices and gradients back to them, however their dims are split."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from laser.training import share

SHAPE = (8, 12, 16)


@pytest.mark.parametrize(
    "spec",
    [
        (("fsdp", "fsdp_1"), None, None),
        (None, None, ("fsdp", "fsdp_1")),
        (None, "fsdp", "fsdp_1"),
        (None, "fsdp_1", "fsdp"),
        ("fsdp_1", "fsdp", None),
        ("fsdp", None, "fsdp_1"),
        ("fsdp",),
    ],
    ids=str,
)
@pytest.mark.parametrize("small", [0, 2**20], ids=["at once", "one axis after the other"])
def test_the_whole_and_its_gradient(spec, small, monkeypatch):
    monkeypatch.setattr(share.compiler, "small_part_bytes", lambda: small)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "fsdp_1"))
    weight = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    factors = np.random.default_rng(1).normal(size=(8, *SHAPE)).astype(np.float32)
    spec = PartitionSpec(*spec)

    def work(part, factor):
        shared = share.Share(mesh.axis_names, {"weight": spec})

        def loss(part):
            whole = shared.whole("weight", part, np.float32)
            return (whole * factor[0]).sum(), whole

        gradient, whole = jax.grad(loss, has_aux=True)(part)
        return shared.total_gradient({"weight": gradient})["weight"], whole[None]

    rows = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        work, mesh=mesh, in_specs=(spec, rows), out_specs=(spec, rows), check_vma=False
    )
    gradient, wholes = jax.jit(mapped)(weight, factors)
    for whole in np.asarray(wholes):
        np.testing.assert_array_equal(whole, weight)
    np.testing.assert_allclose(gradient, factors.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape, axes, order",
    [
        ((4, 8, 16), (("fsdp",), (), ()), [0, 1, 2]),  # the last dim is whole, and stays there
        ((400, 8, 16), (("fsdp",), (), ()), [0, 1, 2]),
        ((400, 8, 16), ((), ("fsdp",), ("fsdp_1",)), [1, 2, 0]),
        ((215, 724), (("fsdp",), ("fsdp_1",)), [0, 1]),
        ((724, 215), (("fsdp",), ("fsdp_1",)), [1, 0]),
    ],
    ids=str,
)
def test_the_longest_part_is_last(shape, axes, order):
    assert share._order(shape, axes) == order
