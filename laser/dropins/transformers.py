"""LASER in Hugging Face's PyTorch models: importing this registers `attn_implementation="laser"`.

By transformers' AttentionInterface, so it serves every model that calls it. Masks are those that
transformers makes for PyTorch's own function: padding, windows and caches are in them.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from laser.torch import scaled_dot_product_attention

# What some models hand over, and LASER has not: Gemma 2's cap, gpt-oss's sinks, T5's biases.
UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")


def laser_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: log(softmax(Q Kᵀ · scaling + mask) exp(V)) (arXiv 2411.03493).

    Args:
      module: the layer; `is_causal` of it counts where the argument is None.
      query: (B, H, T, D).
      key: (B, K, S, D), where K divides H.
      value: (B, K, S, D_v).
      attention_mask: broadcasts to (B, H, T, S), bool or added to the logits, or None.
      dropout: 0; in training, set the config's attention_dropout to 0.
      scaling: factor of the logits; 1/√D if None.
      is_causal: whether no mask stands for a causal one.

    Returns:
      (B, T, H, D_v) in the dtype of `value`, and None in the place of the weights.

    Raises:
      ValueError: what LASER has not, by its name.
    """
    given = [name for name in UNKNOWN if options.get(name) is not None]
    if options.get("output_attentions"):
        given.append("output_attentions")
    if given:
        raise ValueError(f"{given[0]}: attn_implementation='laser' has none; leave it out")
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout}: LASER has no dropout of probabilities; set it to 0"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = scaled_dot_product_attention(
        # Under autocast what a model rotates or normalises is float32, and its values are not.
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        attn_mask=attention_mask,
        # One new token sees the whole cache.
        is_causal=bool(is_causal) and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=True,
        kind="laser",
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("laser", laser_attention_forward)
AttentionMaskInterface.register("laser", sdpa_mask)
