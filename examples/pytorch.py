import torch

from laser.torch import scaled_dot_product_attention

query, key, value = torch.randn(3, 2, 4, 10, 8)  # each (batch, heads, length, size)
value.requires_grad_()
out = scaled_dot_product_attention(query, key, value, is_causal=True, kind="laser")
out.sum().backward()
