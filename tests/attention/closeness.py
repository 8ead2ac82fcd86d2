"""How far an output and its three gradients are from the oracle's."""

import numpy as np

NAMES = ("out", "d_query", "d_key", "d_value")


def errors(actual, expected):
    """Relative error in the Frobenius norm, per tensor; infinite if anything is not finite."""
    return {
        name: np.linalg.norm(a - e) / np.linalg.norm(e) if np.isfinite(a).all() else np.inf
        for name, a, e in zip(NAMES, actual, expected, strict=True)
    }


def assert_close(actual, expected, tolerance):
    found = errors(actual, expected)
    assert max(found.values()) < tolerance, found
