"""The boundary between what people write (configs/*.py, the command line) and what the code reads.

`load_config` turns the nested dictionary of configs/base.py into frozen dataclasses. Types,
choices, ranges and divisibility are checked here, once, and every message names the key, its value
and the way out. Nothing here imports jax, so a mistake is reported before any device is touched.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from laser.training.fields import check_names, checked, flatten, multiples
from models.config import (
    AttentionConfig,
    BertConfig,
    ConformerConfig,
    ModelConfig,
    VitConfig,
    require,
)


def _require_at_least(minimum: float, section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{section}.{name}={value}: must be at least {minimum}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in rows of which length. Fields as in configs/base.py, section `data`."""

    store: str
    tasks: str
    tasks_dir: str
    seq_len: int
    segment_ids: bool
    shuffle_seed: int
    block_rows: int
    prefetch: int
    read_ahead: int
    requests: int
    cache_dir: str
    cache_gb: float

    def __post_init__(self):
        _require_at_least(1, "data", self, "seq_len", "block_rows", "prefetch", "requests")
        _require_at_least(0, "data", self, "shuffle_seed", "read_ahead", "cache_gb")
        require(
            not (self.store and self.tasks),
            f"data.store={self.store} and data.tasks={self.tasks}: one of them must be empty",
        )
        require(
            not (self.tasks and self.segment_ids),
            f"data.segment_ids=True with data.tasks={self.tasks}: a row has one example; use False",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and schedule. Fields as in configs/base.py, section `optimizer`."""

    name: Literal["adamw", "nadamw", "lamb", "muon"]
    learning_rate: float
    schedule: Literal["cosine", "wsd"]
    warmup_steps: int
    decay_steps: int
    b1: float
    b2: float
    muon_momentum: float
    eps: float
    weight_decay: float
    clip_grad_norm: float
    clip_update_rms: float

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name}={value}: must be above 0")
        for name in ("b1", "b2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value}: must be at least 0 and below 1")
        _require_at_least(0, "optimizer", self, "warmup_steps", "weight_decay")
        _require_at_least(0, "optimizer", self, "clip_grad_norm", "clip_update_rms", "decay_steps")
        require(
            (self.schedule == "wsd") == (self.decay_steps > 0),
            f"optimizer.decay_steps={self.decay_steps} with optimizer.schedule={self.schedule}: "
            "wsd needs at least 1, cosine decays from the warm-up on and takes 0",
        )
        require(
            self.clip_update_rms > 0 or self.eps >= 1e-12,
            f"optimizer.eps={self.eps} with optimizer.clip_update_rms=0: nothing bounds the step "
            "of a parameter whose gradients are almost 0; use clip_update_rms=1.0, or eps=1e-8",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and rhythm of a run. Fields as in configs/base.py, section `training`."""

    seed: int
    steps: int
    epochs: int
    batch_size: int
    accumulation: int
    z_loss: float
    skip_gradient_norm: float
    max_skipped_steps: int
    log_every: int
    eval_every: int
    eval_batches: int
    profile_steps: str
    wandb_project: str
    step_timeout_seconds: float

    def __post_init__(self):
        _require_at_least(1, "training", self, "batch_size", "accumulation")
        _require_at_least(1, "training", self, "max_skipped_steps", "log_every")
        _require_at_least(0, "training", self, "steps", "epochs", "seed", "z_loss")
        _require_at_least(0, "training", self, "eval_every", "eval_batches", "step_timeout_seconds")
        profiled_steps(self.profile_steps)
        require(
            self.skip_gradient_norm == 0 or self.skip_gradient_norm > 1,
            f"training.skip_gradient_norm={self.skip_gradient_norm}: must be 0 (off), or above 1, "
            "times the usual norm",
        )
        require(
            (self.steps > 0) != (self.epochs > 0),
            f"training.steps={self.steps} and training.epochs={self.epochs}: one of them must be "
            "at least 1 and the other 0",
        )
        require(
            self.batch_size % self.accumulation == 0,
            f"training.batch_size={self.batch_size}: must be a multiple of "
            f"training.accumulation={self.accumulation}; "
            f"use {multiples(self.batch_size, self.accumulation)}",
        )


def profiled_steps(text: str) -> tuple[int, int]:
    """First and last step of training.profile_steps, as "100,105"; (0, 0) of none.

    Raises ValueError.
    """
    if not text:
        return 0, 0
    first, _, last = text.partition(",")
    require(
        first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last),
        f"training.profile_steps={text!r}: must be the first and the last step, such as 100,105",
    )
    return int(first), int(last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Tasks scored while training. Fields as in configs/base.py, section `evaluation`."""

    tasks: str
    data_dir: str
    protocol: Literal["gpt3", "lm_eval"]
    shots: int
    limit: int
    every: int

    def __post_init__(self):
        _require_at_least(0, "evaluation", self, "shots", "limit", "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep. Fields as in configs/base.py, section `checkpoint`."""

    every: int
    keep: int
    best: Literal["none", "loss", "error", "wer", "decoding_accuracy"]
    keep_period: int

    def __post_init__(self):
        _require_at_least(1, "checkpoint", self, "keep")
        _require_at_least(0, "checkpoint", self, "every", "keep_period")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are arranged. Fields as in configs/base.py, section `mesh`."""

    data: int
    fsdp: int
    tensor: int
    max_unsharded: float = 0.02
    compiler_options: Literal["chip", "none"] = "chip"

    def __post_init__(self):
        require(
            0 <= self.max_unsharded <= 1,
            f"mesh.max_unsharded={self.max_unsharded}: must be between 0 and 1",
        )
        axes = self.axes()
        for name, size in axes.items():
            require(
                size >= 1 or size == -1,
                f"mesh.{name}={size}: must be at least 1, or -1 for all devices that are left",
            )
        rest = [f"mesh.{name}=-1" for name, size in axes.items() if size == -1]
        require(len(rest) <= 1, f"{' and '.join(rest)}: only one axis can take what is left")

    def axes(self) -> dict[str, int]:
        """Sizes by name."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """What a vision transformer sees. Fields as in configs/vit.py, section `images`."""

    source: str
    test: str
    crop: Literal["imagenet", "none"]
    operations: int
    magnitude: float
    mixup: float
    label_smoothing: float
    workers: int
    max_broken: int

    def __post_init__(self):
        _require_at_least(0, "images", self, "operations", "magnitude", "mixup")
        _require_at_least(0, "images", self, "label_smoothing", "workers", "max_broken")
        for name, most in (("magnitude", 10), ("mixup", 1), ("label_smoothing", 1)):
            value = getattr(self, name)
            require(value <= most, f"images.{name}={value}: must be at most {most}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that defines a run. The section `attention` of configs/base.py is `model.attention`."""

    init_from: str
    model: Any  # of one of the classes of MODELS
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    images: ImagesConfig | None = None  # of a vision transformer

    def __post_init__(self):
        warmup, steps = self.optimizer.warmup_steps, self.training.steps
        require(
            warmup <= steps or not steps,  # epochs become steps once the data are known
            f"optimizer.warmup_steps={warmup}: the run ends before, at training.steps={steps}; "
            f"add --config.optimizer.warmup_steps=N with N up to {steps}, or train longer",
        )
        decay = self.optimizer.decay_steps
        require(
            warmup + decay <= steps or not steps,
            f"optimizer.decay_steps={decay}: with optimizer.warmup_steps={warmup} more than "
            f"training.steps={steps}; add --config.optimizer.decay_steps=N with N up to "
            f"{steps - warmup}",
        )
        require(
            not self.data.tasks or bool(self.init_from),
            f"data.tasks={self.data.tasks}: init_from is missing, the run to fine-tune; "
            "add --config.init_from=RUN",
        )
        require(
            self.checkpoint.best != "decoding_accuracy" or bool(self.data.tasks),
            "checkpoint.best=decoding_accuracy: only runs on data.tasks have it; use loss",
        )
        kind, best = self.model.kind, self.checkpoint.best
        require(
            kind in SCORED.get(best, (kind,)),
            f"checkpoint.best={best}: a model of model.kind={kind} has no eval/{best}; use loss",
        )
        for key, names in (("data", self.data.tasks), ("evaluation", self.evaluation.tasks)):
            require(
                not names or self.model.kind == "decoder",
                f"{key}.tasks={names}: only a decoder has them, and model.kind={self.model.kind}",
            )
        require(
            self.model.kind != "bert" or self.data.segment_ids,
            "data.segment_ids=False with model.kind=bert: tokens would see other documents and "
            "padding on both sides; use True",
        )
        require(
            self.model.kind != "conformer" or self.optimizer.name != "muon",
            "optimizer.name=muon with model.kind=conformer: Muon knows no convolutions; use nadamw",
        )
        for name, unused in UNUSED.get(self.model.kind, {}).items():
            section, _, field = name.partition(".")
            value = getattr(getattr(self, section), field)
            require(
                value == unused,
                f"{name}={value}: a model of model.kind={self.model.kind} has no use for it; "
                f"use {unused!r}",
            )
        check_tensor_axis(self.model, self.mesh.tensor)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "attention": AttentionConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "mesh": MeshConfig,
}
# And of the kinds of models that have more of them.
MORE_SECTIONS: dict[str, dict[str, type]] = {"vit": {"images": ImagesConfig}}
MODELS: dict[str, type] = {
    "decoder": ModelConfig,
    "bert": BertConfig,
    "vit": VitConfig,
    "conformer": ConformerConfig,
}


# Fields that other kinds of models have a use for, and what they are where they have none.
_OF_TOKENS = {"data.segment_ids": False, "data.read_ahead": 0, "data.cache_dir": ""}
UNUSED: dict[str, dict[str, Any]] = {
    "vit": _OF_TOKENS | {"data.store": ""},
    "conformer": _OF_TOKENS | {"data.block_rows": 1, "training.z_loss": 0.0},
}
# Scores of checkpoint.best that some kinds of models have alone.
SCORED = {"error": ("bert", "vit"), "wer": ("conformer",)}


def load_config(config: ConfigDict | Mapping[str, Any]) -> RunConfig:
    """Checks a nested dictionary in the layout of configs/base.py. Raises ValueError."""
    tree = config.to_dict() if isinstance(config, ConfigDict) else config
    sections = SECTIONS | MORE_SECTIONS.get(_kind(tree.get("model")), {})
    check_names("section", "", tree, [*sections, "init_from"])
    attention = AttentionConfig(**_checked_fields("attention", tree["attention"]))
    model = MODELS[_kind(tree["model"])](
        **_checked_fields("model", tree["model"]), attention=attention
    )
    rest = {
        section: section_class(**_checked_fields(section, tree[section]))
        for section, section_class in sections.items()
        if section not in ("model", "attention")
    }
    start = checked("init_from", tree["init_from"], str)
    return RunConfig(init_from=start, model=model, **rest)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The nested dictionary in the layout of configs/base.py; `load_config` takes it back."""
    tree = dataclasses.asdict(config)
    tree["attention"] = tree["model"].pop("attention")
    sections = [*SECTIONS, *MORE_SECTIONS.get(config.model.kind, {})]
    return {"init_from": config.init_from} | {section: tree[section] for section in sections}


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each field that differs: `optimizer.learning_rate: 0.001 -> 0.01`."""
    flat_old, flat_new = flatten(old), flatten(new)
    keys = [*flat_old, *(key for key in flat_new if key not in flat_old)]
    return [
        f"{key}: {flat_old.get(key, '(absent)')} -> {flat_new.get(key, '(absent)')}"
        for key in keys
        if key not in flat_old or key not in flat_new or flat_old[key] != flat_new[key]
    ]


def _kind(model: Any) -> str:
    """`kind` of a section `model`."""
    kind = model.get("kind") if isinstance(model, Mapping) else None
    return checked("model.kind", kind, Literal[*MODELS]) if kind else "decoder"


def check_tensor_axis(model: ModelConfig | VitConfig | ConformerConfig, tensor: int) -> None:
    """Raises ValueError unless the tensor axis divides what it splits."""
    sizes = {"num_heads": model.num_heads, "num_kv_heads": model.kv_heads, "mlp_dim": model.mlp_dim}
    for name, value in sizes.items() if tensor > 1 else ():
        require(
            value % tensor == 0,
            f"mesh.tensor={tensor}: must divide model.{name}={value}; use "
            f"{math.gcd(value, tensor)} or another divisor of it",
        )


def _checked_fields(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section, each of the type that the section's dataclass declares."""
    require(
        isinstance(values, Mapping), f"{section}={values!r}: expected a section of named fields"
    )
    kind = _kind(values) if section == "model" else ""
    classes = SECTIONS | {k: v for more in MORE_SECTIONS.values() for k, v in more.items()}
    section_class = MODELS[kind] if kind else classes[section]
    hints = {field.name: field.type for field in dataclasses.fields(section_class)}
    hints = {key: hint for key, hint in hints.items() if hint is not AttentionConfig}
    check_names("key", f"{section}.", values, hints)
    return {key: checked(f"{section}.{key}", values[key], hint) for key, hint in hints.items()}
