"""One run on several meshes of eight devices: the same losses, the bytes where they should be."""

import functools
import math

import jax
import numpy as np
import pytest

from configs import base
from laser.training import sharding
from laser.training.checkpoint import Checkpoints, restore_parameters
from laser.training.config import load_config
from laser.training.program import Program
from tests.training.test_step import make_config, run

MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]
ALL_AXES = [*(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[:3]), MESHES[3]]
CHECKPOINT = load_config(base.get_config()).checkpoint


@functools.cache
def run_on_one_device(diff, accumulation=1):
    config = make_config(diff=diff, **{"training.accumulation": accumulation})
    return run(config, steps=10, devices=[jax.devices()[0]])


@functools.cache
def run_on(mesh, diff, accumulation=1):
    config = make_config(diff=diff, mesh=mesh, **{"training.accumulation": accumulation})
    return run(config, steps=10)


@pytest.mark.parametrize(
    "mesh, diff",
    [
        *(pytest.param(mesh, "none", marks=pytest.mark.slow) for mesh in MESHES[:3]),
        (MESHES[3], "none"),
        *(pytest.param(mesh, "official", marks=pytest.mark.slow) for mesh in MESHES[2:]),
    ],
    ids=str,
)
def test_eight_devices_equal_one(mesh, diff):
    history, state = run_on(mesh, diff)
    expected_history, expected = run_on_one_device(diff)
    # Sums in another order, float32; they part slowly as the parameters do.
    np.testing.assert_allclose(history[:3], expected_history[:3], rtol=2e-5)
    np.testing.assert_allclose(history, expected_history, rtol=5e-4)
    # Adam divides by the root of the second moment: a parameter moves by up to a learning rate.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-3),
        jax.device_get(state.params),
        jax.device_get(expected.params),
    )


@pytest.mark.slow
def test_micro_batches_on_a_mesh_equal_one_device():
    history, _ = run_on((2, 2, 2), "none", accumulation=2)
    np.testing.assert_allclose(history[:3], run_on_one_device("none")[0][:3], rtol=2e-5)


@pytest.mark.parametrize("mesh", ALL_AXES, ids=str)
def test_bytes_fall_with_the_axes_that_split(mesh):
    """Matrices and their moments are split over fsdp and tensor; what is not, is small."""
    _, state = run_on(mesh, "none")
    split = mesh[1] * mesh[2]
    for name, leaf in sharding._leaves(state.params).items():
        if "norm" not in name:
            assert leaf.addressable_shards[0].data.nbytes * split == leaf.nbytes, name
    leaves = jax.tree.leaves(state)
    total = sum(leaf.nbytes for leaf in leaves)
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    small = sum(leaf.nbytes for leaf in leaves if math.prod(leaf.shape) < 1000)
    assert local <= total / split + small
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 4]
    queries = state.params["blocks"]["attention"]["query"]
    assert len(moments) == 8
    assert {x.sharding for x in moments} == {queries.sharding}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder, written under the second mesh, and its state."""
    folder = tmp_path_factory.mktemp("run")
    _, state = run_on(MESHES[1], "none")
    with Checkpoints(folder, CHECKPOINT) as checkpoints:
        checkpoints.save(10, state)
    return folder, jax.device_get(state)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), expected)


@pytest.mark.parametrize("mesh", [MESHES[0], *MESHES[2:]], ids=str)
@pytest.mark.slow
def test_a_checkpoint_restores_under_every_other_mesh(saved, mesh):
    folder, expected = saved
    config = make_config(mesh=mesh)
    program = Program(config, sharding.make_mesh(config))
    with Checkpoints(folder, CHECKPOINT) as checkpoints:
        state = checkpoints.restore_latest(program.abstract_state)
    assert_equal(state, expected)
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings


@pytest.mark.slow
def test_parameters_alone_restore_on_one_device(saved):
    folder, expected = saved
    config = make_config()
    program = Program(config, sharding.make_mesh(config, jax.devices()[:1]))
    params = restore_parameters(folder, program.abstract_state.params)
    assert_equal(params, expected.params)
    assert all(x.sharding.num_devices == 1 for x in jax.tree.leaves(params))
