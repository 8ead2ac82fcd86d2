"""Speech that anybody can make: words of tones, for a demonstration and tests without any data.

A word is a fixed sequence of two to four sounds, each of two tones at once, as vowels have two
formants. Recordings differ in the words, in pitch and tempo (of the recording, and of each sound),
in loudness and in noise.
"""

import numpy as np

from data.speech.features import SAMPLE_RATE

# Sound → hertz of its two tones. A word is spelled by its sounds.
SOUNDS = {
    "A": (700, 1200), "E": (500, 1900), "I": (300, 2400), "O": (450, 850), "U": (320, 1500),
    "S": (2600, 4200), "N": (250, 3200),
}  # fmt: skip
WORDS = ("ASO", "NI", "SUNE", "OE", "INA", "USA", "ENO", "SAI", "NUNO", "IS")
MIN_WORDS, MAX_WORDS = 2, 5
SOUND_SECONDS, GAP_SECONDS = 0.12, 0.08  # on average
NOISE = 0.05  # of the loudness


def recording(seed: int, index: int) -> tuple[np.ndarray, str]:
    """(samples,) int16 at 16 kHz and the words, a function of the arguments alone."""
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index))))
    words = draws.choice(WORDS, draws.integers(MIN_WORDS, MAX_WORDS + 1)).tolist()
    pitch, tempo = draws.uniform(0.9, 1.1), draws.uniform(0.8, 1.25)
    pieces = [_silence(draws, tempo)]
    for word in words:
        pieces += [_sound(draws, SOUNDS[letter], pitch, tempo) for letter in word]
        pieces.append(_silence(draws, tempo))
    wave = np.concatenate(pieces)
    wave += NOISE * draws.standard_normal(len(wave))
    loudness = draws.uniform(2000, 8000)
    return np.rint(loudness * wave).astype(np.int16), " ".join(words)


def _silence(draws: np.random.Generator, tempo: float) -> np.ndarray:
    return np.zeros(_samples(draws, GAP_SECONDS, tempo))


def _sound(
    draws: np.random.Generator, hertz: tuple[int, int], pitch: float, tempo: float
) -> np.ndarray:
    """Two sines that fade in and out; between them neither jumps."""
    times = np.arange(_samples(draws, SOUND_SECONDS, tempo)) / SAMPLE_RATE
    wave = np.zeros(len(times))
    for tone in hertz:
        exact = tone * pitch * draws.uniform(0.97, 1.03)
        wave += np.sin(2 * np.pi * (exact * times + draws.random()))
    return wave / 2 * np.sqrt(np.hanning(len(times)))


def _samples(draws: np.random.Generator, seconds: float, tempo: float) -> int:
    return int(seconds / tempo * draws.uniform(0.8, 1.2) * SAMPLE_RATE)
