"""From an encoded image to pixels: crops, flip and RandAugment, as AlgoPerf's ImageNet pipeline.

For training a random part of the image (area 10 to 100 %, sides 3:4 to 4:3), or the central one
where ten draws do not fit, scaled to a square; mirrored half of the time; then RandAugment (arXiv
1909.13719). For evaluation the central square of 224/256 of the short side. Scaling is bicubic
between the nearest four pixels of each side, without a filter for what becomes smaller, as
tf.image.resize does it (OpenCV's cubic has another parameter, -0.75 in place of -0.5).

Images are (height, width, 3) uint8, red first. Each operation is a function of pixels and a stream
of draws. OpenCV does the work and lets go of Python's lock meanwhile, so that threads share cores.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from data.images.draws import Draws

Image = np.ndarray[Any, np.dtype[np.uint8]]

cv2.setNumThreads(0)  # the threads that call it are as many as there are cores

AREA, ASPECT, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
LEAST_AREA = 0.1  # TensorFlow's min_object_covered, the object being the whole image
CENTRE = 224 / 256
FILL = (128, 128, 128)  # what comes in from beyond the border
START, SCAN, END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # of a JPEG
MAX_MAGNITUDE = 10
USUAL_SIDE = 224  # for which lengths in pixels are stated
GREY = 196  # what Contrast moves away from: the number of pixels / 256, as in the original code


class BrokenImage(ValueError):
    """Bytes that are no image, or not the whole of one."""


def decode(data: bytes) -> Image:
    """Pixels of a JPEG or PNG, not turned by what its header says. Raises BrokenImage."""
    if not data:
        raise BrokenImage("the file is empty")
    whole = data.endswith(END) or data.find(END, max(data.rfind(SCAN), 0)) >= 0
    if data.startswith(START) and not whole:
        raise BrokenImage("a JPEG that is cut off")
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # as of a size that no image has
        raise BrokenImage(f"no image that can be decoded: {error.err}") from error
    if image is None:
        raise BrokenImage("no image that can be decoded")
    return image  # type: ignore[return-value]


def random_crop(image: Image, size: int, draws: Draws) -> Image:
    """A random part of the image as a square of `size`.

    Drawn as by TensorFlow's kernel sample_distorted_bounding_box: for an aspect the height is
    uniform between those of the least and the largest area, as far as they fit the image.
    """
    height, width = image.shape[:2]
    for _ in range(ATTEMPTS):
        aspect = draws.uniform(*ASPECT)
        low, high = (round((area * height * width / aspect) ** 0.5) for area in AREA)
        high = min(high, height, int((width + 0.5) / aspect))
        h = min(low, high)
        h += draws.below(high - h + 1)
        w = round(h * aspect)
        # As in AlgoPerf, the whole image is taken for a failure.
        if LEAST_AREA * height * width <= h * w < height * width and w <= width:
            # The kernel's places end one short of the border.
            top, left = draws.below(max(height - h, 1)), draws.below(max(width - w, 1))
            return resize(image[top : top + h, left : left + w], size)
    return centre_crop(image, size)


def centre_crop(image: Image, size: int) -> Image:
    """The central square of 224/256 of the short side as a square of `size`."""
    height, width = image.shape[:2]
    side = max(1, int(CENTRE * min(height, width)))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return resize(image[top : top + side, left : left + side], size)


def resize(image: Image, size: int) -> Image:
    """The image as a square of `size`."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)  # type: ignore


def mirrored(image: Image) -> Image:
    """Left for right."""
    return cv2.flip(image, 1)  # type: ignore[return-value]


def rand_augment(image: Image, count: int, magnitude: float, draws: Draws) -> Image:
    """`count` operations, each drawn from all alike, of a magnitude from 0 to 10."""
    for _ in range(count):
        operation = OPERATIONS[draws.below(len(OPERATIONS))]
        image = operation(image, magnitude / MAX_MAGNITUDE, draws)
    return image


Operation = Callable[[Image, float, Draws], Image]


def auto_contrast(image: Image, level: float, draws: Draws) -> Image:
    """Each colour stretched to 0 to 255."""
    del level, draws
    tables = []
    for counts in _histograms(image):
        (there,) = np.nonzero(counts)
        low, high = int(there[0]), int(there[-1])
        scale = 255.0 / (high - low) if high > low else 0.0
        stretched = (np.arange(256) - low) * scale if scale else np.arange(256)
        tables.append(np.clip(stretched, 0, 255).astype(np.uint8))
    return _looked_up(image, np.stack(tables, axis=1))


def equalize(image: Image, level: float, draws: Draws) -> Image:
    """Each colour's values made about equally frequent, as PIL does it."""
    del level, draws
    tables = []
    for counts in _histograms(image):
        last = counts[np.nonzero(counts)[0][-1]]
        step = int(counts.sum() - last) // 255
        table = np.arange(256)
        if step:
            before = np.concatenate([[0], np.cumsum(counts)[:-1] + step // 2]) // step
            table = np.clip(before, 0, 255)
        tables.append(table.astype(np.uint8))
    return _looked_up(image, np.stack(tables, axis=1))


def invert(image: Image, level: float, draws: Draws) -> Image:
    del level, draws
    return cv2.bitwise_not(image)  # type: ignore[return-value]


def rotate(image: Image, level: float, draws: Draws) -> Image:
    """Turned by up to 30 degrees, either way."""
    height, width = image.shape[:2]
    angle = np.deg2rad(30 * level * draws.sign())
    sin, cos = np.sin(angle), np.cos(angle)
    x, y = (width - 1) / 2, (height - 1) / 2
    return _moved(image, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def posterize(image: Image, level: float, draws: Draws) -> Image:
    """The upper 4 · level bits are kept: fewer for a smaller magnitude, as in the original code."""
    del draws
    shift = 8 - int(4 * level)
    return _looked_up(image, np.arange(256) >> shift << shift)


def solarize(image: Image, level: float, draws: Draws) -> Image:
    """Values from 256 · level on inverted: none of them at magnitude 10."""
    del draws
    values = np.arange(256)
    return _looked_up(image, np.where(values < int(256 * level), values, 255 - values))


def solarize_add(image: Image, level: float, draws: Draws) -> Image:
    """Values below 128 made larger by 110 · level."""
    del draws
    values = np.arange(256)
    brighter = np.clip(values + int(110 * level), 0, 255)
    return _looked_up(image, np.where(values < 128, brighter, values))


def color(image: Image, level: float, draws: Draws) -> Image:
    del draws
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _away_from(grey, image, level)


def contrast(image: Image, level: float, draws: Draws) -> Image:
    del draws
    return _looked_up(image, np.clip(GREY + _factor(level) * (np.arange(256) - GREY), 0, 255))


def brightness(image: Image, level: float, draws: Draws) -> Image:
    del draws
    return _looked_up(image, np.clip(_factor(level) * np.arange(256), 0, 255))


def sharpness(image: Image, level: float, draws: Draws) -> Image:
    """Away from the image smoothed by PIL's kernel; the border stays."""
    del draws
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = cv2.filter2D(image, -1, kernel)
    sharper = image.copy()
    inner = (slice(1, -1), slice(1, -1))
    if min(image.shape[:2]) > 2:
        sharper[inner] = _away_from(smooth, image, level)[inner]
    return sharper


def shear_x(image: Image, level: float, draws: Draws) -> Image:
    return _moved(image, [[1, 0.3 * level * draws.sign(), 0], [0, 1, 0]])


def shear_y(image: Image, level: float, draws: Draws) -> Image:
    return _moved(image, [[1, 0, 0], [0.3 * level * draws.sign(), 1, 0]])


def translate_x(image: Image, level: float, draws: Draws) -> Image:
    """Moved by up to 100 of 224 pixels, either way."""
    return _moved(image, [[1, 0, _pixels(100, image) * level * draws.sign()], [0, 1, 0]])


def translate_y(image: Image, level: float, draws: Draws) -> Image:
    """Moved by up to 100 of 224 pixels, either way."""
    return _moved(image, [[1, 0, 0], [0, 1, _pixels(100, image) * level * draws.sign()]])


def cutout(image: Image, level: float, draws: Draws) -> Image:
    """A grey square of up to 80 of 224 pixels around a random one, as far as it is inside."""
    half = int(_pixels(40, image) * level)
    y, x = draws.below(image.shape[0]), draws.below(image.shape[1])
    covered = image.copy()
    covered[max(0, y - half) : y + half, max(0, x - half) : x + half] = FILL
    return covered


OPERATIONS: tuple[Operation, ...] = (
    auto_contrast, equalize, invert, rotate, posterize, solarize, color, contrast, brightness,
    sharpness, shear_x, shear_y, translate_x, translate_y, cutout, solarize_add,
)  # fmt: skip


def _factor(level: float) -> float:
    """The factor of Color, Contrast, Brightness and Sharpness; 1 leaves the image as it is."""
    return 0.1 + 1.8 * level


def _pixels(count: int, image: Image) -> float:
    return count * image.shape[0] / USUAL_SIDE


def _histograms(image: Image) -> list[np.ndarray]:
    """How many pixels have each value, (256,) int64 for each colour."""
    whole = (cv2.calcHist([x], [0], None, [256], [0, 256]) for x in cv2.split(image))
    return [counts.reshape(-1).astype(np.int64) for counts in whole]


def _looked_up(image: Image, table: np.ndarray) -> Image:
    """Each value's entry of a table for all colours, (256,), or of one for each, (256, 3)."""
    table = table.astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])  # type: ignore[return-value]


def _away_from(other: Any, image: Image, level: float) -> Image:
    """other + factor · (image - other)."""
    factor = _factor(level)
    return cv2.addWeighted(other, 1 - factor, image, factor, 0)  # type: ignore[return-value]


def _moved(image: Image, matrix: list[list[float]]) -> Image:
    """Each pixel taken from the nearest to where the matrix says, or grey from outside."""
    height, width = image.shape[:2]
    return cv2.warpAffine(  # type: ignore[return-value]
        image,
        np.array(matrix, np.float64),
        (width, height),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )
