"""The paper's one-shot accuracies in percent, to stand beside ours (arXiv 2411.03493).

Tables 2, 6 and 7; the columns of Table 2 are in the order that fits their stated means. A figure is
shown only beside a model of the same size with the same attention that has seen as many tokens; of
what text cannot be told. The paper names its tasks and gives no prompts, so the protocols may
differ from its own.
"""

from laser.training.config import RunConfig
from models.config import ModelConfig

Figures = dict[str, float]

_TASKS_2P2B = (
    "WSC", "Winogrande", "Winograd", "WiC", "StoryCloze", "RTE", "ReCoRD", "RaceM", "RaceH",
    "PIQA", "OpenBookQA", "MultiRC", "HellaSwag", "COPA", "CB", "BoolQ",
)  # fmt: skip
_TABLE_2 = {
    "laser+per_dim_temp": (81.40, 62.27, 81.68, 52.04, 77.87, 53.43, 85.29, 50.42, 37.88, 77.09,
                           48.80, 57.03, 66.58, 82, 41.07, 63.52),
    "laser": (77.89, 61.72, 78.75, 47.02, 77.77, 54.51, 85.05, 50.91, 37.94, 77.20,
              46.80, 57.78, 66.70, 87, 44.64, 64.43),
    "standard+per_dim_temp": (79.65, 62.35, 80.22, 51.10, 76.48, 53.07, 85.10, 49.65, 37.65, 76.88,
                              47.60, 53.94, 65.42, 80, 42.86, 60.70),
    "standard": (76.14, 60.69, 80.95, 47.34, 76.22, 54.15, 84.82, 49.09, 37.62, 76.55,
                 47.80, 55.36, 65.53, 82, 42.86, 62.42),
    "standard+temperature": (78.25, 62.19, 79.85, 47.18, 76.17, 51.70, 84.89, 48.89, 37.04, 76.45,
                             48.48, 53.38, 65.84, 85, 42.86, 61.69),
}  # fmt: skip
_TASKS_7P7B = (
    "ArcE", "BoolQ", "CB", "HellaSwag", "MultiRC", "OpenBookQA", "RaceM", "RTE", "StoryCloze",
    "WiC", "Winogrande",
)  # fmt: skip
_TABLE_6 = {
    "laser": (52.48, 62.45, 44.64, 57.16, 56.00, 45.40, 44.64, 53.43, 71.78, 47.34, 58.41),
    "standard": (52.69, 56.48, 42.86, 56.02, 55.59, 43.60, 44.15, 49.82, 71.51, 47.34, 57.77),
}
_TASKS_DIFF = tuple(name for name in _TASKS_7P7B if name != "BoolQ")
_TABLE_7 = {
    "laser+diff": (49.28, 42.85, 51.93, 55.13, 44.20, 42.40, 52.34, 71.03, 50.00, 56.04),
    "diff": (49.20, 41.07, 51.58, 52.82, 43.00, 40.73, 50.90, 71.29, 49.53, 55.80),
}

# (layers, model dim, MLP dim, heads, head size)
SIZE_2P2B = (32, 2048, 8192, 8, 512)
SIZE_7P7B = (32, 3440, 11584, 16, 720)
# Tasks, accuracies by attention, size, and tokens of the training: 160,000 steps of 1024 x 1024 in
# Table 2, and as Tables 6 and 7 say.
_TABLES = (
    (_TASKS_2P2B, _TABLE_2, SIZE_2P2B, 160_000 * 2**20),
    (_TASKS_7P7B, _TABLE_6, SIZE_7P7B, 44e9),
    (_TASKS_DIFF, _TABLE_7, SIZE_2P2B, 24e9),
)
TOLERANCE = 0.01  # of the number of tokens


def figures(model: ModelConfig) -> Figures:
    """Name of the task in the paper → accuracy in percent; empty where it has no such model.

    Standard attention with any temperature has the column `+ temp`, of which the paper does not
    state the temperature.
    """
    found = _table(model)
    return found[0] if found else {}


def figures_beside(config: RunConfig, step: int) -> Figures:
    """As `figures`, of the model of a run's checkpoint; empty where the paper's has seen another
    number of tokens, or has a temperature that is not stated."""
    assert isinstance(config.model, ModelConfig)
    found = _table(config.model)
    if not found or config.model.attention.temperature != 1:
        return {}
    tokens = step * config.training.batch_size * config.data.seq_len
    return found[0] if abs(tokens / found[1] - 1) <= TOLERANCE else {}


def _table(model: ModelConfig) -> tuple[Figures, float] | None:
    """A model's figures, and the tokens that the paper's has seen."""
    size = (model.num_layers, model.model_dim, model.mlp_dim, model.num_heads, model.head_dim)
    name = _attention(model)
    # What else makes another model, as configs/c4.py has it. `remat`, `unroll` and the like do not.
    same = (
        model.kind == "decoder"
        and model.vocab_size == 32_000
        and model.kv_heads == model.num_heads
        and (model.mlp, model.norm, model.positions) == ("gelu", "layernorm", "sinusoidal")
        and model.logits_soft_cap == model.attention.soft_cap == 0
    )
    for tasks, accuracies, of_size, tokens in _TABLES:
        if same and size == of_size and name in accuracies:
            return dict(zip(tasks, accuracies[name], strict=True)), tokens
    return None


def _attention(model: ModelConfig) -> str:
    """As in the tables above: the kind and all modifiers that are on."""
    attention = model.attention
    parts: list[str] = [attention.kind]
    parts += ["temperature"] if attention.temperature != 1 else []
    parts += ["per_dim_temp"] if attention.per_dim_temp else []
    parts += ["qk_norm"] if attention.qk_norm else []
    parts += ["diff"] if attention.diff != "none" else []
    return "diff" if parts == ["standard", "diff"] else "+".join(parts)
