"""The model's shape as frozen dataclasses: plain Python, to be checked before jax starts."""

import dataclasses
import math
from typing import Literal


def require(condition: bool, message: str) -> None:
    """Raises ValueError with a message for the person who wrote the config."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Which attention function. Fields as in configs/base.py, section `attention`."""

    kind: Literal["standard", "laser"] = "laser"
    temperature: float = 1.0
    per_dim_temp: bool = False
    qk_norm: bool = False
    diff: Literal["none", "official", "scalar"] = "none"
    soft_cap: float = 0.0
    implementation: Literal["auto", "pallas", "cudnn", "chunked", "reference", "paper"] = "auto"

    def __post_init__(self):
        require(
            self.temperature > 0,
            f"attention.temperature={self.temperature}: must be above 0 (1.0 = off)",
        )
        require(
            self.soft_cap >= 0,
            f"attention.soft_cap={self.soft_cap}: must be 0 (off) or positive",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Fields as in configs/base.py, section `model`."""

    vocab_size: int
    num_layers: int
    model_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    num_kv_heads: int = 0
    mlp: Literal["gelu", "geglu", "swiglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    positions: Literal["sinusoidal", "rotary"] = "sinusoidal"
    logits_soft_cap: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["default", "high", "highest"] = "highest"
    remat: Literal["none", "dots", "full"] = "full"
    unroll: bool = False
    attention: AttentionConfig = AttentionConfig()

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "model_dim", "mlp_dim", "num_heads", "head_dim"):
            value = getattr(self, name)
            require(value > 0, f"model.{name}={value}: must be at least 1")
        require(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads}: must divide model.num_heads={self.num_heads}"
            f"; use {math.gcd(self.num_heads, self.num_kv_heads)} or another divisor of it, or 0 "
            "for as many",
        )
        require(
            self.model_dim % 2 == 0 or self.positions != "sinusoidal",
            f"model.model_dim={self.model_dim}: sinusoidal positions need an even number",
        )
        require(
            self.attention.diff == "none" or self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim}: differential attention halves the size of queries "
            "and keys; use an even number",
        )
        require(
            self.positions != "rotary" or self.query_dim % 2 == 0,
            f"model.head_dim={self.head_dim}: rotary positions rotate pairs, and queries have size "
            f"{self.query_dim}; use a multiple of {2 * self.head_dim // self.query_dim}",
        )
        require(
            self.logits_soft_cap >= 0,
            f"model.logits_soft_cap={self.logits_soft_cap}: must be 0 (off) or positive",
        )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; each serves num_heads / kv_heads heads of queries."""
        return self.num_kv_heads or self.num_heads

    @property
    def attention_weights(self) -> int:
        """Entries of a layer's query, key, value and output matrices."""
        return 2 * self.model_dim * (self.num_heads + self.kv_heads) * self.head_dim

    @property
    def hidden_mlp_matrices(self) -> int:
        """Matrices from the model dim to the MLP's: `up`, and where it is gated `gate`."""
        return 1 if self.mlp == "gelu" else 2

    @property
    def mlp_weights(self) -> int:
        """Entries of a layer's MLP."""
        return (self.hidden_mlp_matrices + 1) * self.model_dim * self.mlp_dim

    @property
    def query_dim(self) -> int:
        """Size of one query or key. Differential attention has two of half the size, so that its
        parameters are as many as the baseline's (paper, section 4.4: d_v = 2 d_k)."""
        return self.head_dim // 2 if self.attention.diff != "none" else self.head_dim
