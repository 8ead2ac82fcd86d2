"""Images made up for tests, and folders of them."""

from pathlib import Path

import cv2
import numpy as np


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """Coloured blots, (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (6, 8, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def make_folder(root: Path, train: int = 9, val: int = 3, classes=("n01", "n02", "n03")) -> Path:
    """root/train and root/val with so many images of each class."""
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = picture(100 * k + i, 40 + i, 60 - i)
                (root / split / name / f"{name}_{i}.JPEG").write_bytes(jpeg(image))
    return root
