"""config.json and tokenizer_config.json of an export, as the architecture's class wants them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from data.tokenizer import Tokenizer
from export import timm
from export.layouts import Layout
from laser.training.config import RunConfig
from models.config import ModelConfig


def configuration(layout: Layout, config: RunConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json, without our own entry; `tokenizer` is None for images."""
    if tokenizer is None:
        return {"architecture": "VisionTransformer", "arguments": timm.arguments(config.model)}
    shared = {
        "dtype": "float32",
        "vocab_size": config.model.vocab_size,
        "bos_token_id": tokenizer.eos_id,  # EOS comes before a document, too
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": False,
        "use_cache": config.model.causal,
    }
    return {**shared, **_ARCHITECTURES[layout](config.model, config.data.seq_len)}


def tokenizer_configuration(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json. A BERT's positions count from the row's beginning, so that padding
    comes behind, and it has a token for a mask."""
    common = {
        "tokenizer_class": "LaserTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_laser.LaserTokenizer", None]},
        "model_max_length": config.data.seq_len,
    }
    if config.model.causal:
        return common
    return {**common, "padding_side": "right", "mask_token": tokenizer.piece(tokenizer.mask_id())}


def _gpt2(config: ModelConfig, max_length: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.num_layers,
        "n_embd": config.model_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": max_length,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-6,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _starcoder2(config: ModelConfig, max_length: int) -> dict[str, Any]:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        **_rotary(config, max_length),
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-6,
        "sliding_window": None,
        "use_bias": False,
    }


def _llama(config: ModelConfig, max_length: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_rotary(config, max_length),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _rotary(config: ModelConfig, max_length: int) -> dict[str, Any]:
    """What StarCoder2 and Llama call alike."""
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max_length,
        "rope_theta": 10_000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }


def _megatron_bert(config: ModelConfig, max_length: int) -> dict[str, Any]:
    return {
        "architectures": ["MegatronBertForMaskedLM"],
        "model_type": "megatron-bert",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": max_length,
        "type_vocab_size": 1,
        "hidden_act": {"gelu": "gelu_pytorch_tanh", "relu": "relu"}[config.mlp],
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _laser(config: ModelConfig, max_length: int) -> dict[str, Any]:
    task = "CausalLM" if config.causal else "MaskedLM"
    return {
        "architectures": [f"LaserFor{task}"],
        "model_type": "laser_attention",
        "auto_map": {
            "AutoConfig": "configuration_laser.LaserConfig",
            f"AutoModelFor{task}": f"modeling_laser.LaserFor{task}",
        },
        "laser_model": dataclasses.asdict(config),
        "max_position_embeddings": max_length,
    }


_ARCHITECTURES: dict[Layout, Callable[[Any, int], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "starcoder2": _starcoder2,
    "llama": _llama,
    "megatron_bert": _megatron_bert,
    "laser": _laser,
}
