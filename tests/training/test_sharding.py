"""The sharding table on the paper's models and chips, with meshes that are only described."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import c4
from laser.training import sharding
from laser.training.config import load_config
from models.families import abstract_parameters

TORUS = {64: ((8, 8), (4, 4, 4)), 128: ((8, 16), (4, 4, 8)), 256: ((16, 16), (4, 8, 8))}


def mesh_of(config, chips, torus=()):
    factors = sharding._fsdp_factors(config, chips, 1, torus)[0]
    return AbstractMesh((1, *factors, 1), sharding._axis_names(len(factors)))


def local_bytes(mesh, params):
    def local(path, leaf):
        spec = sharding.parameter_spec(mesh, sharding.name_of(path), leaf.shape)
        return leaf.size * 4 / math.prod(mesh.shape[name] for name in sharding.axes_of(spec))

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(local, params)))


@pytest.mark.parametrize("chips", [64, 128, 256])
@pytest.mark.parametrize("size", c4.SIZES)
def test_every_size_divides_on_the_paper_s_chips(size, chips):
    config = load_config(c4.get_config(f"size={size},attention=laser+diff+per_dim_temp"))
    params = abstract_parameters(config.model)
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    for torus in TORUS[chips]:
        mesh = mesh_of(config, chips, torus)
        # Along the axes of the torus, so that gradients can be reduce-scattered.
        assert sorted(mesh.shape[name] for name in sharding.batch_axes(mesh)[1:]) == sorted(torus)
        assert sharding.unsharded_share(mesh, params) < 0.001
        whole = sum(sharding.unsharded(mesh, params).values())
        assert local_bytes(mesh, params) == (total - whole) / chips + whole


def test_norms_are_all_that_stays_whole():
    config = load_config(c4.get_config("size=7p7b"))
    params = abstract_parameters(config.model)
    found = sharding.unsharded(mesh_of(config, 256, (16, 16)), params)
    assert found
    assert all("norm" in name for name in found)


def test_too_much_that_stays_whole_is_an_error_unless_allowed():
    config = c4.get_config("size=7p7b")
    config.model.model_dim, config.model.head_dim = 3442, 722  # 2 · 1721 and 2 · 361
    with pytest.raises(ValueError) as error:
        mesh_of(load_config(config), 256)
    assert "mesh.fsdp=256 leaves" in str(error.value)
    assert "mesh.max_unsharded=0.02" in str(error.value)
    config.mesh.max_unsharded = 1.0
    assert mesh_of(load_config(config), 256).size == 256


def test_every_parameter_needs_a_rule():
    with pytest.raises(ValueError, match="'blocks/attention/gate': no row"):
        sharding.parameter_rule("blocks/attention/gate")


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("mlp/up", (2, 64, 48), "fsdp fsdp_1 | tensor"),  # the first dim that all divide
        ("mlp/up", (2, 36, 64), " | fsdp fsdp_1 tensor"),
        ("mlp/up", (2, 40, 24), "fsdp_1 | fsdp tensor"),  # none: each axis from the last dim on
        ("mlp/down", (2, 48, 40), "fsdp_1 tensor | fsdp"),
        ("mlp/up", (2, 36, 24), " | fsdp tensor"),  # fsdp_1 divides neither
        ("attention/query", (2, 36, 16, 12), " | fsdp_1 tensor | fsdp"),
    ],
)
def test_which_dims_the_axes_split(name, shape, expected):
    mesh = AbstractMesh((1, 4, 8, 2), ("data", "fsdp", "fsdp_1", "tensor"))
    spec = sharding.parameter_spec(mesh, f"blocks/{name}", shape)
    found = [" ".join(names) for names in sharding.per_dim(spec)][1:]
    found += [""] * (len(shape) - 1 - len(found))  # a layout leaves out what its last dims have not
    assert found == [names.strip() for names in expected.split("|")]


def test_a_dim_that_the_tensor_axis_does_not_divide():
    mesh = AbstractMesh((1, 4, 8, 2), ("data", "fsdp", "fsdp_1", "tensor"))
    with pytest.raises(ValueError, match=r"mesh\.tensor=2 does not divide dim 33 of parameter"):
        sharding.parameter_spec(mesh, "blocks/mlp/up", (2, 36, 33))
