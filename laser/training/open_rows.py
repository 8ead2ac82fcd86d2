"""The rows of a run that is no fine-tuning, by the kind of its model."""

import importlib.util
from collections.abc import Callable

from laser.training.config import RunConfig
from laser.training.rows import MaskedRows, Rows, StoreRows


def _image_rows(config: RunConfig) -> Rows:
    if importlib.util.find_spec("cv2") is None:
        raise ValueError(
            "model.kind=vit: images need OpenCV: pip install -r requirements-images.txt"
        )
    from laser.training.image_rows import ImageRows

    return ImageRows(config)


def _speech_rows(config: RunConfig) -> Rows:
    from laser.training.speech_rows import SpeechRows  # SciPy, which text does without

    return SpeechRows(config)


ROWS: dict[str, Callable[[RunConfig], Rows]] = {
    "decoder": StoreRows,
    "bert": MaskedRows,
    "vit": _image_rows,
    "conformer": _speech_rows,
}


def open_rows(config: RunConfig) -> Rows:
    """Raises ValueError if the data is not there, or does not fit the rest."""
    return ROWS[config.model.kind](config)
