import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import laser.dropins.transformers  # registers attn_implementation="laser"

config = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="laser")
tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
