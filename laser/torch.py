"""LASER attention in PyTorch, with the arguments of torch's own function; imports torch alone.

    from laser.torch import scaled_dot_product_attention
    out = scaled_dot_product_attention(query, key, value, is_causal=True, kind="laser")

The method is that of laser/attention/chunked.py, which says why it is exact and why no later token
leaks: chunks of queries, a power of two as the reference of exp(V), and a sum that certifies
itself. Elements without the certificate are computed again, each in log space over the keys that
its own query sees. Both passes work on one chunk at a time, and the backward pass starts from
query, key and value alone: no (T, S) matrix outlives its chunk, and no (T, S, D) tensor is made.

Which elements need log space depends on the data, so the two passes are operators of torch.library:
torch.compile takes them as they are, without a break in the graph.

Shapes: B batch, H heads of queries, K heads of keys, C queries of a chunk (of all heads that share
a head of keys, one head after the other), T queries, S keys, D size.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# As in laser/attention/chunked.py.
SMALLEST_CERTIFIED = 2.0**-90
LARGEST_CERTIFIED_OUTPUT = 1024.0
LARGEST_EXPONENTIATED = LARGEST_CERTIFIED_OUTPUT + 128
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
ELEMENTS_AT_ONCE = 2**22  # of a row of keys each, in log space


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    kind: Literal["standard", "laser"] = "standard",
) -> Tensor:
    """softmax(scale · Q Kᵀ + M) V, or LASER's log(softmax(scale · Q Kᵀ + M) exp(V)).

    LASER (arXiv 2411.03493, section 3.2) is exact for every finite V, and a key that a query may
    not see has no part in its output or gradients, whatever its value. It computes in float32
    (float64 for float64). Gradients reach query, key, value and a mask of numbers, once
    differentiable.

    Args:
      query: (B, H, T, D_qk), floating point.
      key: (B, K, S, D_qk); K is H, or with `enable_gqa` divides it.
      value: (B, K, S, D_v).
      attn_mask: broadcasts to (B, H, T, S): bool, True where a key is seen, or numbers that are
        added to the logits, -inf where it is not seen.
      dropout_p: torch's, for `standard`; LASER has none.
      is_causal: query t sees the keys up to t, counted from the first of both; without attn_mask.
      scale: factor of the logits; 1/√D_qk if None.
      enable_gqa: each head of keys and values serves H / K neighbouring heads of queries.
      kind: `standard` is torch's function itself.

    Returns:
      (B, H, T, D_v) in the dtype of `value`. A query that sees no key gets 0, and no gradient.

    Raises:
      ValueError: shapes or arguments that do not fit together, an unknown `kind`, or dropout in
        LASER; the message names the argument.
    """
    if kind == "standard":
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, kind)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _attention(query, key, value, attn_mask, is_causal, scale)


def _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, kind) -> None:
    if kind != "laser":
        raise ValueError(f"kind={kind!r}: must be 'standard' or 'laser'")
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p}: LASER has no dropout of probabilities; set it 0")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"query, key and value must be (batch, heads, length, size); got {shapes}")
    if (
        not query.shape[0] == key.shape[0] == value.shape[0]
        or query.shape[-1] != key.shape[-1]
        or key.shape[1:3] != value.shape[1:3]
    ):
        raise ValueError(f"query, key and value do not fit together: {shapes}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads or (heads != kv_heads and not enable_gqa):
        raise ValueError(
            f"{heads} heads of queries and {kv_heads} of keys: must be equal or, with "
            "enable_gqa=True, a multiple"
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "query, key and value must have one floating-point dtype; got "
            f"{query.dtype}, {key.dtype}, {value.dtype}"
        )
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("is_causal=True with an attn_mask: put the causal part into the mask")
    full = (*query.shape[:3], key.shape[2])
    ends = zip(reversed(attn_mask.shape), reversed(full))
    if attn_mask.ndim > 4 or any(size not in (1, whole) for size, whole in ends):
        raise ValueError(f"attn_mask {tuple(attn_mask.shape)} does not broadcast to {full}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask of {attn_mask.dtype}: must be bool or floating point")


@torch.library.custom_op("laser::attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    inputs = _Inputs(query, key, value, mask, is_causal, scale)
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    for start, stop in inputs.chunks():
        chunk = inputs.chunk(start, stop)
        chunk_out = chunk.fast.masked_fill(~chunk.certified, 0)
        for at, terms, largest, _ in chunk.uncertified():
            chunk_out[at] = terms.logsumexp(-1) + largest
        out[:, :, start:stop] = inputs.by_head(chunk_out)
    return out


@torch.library.custom_op("laser::attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    mask_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # With w = P · E / y: dV = Σ_c do · w and dlogits = Σ_d do · (w - P). No reference appears.
    inputs = _Inputs(query, key, value, mask, is_causal, scale)
    d_key, d_value = torch.zeros_like(inputs.key), torch.zeros_like(inputs.value)
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_mask = torch.zeros_like(mask) if mask_too and mask is not None else query.new_empty(0)
    for start, stop in inputs.chunks():
        chunk = inputs.chunk(start, stop)
        d = inputs.by_key_head(d_out[:, :, start:stop]).to(d_key.dtype)
        # Gradients are linear in dO: divided by small sums, one of about 1 stays within range.
        power = torch.frexp(d.abs().amax((-2, -1), keepdim=True)).exponent.clamp(-120, 120)
        d = torch.ldexp(d, -power)
        if chunk.empty is not None:
            d = d.masked_fill(chunk.empty, 0)
        d_fast = d.masked_fill(~chunk.certified, 0)
        d_y = d_fast / chunk.y.masked_fill(~chunk.certified, 1)
        d_logits = chunk.probs * (d_y @ chunk.exp_v.mT - d_fast.sum(-1, keepdim=True))
        d_v = (chunk.probs.mT @ d_y) * chunk.exp_v
        for at, terms, _, probs in chunk.uncertified():
            b, h, c, feature = at
            share = terms.softmax(-1)
            d_v.mT.index_put_((b, h, feature), d[at][:, None] * share, accumulate=True)
            d_logits.index_put_((b, h, c), d[at][:, None] * (share - probs), accumulate=True)
        d_logits = torch.ldexp(d_logits, power)
        stop_k = d_logits.shape[-1]
        d_value[:, :, :stop_k] += torch.ldexp(d_v, power)
        d_key[:, :, :stop_k] += scale * (d_logits.mT @ chunk.query)
        d_q = scale * (d_logits @ inputs.key[:, :, :stop_k])
        d_query[:, :, start:stop] = inputs.by_head(d_q)
        if mask_too and mask is not None:
            part = d_mask if mask.shape[2] == 1 else d_mask[:, :, start:stop]
            part += inputs.by_head(d_logits).sum_to_size(part.shape)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_mask


class _Inputs(NamedTuple):
    """What an operator is given; the chunks of queries, and what is formed for one."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
