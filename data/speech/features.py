"""Log-mel features of speech, as AlgoPerf's front end makes them, in NumPy on the hosts.

Frames of 25 ms every 10 ms: pre-emphasis within the frame (HTK's), a periodic Hann window, the
squared magnitude of an FFT of 512, 80 triangular bins on HTK's mel scale from 125 to 7,600 Hz, and
the logarithm. A frame counts as long as it begins within the recording; what it reads beyond the
end is 0.
"""

import functools

import numpy as np

SAMPLE_RATE = 16_000  # Hz, of all audio here
STEP = 160  # samples from frame to frame
WINDOW = 400  # samples of a frame
FFT = 512
PRE_EMPHASIS = 0.97
LOW_HZ, HIGH_HZ = 125.0, 7600.0
FLOOR = 1e-5  # of a bin's energy, before the logarithm
AT_A_TIME = 256  # frames: what they need stays in a core's cache
MEL_BINS = 80


def num_frames(samples: int) -> int:
    """Frames that begin within so many samples."""
    return -(-samples // STEP)


def log_mel(audio: np.ndarray) -> np.ndarray:
    """(samples,) int16 -> (num_frames(samples), MEL_BINS) float32, natural logarithms of energy."""
    frames = num_frames(len(audio))
    padded = np.zeros(max(0, frames - 1) * STEP + WINDOW, np.float32)
    padded[: min(len(audio), len(padded))] = audio[: len(padded)]
    padded *= np.float32(2**-15)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP]
    features = np.empty((frames, MEL_BINS), np.float32)
    for start in range(0, frames, AT_A_TIME):
        part = slice(start, min(start + AT_A_TIME, frames))
        features[part] = _energies(windows[part])
    np.maximum(features, FLOOR, out=features)
    return np.log(features, out=features)


def _energies(frames: np.ndarray) -> np.ndarray:
    """(n, WINDOW) -> (n, MEL_BINS), float32."""
    import scipy.fft  # half a second, which runs on text need not wait

    emphasised = np.empty_like(frames)
    emphasised[:, 0] = frames[:, 0] * (1 - PRE_EMPHASIS)
    np.multiply(frames[:, :-1], -PRE_EMPHASIS, out=emphasised[:, 1:])
    emphasised[:, 1:] += frames[:, 1:]
    emphasised *= _hann()
    spectrum = scipy.fft.rfft(emphasised, FFT)  # numpy's is in float64
    return (np.square(spectrum.real) + np.square(spectrum.imag)) @ mel_weights()


@functools.cache
def _hann() -> np.ndarray:
    """The periodic window: one of WINDOW + 1 without its last, (WINDOW,) float32."""
    return np.hanning(WINDOW + 1)[:-1].astype(np.float32)


@functools.cache
def mel_weights() -> np.ndarray:
    """The weight of every FFT bin in every mel bin, (FFT // 2 + 1, MEL_BINS) float32.

    Triangles that are linear in mel, 1,127 ln(1 + Hz / 700), each from its neighbours' centres.
    """

    def mel(hertz):
        return 1127.0 * np.log1p(hertz / 700.0)

    bins = mel(np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1))[:, None]
    edges = np.linspace(mel(LOW_HZ), mel(HIGH_HZ), MEL_BINS + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    weights = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return np.maximum(weights, 0).astype(np.float32)
