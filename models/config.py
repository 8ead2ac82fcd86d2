"""The model's shape as frozen dataclasses: plain Python, to be checked before jax starts."""

import dataclasses
import math
from typing import ClassVar, Literal, Protocol

GATED = ("geglu", "swiglu")  # of model.mlp, with three matrices


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


class BlockConfig(Protocol):
    """What the blocks of models/layers.py need to know of their model.

    Attributes:
      causal: positions see no later ones.
      biases: of the dense layers.
    """

    @property
    def causal(self) -> bool: ...
    @property
    def biases(self) -> bool: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def model_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def query_dim(self) -> int: ...
    @property
    def mlp(self) -> str: ...
    @property
    def hidden_mlp_matrices(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def matmul_precision(self) -> str: ...
    @property
    def norm(self) -> str: ...
    @property
    def positions(self) -> str: ...
    @property
    def remat(self) -> str: ...
    @property
    def unroll(self) -> bool: ...
    @property
    def attention(self) -> AttentionConfig: ...


class Counts:
    """What follows from the fields of a model config, whatever its kind.

    Attributes:
      subsampling: tokens of a row that become one position of the blocks.
    """

    subsampling: ClassVar[int] = 1

    @property
    def query_dim(self: BlockConfig) -> int:
        """Size of one query or key. Differential attention has two of half the size, so that its
        parameters are as many as the baseline's (paper, section 4.4: d_v = 2 d_k)."""
        return self.head_dim // 2 if self.attention.diff != "none" else self.head_dim

    @property
    def attention_weights(self: BlockConfig) -> int:
        """Entries of a layer's query, key, value and output matrices."""
        return 2 * self.model_dim * (self.num_heads + self.kv_heads) * self.head_dim

    @property
    def hidden_mlp_matrices(self: BlockConfig) -> int:
        """Matrices from the model dim to the MLP's: `up`, and where it is gated `gate`."""
        return 2 if self.mlp in GATED else 1

    @property
    def mlp_weights(self: BlockConfig) -> int:
        """Entries of a layer's MLP."""
        return (self.hidden_mlp_matrices + 1) * self.model_dim * self.mlp_dim


@dataclasses.dataclass(frozen=True)
class ModelConfig(Counts):
    """A decoder-only transformer. Fields as in configs/base.py, section `model`."""

    causal: ClassVar[bool] = True
    biases: ClassVar[bool] = False
    vocab_size: int
    num_layers: int
    model_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    kind: Literal["decoder"] = "decoder"
    num_kv_heads: int = 0
    mlp: Literal["gelu", "relu", "geglu", "swiglu"] = "gelu"
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
    def outer_weights(self) -> int:
        """Entries of the matrices outside of the blocks: the embedding."""
        return self.vocab_size * self.model_dim


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """An encoder of the same blocks, whose tokens see each other both ways; it learns to fill in
    masked tokens. Fields as in configs/bert.py, section `model`."""

    causal: ClassVar[bool] = False
    kind: Literal["bert"] = "bert"  # type: ignore[assignment]


class SplitHeads(Counts):
    """The part of a config of models whose heads split the model dim."""

    @property
    def head_dim(self: BlockConfig) -> int:
        """Size of a head's values."""
        return self.model_dim // self.num_heads

    @property
    def kv_heads(self: BlockConfig) -> int:
        """As many as heads of queries."""
        return self.num_heads

    def check_differential(self: BlockConfig) -> None:
        """Raises ValueError if differential attention cannot halve the heads."""
        require(
            self.attention.diff == "none" or self.head_dim % 2 == 0,
            f"model.num_heads={self.num_heads}: heads of size {self.head_dim}, and differential "
            "attention halves the size of queries and keys; use an even one",
        )


@dataclasses.dataclass(frozen=True)
class VitConfig(SplitHeads):
    """A vision transformer, see models/vit.py. Fields as in configs/vit.py, section `model`."""

    causal: ClassVar[bool] = False
    biases: ClassVar[bool] = True
    mlp: ClassVar[str] = "gelu"
    norm: ClassVar[str] = "layernorm"
    positions: ClassVar[str] = "sincos2d"

    image_size: int
    patch_size: int
    num_classes: int
    num_layers: int
    model_dim: int
    mlp_dim: int
    num_heads: int
    kind: Literal["vit"] = "vit"
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["default", "high", "highest"] = "highest"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: bool = False
    attention: AttentionConfig = AttentionConfig()

    def __post_init__(self):
        names = ("image_size", "patch_size", "num_classes", "num_layers", "mlp_dim", "num_heads")
        for name in names:
            value = getattr(self, name)
            require(value > 0, f"model.{name}={value}: must be at least 1")
        require(
            self.image_size % self.patch_size == 0,
            f"model.patch_size={self.patch_size}: must divide model.image_size={self.image_size}",
        )
        dim, heads = self.model_dim, self.num_heads
        require(
            dim >= 8 and dim % 4 == 0,
            f"model.model_dim={dim}: sines and cosines of two directions need a multiple of 4, "
            "at least 8",
        )
        require(
            dim % heads == 0,
            f"model.num_heads={heads}: must divide model.model_dim={dim}; use "
            f"{math.gcd(dim, heads)} or another divisor of it",
        )
        self.check_differential()
        require(
            0 <= self.dropout < 1,
            f"model.dropout={self.dropout}: must be at least 0 and below 1",
        )

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch, of three colours."""
        return 3 * self.patch_size**2

    @property
    def outer_weights(self) -> int:
        """Entries of the matrices outside of the blocks: patches, pre-logits and head."""
        return self.model_dim * (self.patch_values + self.model_dim + self.num_classes)


@dataclasses.dataclass(frozen=True)
class ConformerConfig(SplitHeads):
    """A Conformer, see models/conformer.py. Fields as in configs/conformer.py, section `model`."""

    subsampling: ClassVar[int] = 4
    causal: ClassVar[bool] = False
    biases: ClassVar[bool] = True
    mlp: ClassVar[str] = "swish"
    norm: ClassVar[str] = "layernorm"
    positions: ClassVar[str] = "sinusoidal"

    vocab_size: int
    num_layers: int
    model_dim: int
    mlp_dim: int
    num_heads: int
    kind: Literal["conformer"] = "conformer"
    mel_bins: int = 80
    kernel_size: int = 5
    dropout: float = 0.1
    bin_masks: int = 2
    max_masked_bins: int = 27
    time_masks: int = 10
    max_masked_time: float = 0.05
    batch_norm_momentum: float = 0.999
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["default", "high", "highest"] = "highest"
    remat: Literal["none", "dots", "full"] = "full"
    unroll: bool = False
    attention: AttentionConfig = AttentionConfig()

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "model_dim", "mlp_dim", "num_heads", "mel_bins"):
            value = getattr(self, name)
            require(value > 0, f"model.{name}={value}: must be at least 1")
        heads = self.num_heads
        require(
            self.model_dim % (2 * heads) == 0,
            f"model.model_dim={self.model_dim}: must be a multiple of 2 · model.num_heads="
            f"{2 * heads}",
        )
        self.check_differential()
        require(
            self.kernel_size > 0 and self.kernel_size % 2 == 1,
            f"model.kernel_size={self.kernel_size}: must be at least 1 and odd, to be centred on "
            "its frame",
        )
        for name in ("bin_masks", "max_masked_bins", "time_masks"):
            value = getattr(self, name)
            require(value >= 0, f"model.{name}={value}: must be at least 0")
        for name in ("dropout", "max_masked_time", "batch_norm_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"model.{name}={value}: must be at least 0 and below 1")

    @property
    def attention_weights(self) -> int:
        """Entries of a layer's attention, and of its convolution module, which has three more."""
        return 7 * self.model_dim**2 + self.kernel_size * self.model_dim

    @property
    def hidden_mlp_matrices(self) -> int:
        """Matrices from the model dim to the feed-forwards': the `up` of each."""
        return 2

    @property
    def mlp_weights(self) -> int:
        """Entries of a layer's two feed-forwards."""
        return 4 * self.model_dim * self.mlp_dim

    @property
    def outer_weights(self) -> int:
        """Entries of the matrices outside of the blocks: subsampling and head."""
        dim, bins = self.model_dim, -(-self.mel_bins // 4)
        return (9 + 9 * dim + bins * dim + self.vocab_size) * dim
