"""Blocks stacked over their layers: made together, and run by one scan.

The layers' parameters are stacked, so that a scan compiles one layer whatever the depth is, or each
where `unroll` says so. The backward pass keeps what the named policy says.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from laser.attention.kernels.fused import OUTPUT_NAME
from laser.attention.products import platform_of_program
from models.config import BlockConfig

Array = jax.Array
Blocks = TypeVar("Blocks", bound=nnx.Module)


def _all_but_gathered(primitive, *_, **__) -> bool:
    return primitive.name != "all_gather"


REMAT_POLICIES = {
    # Keep everything, except weights that other devices hold the parts of.
    "none": _all_but_gathered,
    # Keep the outputs of the projections, and of the attention kernel where there is one.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME),
    ),
    # Keep the blocks' inputs alone.
    "full": jax.checkpoint_policies.nothing_saveable,
}


def product_precision(config: BlockConfig) -> contextlib.AbstractContextManager:
    """Where products of float32 keep what model.matmul_precision says.

    It goes around what runs a model, and around what differentiates one: the products of a backward
    pass are made there. In bfloat16 factors are exact as they are, but for exp(V) in LASER, which
    laser/attention/products.py sees to. CPUs know no other float32: with the attribute XLA does
    without its faster library, and the quickstart's step takes a tenth longer.
    """
    if config.dtype == "bfloat16" or platform_of_program() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(config.matmul_precision)


def stacked(make: Callable[[Any, nnx.Rngs], Blocks], config: BlockConfig, rngs: nnx.Rngs) -> Blocks:
    """config.num_layers blocks as one, whose parameters have a first dim of layers."""
    make_blocks = nnx.split_rngs(splits=config.num_layers)(
        nnx.vmap(lambda rngs: make(config, rngs), in_axes=0, out_axes=0)
    )
    return make_blocks(rngs)


def run(
    config: BlockConfig,
    blocks: nnx.Module,
    x_BTM: Array,
    call: Callable[[Any, Array, Array], tuple[Array, Array]],
    whole: Callable[[str, Any], Any] | None,
) -> tuple[Array, Array]:
    """The blocks one after the other.

    Args:
      config: of the model.
      blocks: of `stacked`.
      x_BTM: what the first block takes.
      call: from a block, its input and its index among the layers to its output, (B, T, M), and a
        float32 scalar.
      whole: where the parameters are parts that devices share, from 'blocks' and the parts of one
        layer to the whole of it. The backward pass asks again in place of keeping it.

    Returns:
      The last block's output and the scalars, (L,).
    """
    graph = nnx.graphdef(blocks)
    stacked_params = nnx.to_pure_dict(nnx.state(blocks))

    def layer(x, xs):
        index, params = xs
        if whole is not None:
            params = whole("blocks", params)
        return call(nnx.merge(graph, params), x, index)

    if config.remat != "none" or whole is not None:
        # The scan already keeps the recomputation apart from the forward pass.
        layer = jax.checkpoint(
            layer, policy=REMAT_POLICIES[config.remat], prevent_cse=config.unroll
        )
    unroll = config.num_layers if config.unroll else 1
    with product_precision(config):
        return jax.lax.scan(
            layer, x_BTM, (jnp.arange(config.num_layers), stacked_params), unroll=unroll
        )
