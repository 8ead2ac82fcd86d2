"""What is asked of every implementation of attention: inputs, the oracle, and who is asked.

Each implementation has a length at which it meets several blocks of its own, the last one ragged,
and the positions that matter there.

Shapes: (batch, length, heads, size).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from laser.attention import attention, chunked, cudnn
from laser.attention.kernels import exact, fused
from laser.attention.kernels.blocks import BlockSizes

B, H, D = 2, 2, 8  # D: size of queries and keys
ONE_BLOCK, BLOCKS = BlockSizes(96, 48, 32), BlockSizes(32, 16, 16)


@dataclasses.dataclass(frozen=True, eq=False)
class Implementation:
    """One implementation and where it is tried.

    Attributes:
      name: of the tests.
      call: (query, key, value, kind, **options) → output and range.
      length, value_size: of the inputs.
      early, middle, late, last: positions; the first two in one block, `late` in another, and
        `last` in the last one.
      block: outputs before the block of a changed position keep their bits; 1 if all before it do.
      tolerance: of outputs and gradients in float32 and the usual values.
      outlier_tolerances: the same with outliers, by dtype.
      value_stds: deviations of V that take different paths.
      kinds: of attention.
      segments: (B, length) ids of packed documents; None if it takes none.
      options: by name, those under which it must equal the oracle.
      lengths: short ones, and those around a block.
    """

    name: str
    call: Callable[..., tuple[jax.Array, jax.Array]]
    length: int
    value_size: int
    early: int
    middle: int
    late: int
    last: int
    block: int
    tolerance: float
    outlier_tolerances: dict[Any, float]
    value_stds: tuple[float, ...] = (1.0,)
    kinds: tuple[str, ...] = ("standard", "laser")
    segments: np.ndarray | None = None
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = ()

    def inputs(self, value_std=1.0, logits_scale=1.0, seed=0, length=None, dtype=jnp.float32):
        """query, key, value and a cotangent, float64 without what the dtype would round off."""
        rng, shape = np.random.default_rng(seed), (B, length or self.length, H)
        query, key = (rng.normal(size=(*shape, D)) * logits_scale for _ in range(2))
        value, d_out = (rng.normal(size=(*shape, self.value_size)) for _ in range(2))
        return rounded([query, key, value * value_std, d_out], dtype)

    def run(self, inputs, dtype=jnp.float32, gradients=True, segment_ids=None, **options):
        """Output and gradients as float64 arrays, and the range."""
        arrays = [jnp.asarray(x, dtype) for x in inputs]
        found, range_nats = compiled(self.call, gradients, **options)(segment_ids, *arrays)
        return [np.asarray(x, np.float64) for x in found], float(range_nats)

    def output(self, inputs, dtype=jnp.float32, **options):
        return self.run(inputs, dtype, gradients=False, **options)[0][0]


def rounded(inputs, dtype=jnp.bfloat16):
    """What is left of the inputs in the dtype, as float64."""
    return [np.array(jnp.asarray(x, dtype), np.float64) for x in inputs]


def oracle(inputs, segment_ids=None, **options):
    """Output and gradients by the formulas, in float64."""
    with jax.enable_x64(True):
        program = compiled(_formulas, True, **options)
        return [np.asarray(x) for x in program(segment_ids, *map(jnp.asarray, inputs))[0]]


@functools.cache
def compiled(call, gradients: bool, **options):
    """Compiled once for all tests that share the options."""

    def value_and_gradients(segment_ids, query, key, value, d_out):
        function = functools.partial(call, segment_ids=segment_ids, **options)
        if not gradients:
            out, range_nats = function(query, key, value)
            return (out,), range_nats
        out, vjp, range_nats = jax.vjp(function, query, key, value, has_aux=True)
        return (out, *vjp(d_out.astype(out.dtype))), range_nats

    return jax.jit(value_and_gradients)


def meets_exact_path(tried, inputs, dtype=jnp.float32, segment_ids=None, **options):
    """Whether kernels leave something to `exact.repair`: its place takes one that mends nothing."""
    program = compiled(_unrepaired(tried.call), False, **options)
    with mock.patch.object(exact, "repair", lambda out, *rest: out):  # while it is traced
        (out,), _ = program(segment_ids, *(jnp.asarray(x, dtype) for x in inputs))
    return bool((out == -jnp.inf).any())


@functools.cache
def _unrepaired(call):
    return functools.partial(call)  # compiled apart from `call`


def _by_name(implementation, query, key, value, **options):
    return attention(query, key, value, implementation=implementation, return_range=True, **options)


def _kernels(sizes, query, key, value, *, kind, segment_ids=None, **options):
    given = {"logits_scale": D**-0.5, "causal": True, "logits_soft_cap": None, **options}
    given["segment_ids"] = segment_ids
    return fused.attention(query, key, value, kind=kind, sizes=sizes, interpret=True, **given)


def _cudnn(query, key, value, *, kind="laser", segment_ids=None, **options):
    given = {"logits_scale": D**-0.5, "causal": True, "logits_soft_cap": None, **options}
    given["segment_ids"] = segment_ids
    return cudnn.attention(query, key, value, kind=kind, library="xla", **given)


_formulas = functools.partial(_by_name, "reference")


def _segments(length, *lengths):
    """Four documents in the first row, and in the second the same from the end."""
    ids = np.repeat(np.arange(4), [*lengths, length - sum(lengths)])
    return np.stack([ids, ids[::-1]]).astype(np.int32)


def _chunked(name):
    segments = _segments(300, 37, 100, 90)
    packed = {"segment_ids": segments}
    return Implementation(
        name, functools.partial(_by_name, name), length=300, value_size=16,
        early=40, middle=70, late=200, last=290, block=chunked.chunk_length(300),
        tolerance=3e-6, outlier_tolerances={jnp.float32: 1e-5}, segments=segments,
        options={
            "causal": {},
            "full": {"causal": False},
            "packed": packed,
            "shared-segment": packed | {"shared_segment": 0},
            "soft-cap": {"logits_soft_cap": 2.0},
            "all": packed | {"logits_scale": 0.7, "logits_soft_cap": 5.0},
        },
        lengths=(1, 5, 128, 129, 256),
    )  # fmt: skip


def _pallas(name, sizes):
    segments = np.stack([np.repeat([0, 1, 2], [20, 33, 37]), np.repeat([5, 3, 4], [50, 7, 33])])
    packed = {"segment_ids": segments}
    # The padding is told from keys by segments, so without ids it is the same kernel.
    full = {"packed-full": packed | {"causal": False, "logits_scale": 0.7}}
    if sizes is ONE_BLOCK:
        full = {"full": {"causal": False}}
    return Implementation(
        name, functools.partial(_kernels, sizes), length=90, value_size=16,  # no block divides it
        early=12, middle=25, late=70, last=88, block=sizes.tile,
        tolerance=2e-6, outlier_tolerances={jnp.float32: 1e-5}, segments=segments,
        options={
            "causal": {},
            "packed-soft-cap": packed | {"logits_soft_cap": 2.0},
            **full,
        },
        lengths=(1, 33) if sizes is BLOCKS else (),
    )  # fmt: skip


CHUNKED = _chunked("chunked")
PAPER = dataclasses.replace(CHUNKED, name="paper", call=functools.partial(_by_name, "paper"))
PALLAS_ONE_BLOCK = _pallas("pallas-one-block", ONE_BLOCK)
PALLAS = _pallas("pallas", BLOCKS)
# The quickest to compile: tiles of a block are unrolled.
PALLAS_ONE_TILE = _pallas("pallas-one-tile", BlockSizes(32, 32, 32))
CUDNN = Implementation(  # its anchor is that of the first 128 positions
    "cudnn", _cudnn, length=192, value_size=D,
    early=12, middle=25, late=140, last=180, block=1,
    tolerance=1e-5, outlier_tolerances={jnp.float32: 1e-4, jnp.bfloat16: 8e-3},
    value_stds=(0.05, 1.0), kinds=("laser",),  # with the anchor and without
    options={"causal": {}, "full": {"causal": False}},
    lengths=(1, 5, 129),
)  # fmt: skip
IMPLEMENTATIONS = (CHUNKED, PALLAS_ONE_BLOCK, PALLAS, CUDNN)


# What can be done to V. Positions are those of the implementation that is tried.


def in_the_same_block(value, tried):
    value[:, tried.early] = 120.0


def in_another_block(value, tried):
    value[:, tried.late] = 120.0


def of_both_signs(value, tried):
    value[:, tried.early, :, ::2] = 300.0
    value[:, tried.middle, :, 1::2] = -200.0
    value[:, tried.last, 0] = 300.0


def wide(value, tried):
    value *= 40.0


def at_the_first_token(value, tried):
    value[:, 0] = 300.0


def huge(value, tried):
    value[:, tried.middle] = 3e4
    value[:, tried.late] = -3e4


def all_large(value, tried):
    value += 110.0 + 3 * np.sin(np.arange(tried.length))[:, None, None]


def all_far_below(value, tried):
    value -= 110.0 + 3 * np.sin(np.arange(tried.length))[:, None, None]


FAR_APART = (in_the_same_block, in_another_block, of_both_signs, huge)
OUTLIERS = (*FAR_APART, wide, at_the_first_token, all_large, all_far_below)
