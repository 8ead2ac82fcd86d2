"""Measures the image pipeline against tf.data's decoding alone.

    python scripts/benchmark_images.py [--images=200] [--rounds=5]

JPEGs of 500 x 375, the usual size of ImageNet, are made up: blots with noise, so that they take the
110 kB that ImageNet's do on average. CPU time of all threads for an image, in turns so that other
work on the machine meets all of them; the median of the rounds. Memory is kept by the process as in
train.py, for all of them.

  decode       tf.data with tf.io.decode_jpeg of the whole image and nothing else
  images       data/images: reading a file, decoding, random crop, bicubic resize to 224, mirroring
               and RandAugment of 2 operations
  batches      the same, in batches with partners for mixup, and these as arrays of jax
  python       the same with images of 8 x 8 pixels, so nearly all of it Python, of which one thread
               runs at a time: batches / python is about how many cores a process can keep busy
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.hardware import tune_cpu

if __name__ == "__main__":
    tune_cpu()  # before anything imports jax

import cv2
import numpy as np

from data.images import loader, sources
from data.images.draws import Draws

HEIGHT, WIDTH, NOISE, QUALITY = 375, 500, 13, 94
BATCH_SIZE, SIZE = 50, 224
AUGMENTATION = loader.Augmentation(SIZE, "imagenet", operations=2, magnitude=10, mixup=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, small = Path(folder, "usual"), Path(folder, "small")
        sizes = make_images(root, options.images, WIDTH, HEIGHT)
        make_images(small, options.images, 8, 8)
        print(f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, {np.mean(sizes) / 1e3:.0f} kB each")
        ways = {
            "decode": tf_decode(root),
            "images": images_alone(root),
            "batches": batches(root, SIZE),
            "python": batches(small, 8),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()  # warm
        for _ in range(options.rounds):
            for name, way in ways.items():
                began = time.process_time()
                count = way()
                times[name].append((time.process_time() - began) / count)
        medians = {name: statistics.median(found) for name, found in times.items()}
        for name, seconds in medians.items():
            print(f"{name:10}{1e3 * seconds:6.2f} ms an image, {1 / seconds:6.0f} images/s a core")
        for name in ("images", "batches"):
            ratios = [ours / theirs for ours, theirs in zip(times[name], times["decode"])]
            print(f"{name} / decode: {statistics.median(ratios):.2f} times its time, "
                  f"{min(ratios):.2f} to {max(ratios):.2f}")  # fmt: skip
        print(f"batches / python: {medians['batches'] / medians['python']:.0f} cores")


def make_images(root: Path, count: int, width: int, height: int) -> list[int]:
    """root/train/CLASS/*.jpg of two classes; their sizes in bytes."""
    rng = np.random.default_rng(0)
    sizes = []
    for i in range(count):
        coarse = rng.uniform(0, 255, (12, 16, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(image + rng.normal(0, NOISE, image.shape), 0, 255).astype(np.uint8)
        path = root / "train" / f"n{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        path.write_bytes(data)
        sizes.append(len(data))
    return sizes


def tf_decode(root: Path):
    """What decodes every image once by tf.data, and says how many."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    files = sorted(str(path) for path in root.glob("train/*/*.jpg"))
    read = tf.data.Dataset.from_tensor_slices(files).map(tf.io.read_file)
    decoded = read.map(lambda data: tf.io.decode_jpeg(data, channels=3), num_parallel_calls=1)

    def run() -> int:
        return sum(1 for _ in decoded)

    return run


def images_alone(root: Path):
    """What makes the pixels of every image once, and says of how many."""
    images = sources.ImageFolder(root / "train", sources.Broken(0))

    def run() -> int:
        for i in range(len(images)):
            AUGMENTATION.train(images.read(i), Draws(0, 0, i))
        return len(images)

    return run


def batches(root: Path, size: int):
    """What makes batches of all images once, and says of how many."""
    broken = sources.Broken(0)
    images = sources.ImageFolder(root / "train", broken)
    steps = max(1, len(images) // BATCH_SIZE)

    def run() -> int:
        made = loader.train_batches(
            images, dataclasses.replace(AUGMENTATION, size=size), broken, batch_size=BATCH_SIZE,
            seed=0, start_step=0, stop_step=steps, sharding=None, workers=1,
        )  # fmt: skip
        with made:
            return BATCH_SIZE * sum(1 for _ in made)

    return run


if __name__ == "__main__":
    main()
