"""The front end against a computation by definition, and the masks of SpecAugment."""

import numpy as np
import pytest
import scipy.signal

from data.speech.augment import SpecAugment, draws_of_row
from data.speech.features import MEL_BINS, log_mel, num_frames


def audio(samples, seed=0):
    draws = np.random.default_rng(seed)
    return (3000 * draws.standard_normal(samples)).astype(np.int16)


def by_definition(signal):
    """A frame, a bin of the FFT and a triangle at a time, float64."""
    signal = np.concatenate([signal / 32768, np.zeros(400)])
    window = scipy.signal.get_window("hann", 400)  # periodic
    hertz = 16_000 * np.arange(257) / 512
    mel = 1127 * np.log(1 + hertz / 700)
    low, high = 1127 * np.log(1 + np.array([125, 7600]) / 700)
    width = (high - low) / 81
    rows = []
    for start in range(0, len(signal) - 400, 160):
        frame = signal[start : start + 400]
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.fft(window * frame, 512)[:257]) ** 2
        triangles = [np.maximum(0, 1 - np.abs(mel - low - b * width) / width) for b in range(1, 81)]
        rows.append([np.log(max(1e-5, power[1:] @ triangle[1:])) for triangle in triangles])
    return np.array(rows)


@pytest.mark.parametrize("samples", [1, 399, 16_000, 16_001])
def test_log_mel_equals_its_definition(samples):
    signal = audio(samples)
    features = log_mel(signal)
    assert features.dtype == np.float32
    assert features.shape == (num_frames(samples), MEL_BINS)
    np.testing.assert_allclose(features, by_definition(signal.astype(float)), atol=2e-4)


def test_a_tone_is_in_its_bin():
    times = np.arange(16_000) / 16_000
    features = log_mel((8000 * np.sin(2 * np.pi * 1000 * times)).astype(np.int16))
    low, high = 1127 * np.log(1 + np.array([125, 7600]) / 700)
    centre = (1127 * np.log(1 + 1000 / 700) - low) / (high - low) * 81 - 1
    assert abs(features[50].argmax() - centre) < 1


def test_silence_is_finite():
    features = log_mel(np.zeros(1000, np.int16))
    np.testing.assert_array_equal(features, np.float32(np.log(np.float32(1e-5))))
    assert log_mel(np.zeros(0, np.int16)).shape == (0, MEL_BINS)


def test_masks_are_blocks_of_the_sizes_asked_for():
    """Over many draws every size and every place is there, and none beyond."""
    frames, widths, lengths, bins, places = 100, set(), set(), set(), set()
    for row in range(400):
        features = np.ones((frames, 80), np.float32)
        SpecAugment(1, 27, 1, 0.05).mask(features, draws_of_row(0, 0, row))
        masked_bins = np.flatnonzero((features == 0).all(axis=0))
        masked_frames = np.flatnonzero((features == 0).all(axis=1))
        for masked in (masked_bins, masked_frames):
            assert not masked.size or np.ptp(masked) == len(masked) - 1
        assert features.sum() == (frames - len(masked_frames)) * (80 - len(masked_bins))
        widths.add(len(masked_bins))
        lengths.add(len(masked_frames))
        bins |= set(masked_bins.tolist())
        places |= set(masked_frames.tolist())
    assert widths == set(range(27))
    assert lengths == set(range(5))
    assert bins == set(range(80))
    assert len(places) > 95


def test_masks_follow_from_seed_step_and_row():
    def masked(*place):
        features = np.ones((500, 80), np.float32)
        SpecAugment(2, 27, 10, 0.05).mask(features, draws_of_row(*place))
        return features

    np.testing.assert_array_equal(masked(1, 2, 3), masked(1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2)):
        assert (masked(1, 2, 3) != masked(*other)).any()
