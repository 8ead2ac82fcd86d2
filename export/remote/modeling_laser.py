"""A decoder or BERT with LASER attention (arXiv 2411.03493) in PyTorch, for transformers.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)

Every option of the JAX model that was exported: LASER or standard attention, grouped heads,
temperatures, QK-norm, differential attention, soft caps, sinusoidal or rotary positions, gated
MLPs. Tensors have the names and shapes
of its parameters. For inference: gradients of the exact path are not optimised.

Shapes: B batch, T new positions, S positions seen, M model dim, H heads of queries, K of keys and
values, D head dim, Q query dim.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

from .configuration_laser import LaserConfig

SMALLEST_CERTIFIED = 2.0**-90  # of a sum of probabilities times exp(V - max V)
# What other models take, and what would have no effect on this one.
ABSENT = (
    "inputs_embeds", "position_ids", "token_type_ids", "num_items_in_batch", "output_attentions",
    "output_hidden_states",
)  # fmt: skip


class Norm(nn.Module):
    """LayerNorm or RMSNorm in float32."""

    def __init__(self, size, kind):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layernorm" else None

    def forward(self, x):
        y = x.float()
        if self.bias is not None:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.up = nn.Parameter(torch.empty(model["model_dim"], model["mlp_dim"]))
        self.down = nn.Parameter(torch.empty(model["mlp_dim"], model["model_dim"]))
        self.kind = model["mlp"]
        if self.kind in ("geglu", "swiglu"):
            self.gate = nn.Parameter(torch.empty(model["model_dim"], model["mlp_dim"]))

    def forward(self, x):
        hidden = x @ self.up
        if self.kind == "gelu":
            return functional.gelu(hidden, approximate="tanh") @ self.down
        if self.kind == "relu":
            return functional.relu(hidden) @ self.down
        gate = x @ self.gate
        swish = self.kind == "swiglu"
        gate = functional.silu(gate) if swish else functional.gelu(gate, approximate="tanh")
        return (gate * hidden) @ self.down


class Attention(nn.Module):
    """Self-attention of any variant; differential attention has two maps over the same values."""

    def __init__(self, model, layer):
        super().__init__()
        self.layer, self.model, self.variant = layer, model, model["attention"]
        dim, heads, size = model["model_dim"], model["num_heads"], model["head_dim"]
        self.maps = 1 if self.variant["diff"] == "none" else 2
        self.query_dim = size // self.maps
        kv_heads = model["num_kv_heads"] or heads
        self.group = heads // kv_heads
        for name in ("query", "output"):
            setattr(self, name, nn.Parameter(torch.empty(dim, heads, size)))
        for name in ("key", "value"):
            setattr(self, name, nn.Parameter(torch.empty(dim, kv_heads, size)))
        if self.variant["per_dim_temp"]:
            self.log_temperature = nn.Parameter(torch.zeros(self.query_dim))
        if self.variant["qk_norm"]:
            self.query_norm = Norm(self.query_dim, "layernorm")
            self.key_norm = Norm(self.query_dim, "layernorm")
        if self.variant["diff"] == "official":
            self.lambda_vectors = nn.Parameter(torch.zeros(4, self.query_dim))
            self.output_norm_scale = nn.Parameter(torch.ones(size))
        elif self.variant["diff"] == "scalar":
            self.lambda_scalar = nn.Parameter(torch.zeros(()))

    def forward(self, x_BTM, rotation, seen_B1TS, cache):
        query, key, value = (
            torch.einsum("btm,mhd->bhtd", x_BTM, w) for w in (self.query, self.key, self.value)
        )
        queries, keys = self._prepared(query, rotation, True), self._prepared(key, rotation, False)
        key = torch.cat(keys, dim=-1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        if self.group > 1:
            key, value = (x.repeat_interleave(self.group, dim=1) for x in (key, value))
        keys = key.split(self.query_dim, dim=-1)
        outs = [self._attend(q, k, value, seen_B1TS) for q, k in zip(queries, keys)]
        out = outs[0] if self.maps == 1 else self._difference(*outs)
        return torch.einsum("bhtd,mhd->btm", out, self.output)

    def _prepared(self, x_BHTD, rotation, is_query):
        """The maps' queries or keys, as they meet each other."""
        maps = list(x_BHTD.split(self.query_dim, dim=-1))
        if rotation is not None:
            maps = [rotated(x, *rotation) for x in maps]
        if self.variant["qk_norm"]:
            maps = [(self.query_norm if is_query else self.key_norm)(x) for x in maps]
        if self.variant["per_dim_temp"] and is_query:
            factor = functional.softplus(self.log_temperature) / math.log(2)
            maps = [(x * factor).to(x.dtype) for x in maps]
        return maps

    def _attend(self, query, key, value, seen_B1TS):
        scale = 1 / (self.variant["temperature"] * math.sqrt(self.query_dim))
        logits = (query @ key.transpose(-1, -2)).float() * scale
        if self.variant["soft_cap"]:
            logits = self.variant["soft_cap"] * torch.tanh(logits / self.variant["soft_cap"])
        log_probs = torch.log_softmax(logits.masked_fill(~seen_B1TS, -math.inf), dim=-1)
        v = value.float()
        if self.variant["kind"] == "standard":
            return (log_probs.exp() @ v).to(value.dtype)
        return laser(log_probs, v).to(value.dtype)

    def _difference(self, first, second):
        initial = 0.8 - 0.6 * math.exp(-0.3 * self.layer)
        if self.variant["diff"] == "scalar":
            return (first.float() - (self.lambda_scalar + initial) * second.float()).to(first.dtype)
        q1, k1, q2, k2 = self.lambda_vectors
        factor = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + initial
        out = first.float() - factor * second.float()
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5)
        return (out * self.output_norm_scale * (1 - initial)).to(first.dtype)


def laser(log_probs, v):
    """log(P exp(V)), exact for every V: where a sum comes close to underflow, as a logsumexp.

    (B, H, T, S), -inf where a key is not visible, and (B, H, S, D) -> (B, H, T, D), float32.
    """
    top = v.amax(dim=-2, keepdim=True)
    total = log_probs.exp() @ torch.exp(v - top)
    certified = total >= SMALLEST_CERTIFIED
    out = torch.log(torch.where(certified, total, 1.0)) + top
    for t in torch.nonzero(~certified.all(dim=-1).all(dim=1).all(dim=0)).flatten().tolist():
        terms = log_probs[:, :, t, :, None]
        terms = torch.where(terms > -math.inf, terms + v, -math.inf)
        exact = torch.logsumexp(terms, dim=-2)
        out[:, :, t] = torch.where(certified[:, :, t], out[:, :, t], exact)
    return out


def frequencies(model):
    """Radians per position, float32, of half as many entries as a vector has that is rotated or
    added to.

    No part of the state: a model that is cast to bfloat16 would round them, and at position 1000
    the bits that it lacks are whole radians.
    """
    if model["positions"] == "rotary":
        maps = 1 if model["attention"]["diff"] == "none" else 2
        count = last = model["head_dim"] // maps // 2
    else:
        count = model["model_dim"] // 2
        last = max(count - 1, 1)
    steps = torch.arange(count, dtype=torch.float64, device="cpu")  # not every device has float64
    return torch.exp(-math.log(10_000.0) * steps / last).float()


def rotated(x, sin, cos):
    """Halves rotated against each other, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, model, layer):
        super().__init__()
        self.attention_norm = Norm(model["model_dim"], model["norm"])
        self.attention = Attention(model, layer)
        self.mlp_norm = Norm(model["model_dim"], model["norm"])
        self.mlp = Mlp(model)

    def forward(self, x, rotation, seen_B1TS, cache):
        x = x + self.attention(self.attention_norm(x), rotation, seen_B1TS, cache)
        return x + self.mlp(self.mlp_norm(x))


def refuse(options):
    """Raises ValueError for an argument that would be without the effect that it has elsewhere."""
    for name in ABSENT:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name}: this model has none; leave it out")
    if options.get("return_dict") is False:
        raise ValueError("return_dict=False: this model returns no tuple; leave it out")


class LaserModel(PreTrainedModel):
    """What a decoder and a BERT have in common: tokens to logits."""

    config_class = LaserConfig
    base_model_prefix = ""
    accepts_loss_kwargs = False  # the loss is a mean, which accumulation has to divide by its steps
    _no_split_modules = ["Block"]  # noqa: RUF012, transformers' own name and form

    def __init__(self, config):
        super().__init__(config)
        model = config.laser_model
        self.embedding = nn.Parameter(torch.empty(model["vocab_size"], model["model_dim"]))
        self.blocks = nn.ModuleList(Block(model, i) for i in range(model["num_layers"]))
        self.final_norm = Norm(model["model_dim"], model["norm"])
        self.post_init()

    def _init_weights(self, module):
        """Nothing: parameters are loaded."""

    def hidden(self, input_ids, positions_BT, seen_B1TS, cache=None):
        """Final hidden states, (B, T, M)."""
        model = self.config.laser_model
        x = self.embedding[input_ids] * math.sqrt(model["model_dim"])
        angle = positions_BT[..., None].float() * frequencies(model).to(x.device)
        rotation = None
        if model["positions"] == "rotary":
            rotation = (angle.sin()[:, None], angle.cos()[:, None])
        else:
            x = x + torch.cat([angle.sin(), angle.cos()], dim=-1).to(x.dtype)
        for block in self.blocks:
            x = block(x, rotation, seen_B1TS, cache)
        return self.final_norm(x)

    def logits(self, hidden):
        """Of the vocabulary, float32."""
        logits = (hidden @ self.embedding.T).float()
        if cap := self.config.laser_model["logits_soft_cap"]:
            logits = cap * torch.tanh(logits / cap)
        return logits


class LaserForCausalLM(LaserModel, GenerationMixin):
    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,  # what `cache` is called in some releases of transformers 5
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **options,
    ):
        """As of any causal language model in transformers; padding may stand on either side.

        Raises ValueError for what it has not: embeddings in the place of tokens, positions, hidden
        states, a tuple.
        """
        refuse(options)
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        before = cache.get_seq_length() if cache is not None else 0
        batch, count = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, before + count)
        real_BS = attention_mask.bool()
        positions_BT = (real_BS.cumsum(-1)[:, before:] - 1).clamp(min=0)
        slots, new = torch.arange(before + count), torch.arange(before, before + count)
        causal_TS = (slots[None] <= new[:, None]).to(input_ids.device)
        itself_TS = (slots[None] == new[:, None]).to(input_ids.device)
        seen_B1TS = (causal_TS & real_BS[:, None, None]) | itself_TS

        x = self.hidden(input_ids, positions_BT, seen_B1TS, cache)
        kept = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.logits(kept)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


class LaserForMaskedLM(LaserModel):
    def forward(self, input_ids, attention_mask=None, labels=None, **options):
        """As of any masked language model in transformers: -100 in `labels` has no loss. Raises
        ValueError as LaserForCausalLM."""
        refuse(options)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real_BS = attention_mask.bool()
        positions_BT = (real_BS.cumsum(-1) - 1).clamp(min=0)
        itself_TS = torch.eye(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
        seen_B1TS = real_BS[:, None, None] | itself_TS
        logits = self.logits(self.hidden(input_ids, positions_BT, seen_B1TS))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)
