"""LASER in MaxText: a method to put in the place of AttentionOp.apply_attention.

    AttentionOp.apply_attention = apply_attention  # of maxtext.layers.attention_op

For training and evaluation, which call it with the mode "train": prefill and decoding join partial
results of standard attention. Made for MaxText 0.2.5; needs no import of it.
"""

from typing import Any

import jax

from laser.attention import attention, dot_product_attention

Array = jax.Array


def apply_attention(
    self: Any,
    query: Array,
    key: Array,
    value: Array,
    decoder_segment_ids: Array | None,
    segment_positions: Array | None,
    lengths: Array | None,
    model_mode: str,
    use_ragged_attention: bool = False,
    previous_chunk: Any = None,
    bidirectional_mask: Any = None,
    sinks: Array | None = None,
    indexer_mask: Array | None = None,
    compressed_mask: Array | None = None,
    record_max_logits: bool = False,
    decoder_segment_ids_kv: Array | None = None,
    pad_kv_total: int = 0,
    compress_ratio: int = 0,
    *,
    qk_product_einsum: Any = None,
    wv_product_einsum: Any = None,
) -> tuple[Array, None, None]:
    """log(softmax(Q Kᵀ) exp(V)) (arXiv 2411.03493); MaxText has scaled the query.

    Args:
      self: MaxText's AttentionOp, with attention of the type global, full or local_sliding.
      query: (B, T, N, D).
      key: (B, T, K, D), where K divides N.
      value: (B, T, K, D_v).
      decoder_segment_ids: (B, T) int, or None: a query sees keys of its own segment alone.
      segment_positions, lengths, use_ragged_attention: of no effect in training.
      model_mode: "train".
      previous_chunk, bidirectional_mask, sinks, indexer_mask, compressed_mask: None.
      record_max_logits, decoder_segment_ids_kv, pad_kv_total, compress_ratio: as if not set.
      qk_product_einsum, wv_product_einsum: MaxText's own, which are not used.

    Returns:
      (B, T, N, D_v), and None twice: there is nothing left to normalise.

    Raises:
      ValueError: what LASER has not here, by its name.
    """
    kind = self.attention_type.value
    refused = {
        f"model_mode={model_mode!r}": model_mode != "train",
        f"attention_type={kind!r}": kind not in ("global", "full", "local_sliding"),
        f"dropout_rate={self.dropout_rate}": self.dropout_rate,
        "attn_logits_soft_cap with a sliding window": self.attn_logits_soft_cap
        and kind == "local_sliding",
        "context parallelism": self._context_parallel_size() > 1,
        "previous_chunk": previous_chunk is not None,
        "bidirectional_mask": bidirectional_mask is not None,
        "sinks": sinks is not None,
        "indexer_mask": indexer_mask is not None,
        "compressed_mask": compressed_mask is not None,
        "record_max_logits": record_max_logits,
        "decoder_segment_ids_kv": decoder_segment_ids_kv is not None,
        "pad_kv_total": pad_kv_total,
        "compress_ratio": compress_ratio,
    }
    for name, is_given in refused.items():
        if is_given:
            raise ValueError(f"{name}: LASER in MaxText has none; see docs/drop-ins.md")
    if kind == "local_sliding":
        together = None
        if decoder_segment_ids is not None:
            together = decoder_segment_ids[:, None, :, None] == decoder_segment_ids[:, None, None]
        window = (self.sliding_window_size - 1, 0)
        out = dot_product_attention(
            query, key, value, mask=together, kind="laser", scale=1.0, local_window_size=window
        )
    else:
        out = attention(
            query,
            key,
            value,
            kind="laser",
            logits_scale=1.0,
            causal=kind == "global",
            segment_ids=decoder_segment_ids,
            logits_soft_cap=self.attn_logits_soft_cap,
        )
    return out, None, None
