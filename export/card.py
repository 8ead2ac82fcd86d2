"""The model card of an export, from what lies in the run's folder."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.reading import mixture
from export.folder import Origin
from export.layouts import Layout
from laser.training.metrics import read_metrics
from models.families import AnyModelConfig

LOADING = {
    "decoder": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
prompt = tokenizer("In the beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```""",
    "bert": """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(FOLDER{trust})
text = tokenizer("In the beginning God created", return_tensors="pt")
text["input_ids"][0, 2] = tokenizer.mask_token_id
print(tokenizer.decode(model(**text).logits[0].argmax(-1)))
```""",
    "vit": """```python
import sys, torch

sys.path.append(FOLDER)
from load_timm import load

model = load()  # one of timm's
print(model(torch.zeros(1, 3, {side}, {side})).argmax(-1))
```""",
}
TEXT = (
    "\nA text begins with EOS, which the tokenizer puts there. The tokenizer is SentencePiece and "
    "needs `sentencepiece` and `trust_remote_code=True`."
)
IMAGES = (
    "\nImages have timm's usual mean, (0.485, 0.456, 0.406), and deviation, (0.229, 0.224, 0.225)."
)
TARGETS = {"decoder": "token", "bert": "masked token", "vit": "image"}
NAMES = {
    "decoder": ("transformers", "text-generation", "A decoder-only language model"),
    "bert": ("transformers", "fill-mask", "An encoder that fills in masked tokens,"),
    "vit": ("timm", "image-classification", "A vision transformer"),
}
ARCHITECTURE = {
    "gpt2": "transformers' `GPT2LMHeadModel` computes the same function and loads the weights.",
    "llama": "transformers' `LlamaForCausalLM` computes the same function and loads the weights.",
    "starcoder2": "transformers' `Starcoder2ForCausalLM` computes the same function and loads the "
    "weights.",
    "megatron_bert": "transformers' `MegatronBertForMaskedLM` computes the same function, up to "
    "rounding, and loads the weights. Run it in float32: its head adds a large number and takes it "
    "off again, and in half precision that rounds away what is between.",
    "timm": "timm's `VisionTransformer` computes the same function, with the head of "
    "`load_timm.py`.",
    "laser": "transformers has no architecture that computes this function; `modeling_laser.py` in "
    "this folder does, in PyTorch.",
}


def model_card(
    workdir: Path,
    origin: Origin,
    layout: Layout,
    parameters: int,
    scores: Mapping[str, Sequence[dict[str, Any]]],
) -> str:
    """README.md: how to load the model, its config, its data, and how good it is. `scores` are
    results of tasks (eval/likelihood/results.py) by the settings they were scored with."""
    model = origin.config.model
    library, pipeline, name = NAMES[model.kind]
    trust = ", trust_remote_code=True" if layout == "laser" else ""
    return "\n".join(
        [
            f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\n---",
            f"# {workdir.resolve().name}, step {origin.step:,}\n",
            f"{name} with {_attention(model)}, "
            f"{parameters:,} parameters in float32. {ARCHITECTURE[layout]}\n",
            LOADING[model.kind].format(trust=trust, side=getattr(model, "image_size", 0)),
            IMAGES if model.kind == "vit" else TEXT,
            "`sha256sum -c SHA256SUMS` tells whether all files are as they were exported.\n",
            "## Training\n",
            *_table("", "", list(_training(workdir, origin))),
            "\n## Model\n",
            *_table("field", "value", list(_fields(model))),
            "\n## Scores\n",
            *_scores(scores),
            "",
        ]
    )


def _attention(model: AnyModelConfig) -> str:
    if model.attention.kind == "standard":
        return "standard attention"
    return "LASER attention ([arXiv 2411.03493](https://arxiv.org/abs/2411.03493))"


def _training(workdir: Path, origin: Origin) -> Iterator[tuple[str, str]]:
    config = origin.config
    steps, epochs = config.training.steps, config.training.epochs
    whole = f"{steps:,}" if steps else f"{epochs} epochs"
    yield "steps", f"{origin.step:,} of {whole}"
    if config.init_from:
        yield "started from", f"run `{Path(config.init_from).name}`"
    if config.model.kind == "vit":
        yield "images in a step", f"{config.training.batch_size:,}"
    else:
        if not config.data.tasks:  # their rows are mostly padding
            tokens = origin.step * config.training.batch_size * config.data.seq_len
            yield "tokens seen", f"{tokens:,}"
        yield "row length", f"{config.data.seq_len:,} tokens"
        yield "rows in a step", f"{config.training.batch_size:,}"
    yield "activations in training", config.model.dtype
    yield "optimizer", f"{config.optimizer.name}, peak rate {config.optimizer.learning_rate:g}"
    if config.images is not None:
        data = f"images `{config.images.source}`"
    elif config.data.tasks:
        data = f"tasks {config.data.tasks.replace(',', ', ')}"
    else:
        data = _stores(config.data.store)
    yield "data", f"{data}, fingerprint `{origin.fingerprint}`"
    target = TARGETS[config.model.kind]
    loss = _validation(workdir / "metrics.jsonl", origin.step, target)
    yield "validation loss", loss or "not measured at this step"


def _stores(text: str) -> str:
    parts = mixture.parse(text)
    named = zip(mixture.names(parts), parts, strict=True)
    if len(parts) == 1:
        return f"store `{mixture.names(parts)[0]}`"
    return "stores " + ", ".join(f"`{name}` {float(part.share):.1%}" for name, part in named)


def _validation(path: Path, step: int, target: str) -> str | None:
    """The loss at exactly this step."""
    for record in reversed(read_metrics(path) if path.is_file() else []):
        if record["step"] == step and "eval/loss" in record:
            bits = record.get("eval/bits_per_byte")
            rest = "" if bits is None else f", {bits:.4f} bits per byte"
            if "eval/error" in record:
                rest = f", error {record['eval/error']:.4f}"
            return f"{record['eval/loss']:.4f} nats per {target}{rest}"
    return None


def _fields(model: AnyModelConfig) -> Iterator[tuple[str, str]]:
    for name, value in dataclasses.asdict(model).items():
        if name not in ("attention", "remat", "unroll", "dtype"):
            yield name, str(value)
    for name, value in dataclasses.asdict(model.attention).items():
        if name != "implementation":
            yield f"attention.{name}", str(value)


def _scores(scores: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    lines: list[str] = []
    for settings, tasks in scores.items():
        rows = [
            (
                f"{task['task']} ({task['split']}, {task['n']:,})",
                f"{100 * task['metrics'][task['metric']]['mean']:.2f} % {task['metric']}",
            )
            for task in tasks
        ]
        lines += [f"{settings}:\n", *_table("task (split, examples)", "score", rows), ""]
    return lines or ["Not evaluated."]


def _table(left: str, right: str, rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {a} | {b} |" for a, b in [(left, right), ("---", "---"), *rows]]
