"""The function that the models call, and the choice of implementation behind it.

`auto` takes `pallas`, the fused kernels, on TPUs where they can serve, `cudnn` on GPUs where that
can, and `chunked` (XLA, exact on every backend) elsewhere. The kernels compile for TPUs and are
held to the oracle in interpret mode, and so is LASER by cuDNN with XLA's attention in the place of
cuDNN's; neither has run on its device yet. What `auto` took is logged at level INFO, and where a
TPU or a GPU gets `chunked`, a warning says why, once for each reason.
`reference` (the formulas) and `paper` (the paper's log-weighted-sum-exp wrapper to the letter, with
its global maximum, for fidelity studies) are there by name.
"""

import functools
import logging
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from laser.attention import chunked, cudnn, reference
from laser.attention.kernels import fused
from laser.attention.products import platform_of_program

Array = jax.Array
Implementation = Literal["auto", "pallas", "cudnn", "chunked", "reference", "paper"]
FUSED = {"pallas": fused, "cudnn": cudnn}
MODULES: dict[str, Any] = {**FUSED, "chunked": chunked}
DTYPES = ("float32", "bfloat16", "float16")  # and float64 by the oracle alone


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    kind: Literal["standard", "laser"],
    logits_scale: float | None = None,
    causal: bool = True,
    segment_ids: Array | None = None,
    shared_segment: int | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = "auto",
    return_range: bool = False,
):
    """softmax(scale · Q Kᵀ) V, or LASER's log(softmax(scale · Q Kᵀ) exp(V)) (arXiv 2411.03493).

    For every finite V, up to the largest of its dtype (all implementations but `paper`):

    - LASER's output is finite, and right to rounding; standard attention's is, of values up to half
      the largest.
    - A key that a query may not see, later or of another segment, has no part in its output and in
      no gradient through it. It may decide how they are rounded: where, and by how much they move,
      is in docs/function.md#what-a-later-token-may-change.

    V that is not finite shows: +inf or NaN makes the output of every query that sees it not finite
    in that feature, and so does -inf in standard attention (in LASER exp(-inf) counts as 0, or the
    output is not finite). As 0 · inf is NaN, outputs that share a chunk or a block with it, or in
    `cudnn` the row, and gradients, may be not finite as well; one that is finite is right.

    Derivatives are those of reverse mode (`jax.grad`, `jax.vjp`), once. Of LASER the formulas alone
    have others (`reference`, `paper`): jax refuses `jax.jvp` of the rest, and they refuse to be
    differentiated twice.

    Args:
      query: (B, T, H, D_qk), float32, bfloat16 or float16, as key and value; float64 by `reference`
        alone.
      key: (B, T, K, D_qk), where K divides H: with K below H, each group of H / K neighbouring
        heads of queries shares a head of keys and values (arXiv 2305.13245; K = 1: 1911.02150).
      value: (B, T, K, D_v); D_v may differ from D_qk.
      kind: which readout, always named: the two functions have one shape.
      logits_scale: factor of the logits; 1/√D_qk if None.
      causal: a query sees no later key.
      segment_ids: (B, T) int32; a query sees only keys with its own id. The smallest int32 is
        reserved: `pallas` gives it to padding.
      shared_segment: an id whose keys queries of every segment see: a common beginning with several
        continuations in one row. Not by `pallas` and `cudnn`.
      logits_soft_cap: c in c · tanh(logits / c), before masking; None or 0 for none.
      implementation: see the module's docstring.
      return_range: also return how far, in nats, an output lies below the reference that its values
        were exponentiated with: a float32 scalar, the largest, not below 0. By `chunked` LASER's
        slower exact path is taken beyond `RANGE_LIMIT_NATS` (62), and for outputs beyond 1,024; by
        `pallas` never below 87, the largest range that it gives; by `cudnn` never up to 31, if no
        value is above that. 0 where there is no reference (standard attention, the oracle).

    Returns:
      (B, T, H, D_v) in the dtype of `value`; with `return_range`, a pair of it and the range.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an unknown or impossible `kind` or
        `implementation`; where `pallas` or `cudnn` cannot serve, the message names the limit.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    _check(query, key, value, kind, segment_ids, implementation)
    options: dict[str, Any] = {
        "logits_scale": 1 / math.sqrt(query.shape[-1]) if logits_scale is None else logits_scale,
        "causal": causal,
        "segment_ids": segment_ids,
        "logits_soft_cap": logits_soft_cap,
    }
    if shared_segment is not None:
        options["shared_segment"] = shared_segment
    out, range_nats = dispatch(query, key, value, kind, implementation, options)
    return (out, range_nats) if return_range else out


def dispatch(
    query: Array, key: Array, value: Array, kind: str, implementation: Implementation, options: dict
) -> tuple[Array, Array]:
    """Output, in the dtype of `value`, and range, by the implementation that serves such a call."""
    if implementation == "auto":
        implementation, why = _choose(query, key, value, kind, options)
        _log_choice(kind, implementation, platform_of_program(), why)
    if module := MODULES.get(implementation):
        _check_options(implementation, query, key, options)
        if implementation == "pallas":
            fused.check(query, key, value)
            if (platform := platform_of_program()) != "tpu":
                raise ValueError(
                    f"implementation='pallas' runs on TPUs, and this program is for {platform}; "
                    "use 'auto' or 'chunked', or describe the TPUs by jax.set_mesh"
                )
        out, range_nats = module.attention(query, key, value, kind=kind, **options)
    else:
        paper = implementation == "paper"
        out = reference.attention(query, key, value, kind=kind, paper=paper, **options)
        range_nats = jnp.float32(0)
    return out.astype(value.dtype), range_nats


def check_names(kind: str, implementation: str) -> None:
    if kind not in ("standard", "laser"):
        raise ValueError(f"kind={kind!r}: must be 'standard' or 'laser'")
    names = get_args(Implementation)
    if implementation not in names:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(names)}")
    if implementation == "paper" and kind == "standard":
        raise ValueError("implementation='paper' is a form of LASER; use kind='laser'")


def check_arrays(query: Array, key: Array, value: Array, implementation: str) -> None:
    """Raises ValueError, naming what there is, if they are empty or not of one known dtype."""
    arrays = (query, key, value)
    if not all(x.size for x in arrays):
        shapes = ", ".join(str(x.shape) for x in arrays)
        raise ValueError(f"query, key and value must not be empty; got {shapes}")
    found = [str(x.dtype) for x in arrays]
    allowed = (*DTYPES, "float64") if implementation == "reference" else DTYPES
    if len(set(found)) > 1 or found[0] not in allowed:
        raise ValueError(
            f"query, key and value must be of one dtype, {', '.join(DTYPES)} or, by "
            f"implementation='reference' alone, float64; got {', '.join(found)}"
        )


def _check(query, key, value, kind, segment_ids, implementation) -> None:
    check_names(kind, implementation)
    rest = (*query.shape[:2], *query.shape[3:])
    if query.ndim != 4 or key.ndim != 4 or (*key.shape[:2], *key.shape[3:]) != rest:
        raise ValueError(
            "query and key must be (batch, length, heads, size) of one shape up to the number of "
            f"heads; got {query.shape}, {key.shape}"
        )
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have the shape of key up to its size; got {value.shape}, {key.shape}"
        )
    check_arrays(query, key, value, implementation)
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{key.shape[2]} heads of keys must divide the {query.shape[2]} heads of queries"
        )
    if segment_ids is not None and segment_ids.shape != query.shape[:2]:
        raise ValueError(
            f"segment_ids must be (batch, length) = {query.shape[:2]}; got {segment_ids.shape}"
        )


def _choose(query, key, value, kind: str, options: dict) -> tuple[Implementation, str]:
    """The implementation that `auto` stands for, and why it is not the platform's fused one."""
    platform = platform_of_program()
    try:
        if platform == "tpu":
            _check_options("pallas", query, key, options)
            fused.check(query, key, value)
            return "pallas", ""
        if platform == "gpu":
            _check_options("cudnn", query, key, options)
            segment_ids, soft_cap = options["segment_ids"], options["logits_soft_cap"]
            cudnn.check(query, key, value, kind, segment_ids, soft_cap)
            return "cudnn", ""
    except ValueError as limit:
        why = str(limit).removesuffix("; use 'chunked'")
        return "chunked", f" ({why})"
    return "chunked", ""


def _check_options(implementation: str, query: Array, key: Array, options: dict) -> None:
    """Raises ValueError, naming the options, where the implementation does not know them."""
    if implementation not in FUSED:
        return
    extras = options.get("extras", chunked.NO_EXTRAS)
    unknown = [name for name, x in extras._asdict().items() if x is not None]
    if options.get("shared_segment") is not None:
        unknown.append("shared_segment")
    if implementation == "cudnn" and options.get("window") is not None and not options["causal"]:
        unknown.append("window of later keys")
    if query.shape[1] != key.shape[1]:
        unknown.append("keys of another length than queries")
    if unknown:
        raise ValueError(
            f"implementation={implementation!r} has no {' and no '.join(unknown)}; use 'chunked'"
        )


@functools.cache
def _log_choice(kind: str, implementation: str, platform: str, why: str) -> None:
    """Once for each choice: a warning where XLA stands in for the platform's fused attention.

    Of several processes the first one warns.
    """
    level = logging.WARNING if why and not jax.process_index() else logging.INFO
    words = "%s attention on %s: %s%s"
    logging.getLogger(__name__).log(level, words, kind, platform, implementation, why)
