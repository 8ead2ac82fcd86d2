"""The rows of a run that is no fine-tuning, by the kind of its model."""

from collections.abc import Callable

from laser.training.config import RunConfig
from laser.training.image_rows import ImageRows
from laser.training.rows import MaskedRows, Rows, StoreRows

ROWS: dict[str, Callable[[RunConfig], Rows]] = {
    "decoder": StoreRows,
    "bert": MaskedRows,
    "vit": ImageRows,
}


def open_rows(config: RunConfig) -> Rows:
    """Raises ValueError if the data is not there, or does not fit the rest."""
    return ROWS[config.model.kind](config)
