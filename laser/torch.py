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

import functools
import math
from collections.abc import Callable, Iterator
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
    kind: Literal["standard", "laser"],
) -> Tensor:
    """softmax(scale · Q Kᵀ + M) V, or LASER's log(softmax(scale · Q Kᵀ + M) exp(V)).

    LASER (arXiv 2411.03493, section 3.2) is exact to rounding for every finite V, and a key that a
    query may not see has no part in its output or gradients beyond their rounding, whatever its
    value. It computes in float32 (float64 for float64), under autocast, too. Gradients reach query,
    key, value and a mask of numbers, once differentiable.

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
      kind: `standard` is torch's function itself. Always named.

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


def _without_autocast(operator: Callable) -> Callable:
    """Autocast would round within it what is float32 for a reason."""

    @functools.wraps(operator)
    def wide(first: Tensor, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return operator(first, *rest)

    return wide


@torch.library.custom_op("laser::attention", mutates_args=())
@_without_autocast
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    inputs = _Inputs(query, key, value, mask, is_causal, scale)
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    for start, stop in inputs.chunks():
        chunk = inputs.chunk(start, stop)
        chunk_out = chunk.fast.where(chunk.certified, 0)
        for at, terms, largest, _ in chunk.uncertified():
            chunk_out[at] = terms.logsumexp(-1) + largest
        out[:, :, start:stop] = inputs.by_head(chunk_out)
    return out


@torch.library.custom_op("laser::attention_backward", mutates_args=())
@_without_autocast
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
    contiguous = torch.contiguous_format  # however the inputs lie: what torch.compile is told below
    d_key = torch.zeros_like(inputs.key, memory_format=contiguous)
    d_value = torch.zeros_like(inputs.value, memory_format=contiguous)
    d_query = torch.empty_like(query, memory_format=contiguous)
    d_mask = torch.zeros_like(mask) if mask_too and mask is not None else query.new_empty(0)
    for start, stop in inputs.chunks():
        chunk = inputs.chunk(start, stop)
        d = inputs.by_key_head(d_out[:, :, start:stop]).to(d_key.dtype)
        # Gradients are linear in dO: divided by small sums, one of about 1 stays within range.
        power = torch.frexp(d.abs().amax((-2, -1), keepdim=True)).exponent.clamp(-120, 120)
        d, back = d * _power_of_two(-power, d.dtype), _power_of_two(power, d.dtype)
        d_fast = d.where(chunk.certified, 0)
        d_y = d_fast / chunk.y.where(chunk.certified, 1)
        d_logits = d_y @ chunk.exp_v.mT
        d_logits.sub_(d_fast.sum(-1, keepdim=True)).mul_(chunk.probs)
        d_v = (chunk.probs.mT @ d_y).mul_(chunk.exp_v)
        for at, terms, _, probs in chunk.uncertified():
            b, h, c, feature = at
            share = terms.softmax(-1)
            d_v.mT.index_put_((b, h, feature), d[at][:, None] * share, accumulate=True)
            d_logits.index_put_((b, h, c), d[at][:, None] * (share - probs), accumulate=True)
        d_logits *= back
        stop_k = d_logits.shape[-1]
        d_value[:, :, :stop_k] += d_v.mul_(back)
        d_key[:, :, :stop_k] += d_logits.mT @ chunk.query
        d_q = scale * (d_logits @ inputs.key[:, :, :stop_k])
        d_query[:, :, start:stop] = inputs.by_head(d_q)
        if mask_too and mask is not None:
            part = d_mask if mask.shape[2] == 1 else d_mask[:, :, start:stop]
            part += inputs.by_head(d_logits).sum_to_size(part.shape)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_mask


class _Inputs:
    """What an operator is given, wide, and what one chunk of queries makes of it."""

    def __init__(self, query, key, value, mask, is_causal, scale):
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = query, key.to(dtype), value.to(dtype)
        self.mask, self.is_causal, self.scale = mask, is_causal, scale
        self.heads, self.kv_heads = query.shape[1], key.shape[1]
        bounded = self.value.clamp(-LARGEST_EXPONENTIATED, LARGEST_EXPONENTIATED) * LOG2_E
        whole = bounded.floor()
        self.mantissa, self.power = torch.exp2(bounded - whole), whole.to(torch.int32)

    def chunks(self) -> list[tuple[int, int]]:
        """Where each begins and ends: short ones skip more of the causal square."""
        length = self.query.shape[2]
        step = 128 if length <= 2048 else 256
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def by_key_head(self, x: Tensor) -> Tensor:
        """(B, H, C, ·) -> (B, K, H / K · C, ·); a mask of one head is repeated."""
        if self.heads == self.kv_heads:
            return x
        x = x.expand(-1, self.heads, -1, -1)
        return x.reshape(x.shape[0], self.kv_heads, -1, x.shape[-1])

    def by_head(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.heads, -1, x.shape[-1])

    def chunk(self, start: int, stop: int) -> "_Chunk":
        query = self.by_key_head(self.query[:, :, start:stop]).to(self.key.dtype) * self.scale
        seen = min(stop, self.key.shape[2]) if self.is_causal else self.key.shape[2]
        logits = query @ self.key[:, :, :seen].mT
        empty, power = None, self.power[:, :, :seen]
        if self.is_causal and start < seen:
            later = logits.new_ones(stop - start, seen - start, dtype=torch.bool).triu(1)
            later = later.repeat(self.heads // self.kv_heads, 1)
            logits[..., start:].masked_fill_(later, -math.inf)
        if self.mask is not None:
            rows = slice(None) if self.mask.shape[2] == 1 else slice(start, stop)
            mask = self.by_key_head(self.mask[:, :, rows].expand(-1, -1, stop - start, -1))
            if mask.dtype == torch.bool:
                logits.masked_fill_(~mask, -math.inf)
            else:
                logits += mask
            visible = logits > -math.inf
            empty = ~visible.any(-1, keepdim=True)
            # A key that no query of the chunk sees counts as 0 and sets no reference.
            power = power.masked_fill(~visible.any(-2)[..., None], -(2**20))
        reference = power.amax(2, keepdim=True)
        exp_v = self.mantissa[:, :, :seen] * _power_of_two(power - reference, query.dtype)
        probs = logits.softmax(-1)
        if empty is not None:
            probs.masked_fill_(empty, 0)
        y = probs @ exp_v
        mantissa, exponent = torch.frexp(y)
        fast = mantissa.log_().add_((exponent + reference) * LN_2)
        certified = (
            (y >= SMALLEST_CERTIFIED) & (y < math.inf) & (fast.abs() <= LARGEST_CERTIFIED_OUTPUT)
        )
        value = self.value[:, :, :seen]
        return _Chunk(query, value, logits, exp_v, probs, y, fast, certified, empty)


def _power_of_two(n: Tensor, dtype: torch.dtype) -> Tensor:
    """2^n of int32 n <= 127, exactly; 0 far below the normal numbers."""
    if dtype == torch.float32:
        return (n.clamp(min=-127) + 127 << 23).view(dtype)
    return torch.ldexp(torch.ones_like(n, dtype=dtype), n)


class _Chunk(NamedTuple):
    """Of all heads: the scaled query and fast (B, K, C, D); logits (B, K, C, S); V and
    exp_v = exp(V) / 2^reference (B, K, S, D).

    `fast` is the output where `certified`; `empty` (B, K, C, 1) are the queries that see no key.
    """

    query: Tensor
    value: Tensor
    logits: Tensor
    exp_v: Tensor
    probs: Tensor
    y: Tensor
    fast: Tensor
    certified: Tensor
    empty: Tensor | None

    def uncertified(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]]:
        """What log space needs, some elements at a time: (b, h, c, d) and, of each element's keys,
        log A + V - its largest visible V, that value, and A."""
        missing = ~self.certified if self.empty is None else ~(self.certified | self.empty)
        at_all = missing.nonzero()
        for at in at_all.split(max(1, ELEMENTS_AT_ONCE // self.logits.shape[-1])):
            b, h, c, feature = at.unbind(-1)
            log_probs = self.logits[b, h, c].log_softmax(-1)
            hidden = log_probs == -math.inf
            value = self.value.mT[b, h, feature].masked_fill(hidden, -math.inf)
            largest = value.amax(-1)
            terms = (log_probs + (value - largest[:, None])).masked_fill(hidden, -math.inf)
            yield (b, h, c, feature), terms, largest, log_probs.exp()


@_attention.register_fake
def _(query, key, value, mask, is_causal, scale):
    return query.new_empty((*query.shape[:3], value.shape[3]))


@_attention_backward.register_fake
def _(d_out, query, key, value, mask, is_causal, scale, mask_too):
    d_mask = torch.zeros_like(mask) if mask_too and mask is not None else query.new_empty(0)
    d_query, d_key, d_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    return d_query, d_key, d_value, d_mask


def _keep(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask)


def _backward(ctx, d_out):
    mask_too = ctx.needs_input_grad[3]
    *gradients, d_mask = _attention_backward(
        d_out, *ctx.saved_tensors, ctx.is_causal, ctx.scale, mask_too
    )
    return *gradients, d_mask if mask_too else None, None, None


_attention.register_autograd(_backward, setup_context=_keep)
