"""Crops, and RandAugment's operations beside PIL's, from which they come."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from data.images import augment
from data.images.draws import Draws
from tests.data.images.pictures import jpeg, picture

PICTURE = picture(0, 64, 64) // 2 + 40
PICTURE[::5] += 20  # edges
OF_PIL = {
    augment.auto_contrast: (ImageOps.autocontrast, 1),
    augment.equalize: (ImageOps.equalize, 0),
    augment.invert: (ImageOps.invert, 0),
    augment.posterize: (lambda image: ImageOps.posterize(image, 4), 0),
    augment.brightness: (lambda image: ImageEnhance.Brightness(image).enhance(1.9), 1),
    augment.color: (lambda image: ImageEnhance.Color(image).enhance(1.9), 2),
    augment.sharpness: (lambda image: ImageEnhance.Sharpness(image).enhance(1.9), 2),
}


@pytest.mark.parametrize("operation", OF_PIL, ids=lambda operation: operation.__name__)
def test_operations_are_those_of_pil(operation):
    theirs, tolerance = OF_PIL[operation]
    expected = np.asarray(theirs(Image.fromarray(PICTURE))).astype(int)
    found = operation(PICTURE, 1.0, Draws(0)).astype(int)
    assert np.abs(found - expected).max() <= tolerance
    assert np.abs(found - PICTURE).max() > 5


def test_solarize_inverts_nothing_at_full_magnitude():
    assert (augment.solarize(PICTURE, 1.0, Draws(0)) == PICTURE).all()
    half = augment.solarize(PICTURE, 0.5, Draws(0))
    np.testing.assert_array_equal(half, np.where(PICTURE < 128, PICTURE, 255 - PICTURE))


@pytest.mark.parametrize("key", [0, 1])
def test_what_moves_is_filled_with_grey(key):
    sign = Draws(key).sign()
    moved = augment.translate_x(PICTURE, 0.14, Draws(key))  # 100 of 224 pixels: 4 of 64
    np.testing.assert_array_equal(moved[:, 4:] if sign < 0 else moved[:, :-4],
                                  PICTURE[:, :-4] if sign < 0 else PICTURE[:, 4:])  # fmt: skip
    assert (moved[:, :4] if sign < 0 else moved[:, -4:]).min() == 128
    turned = augment.rotate(PICTURE, 1.0, Draws(key))
    corner = Image.fromarray(PICTURE).rotate(sign * 30, fillcolor=augment.FILL)
    assert (np.asarray(corner) == turned).mean() > 0.95


def test_cutout_covers_a_square():
    covered = augment.cutout(PICTURE, 1.0, Draws(3)) != PICTURE
    rows, columns = np.nonzero(covered.any(-1))
    assert 8 <= len(set(rows)) <= 22
    assert 8 <= len(set(columns)) <= 22
    whole = np.ix_(np.unique(rows), np.unique(columns))
    assert covered.any(-1)[whole].mean() > 0.99  # a pixel may have been grey before


def test_all_operations_are_drawn_and_keep_the_shape():
    drawn = {Draws(i).below(len(augment.OPERATIONS)) for i in range(200)}
    assert len(augment.OPERATIONS) == 16 == len(drawn)
    for operation in augment.OPERATIONS:
        for level in (0.0, 0.5, 1.0):
            image = operation(PICTURE, level, Draws(1))
            assert (image.shape, image.dtype) == (PICTURE.shape, np.uint8)
    for flat in (np.zeros_like(PICTURE), np.full_like(PICTURE, 255)):
        assert (augment.auto_contrast(flat, 1.0, Draws(0)) == flat).all()
        assert (augment.equalize(flat, 1.0, Draws(0)) == flat).all()


def test_random_crops_are_parts_of_the_stated_size(monkeypatch):
    parts = []
    monkeypatch.setattr(augment, "resize", lambda part, size: parts.append(part.shape[:2]))
    for i in range(400):
        augment.random_crop(np.zeros((300, 500, 3), np.uint8), 32, Draws(i))
    areas = np.array([h * w / 150_000 for h, w in parts])
    aspects = np.array([w / h for h, w in parts])
    assert 0.1 <= areas.min() < 0.12
    assert 0.7 < areas.max() <= 0.8  # 400 x 300
    assert areas.std() > 0.15
    assert 0.7 < aspects.min() < 0.78  # 3:4 to 4:3, and what rounding makes of it
    assert 1.3 < aspects.max() < 1.38


def test_random_crops_are_drawn_as_by_tensorflow(monkeypatch):
    """The side is uniform, not the area, which had a mean of 0.444 and a median of 0.431 else.

    The numbers are of a million draws of sample_distorted_bounding_box's rule.
    """
    parts = []
    monkeypatch.setattr(augment, "resize", lambda part, size: parts.append(part.shape[:2]))
    for i in range(10_000):
        augment.random_crop(np.empty((375, 500, 3), np.uint8), 224, Draws(i))
    areas = np.array([h * w / (375 * 500) for h, w in parts])
    assert areas.mean() == pytest.approx(0.388, abs=0.008)
    assert np.median(areas) == pytest.approx(0.355, abs=0.012)
    assert areas.min() >= 0.1


def test_what_does_not_fit_is_cropped_at_its_centre():
    stripe = np.zeros((4, 400, 3), np.uint8)
    stripe[:, 198:202] = 255
    assert augment.random_crop(stripe, 8, Draws(0)).min() > 200
    assert augment.centre_crop(stripe, 8).min() > 200


def test_a_jpeg_that_is_cut_off_is_broken():
    data = jpeg(PICTURE)
    assert augment.decode(data + b"\0\0").shape == (64, 64, 3)
    for bad in (data[: len(data) // 2], data[:-2], b"", b"not an image"):
        with pytest.raises(augment.BrokenImage):
            augment.decode(bad)


def test_colours_come_in_their_order():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    decoded = augment.decode(jpeg(red)).reshape(-1, 3).mean(0)
    assert decoded[0] > 240 > 20 > decoded[2]
