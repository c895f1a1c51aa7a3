"""Shared by originals_make.py and test_pixels_originals.py: inputs, made from seeds, and how outputs are kept.

`RandomState` is NumPy's frozen generator: the same numbers in every version. Weights have the names that our files give
them, images and features the authors' order (channels, rows, columns).
"""

import hashlib

import numpy as np

BATCH, ACTIONS, CHANNELS = 4, 3, 9


def weights(shapes: dict) -> dict:
    """Name -> shape, to name -> float32 of the size that a layer's inputs call for; no bias and no scale is trivial."""
    numbers, found = np.random.RandomState(11), {}
    for name, shape in sorted(shapes.items()):
        value = numbers.standard_normal(shape)
        if len(shape) > 1:
            value /= np.sqrt(np.prod(shape[1:]))
        else:
            value *= 0.1
        if name.endswith("trunk.1.weight"):  # of LayerNorm
            value += 1
        found[name] = value.astype(np.float32)
    return found


def images(seed: int, size: int) -> np.ndarray:
    """uint8 (B, 9, size, size) of blocks of 4 x 4 pixels."""
    shape = BATCH, CHANNELS, size // 4, size // 4
    blocks = np.random.RandomState(seed).randint(0, 256, shape)
    return np.kron(blocks, np.ones((1, 1, 4, 4))).astype(np.uint8)


def noise(seed: int) -> np.ndarray:
    """Normal, (B, A): small, so that actions stay off +-1, where 1e-6 in a logarithm would show (difference 2)."""
    numbers = np.random.RandomState(seed).standard_normal((BATCH, ACTIONS))
    return (0.3 * numbers).astype(np.float32)


def dither(size: int) -> np.ndarray:
    """Uniform in [0, 1), (B, 9, size, size)."""
    shape = BATCH, CHANNELS, size, size
    return np.random.RandomState(12).random_sample(shape).astype(np.float32)


def steps() -> tuple:
    """Actions (B, A), rewards (B,), discounts (B,): a true end among them."""
    numbers = np.random.RandomState(13)
    actions = numbers.uniform(-1, 1, (BATCH, ACTIONS)).astype(np.float32)
    rewards = numbers.uniform(0, 1, BATCH).astype(np.float32)
    return actions, rewards, np.array([0.99, 0.99, 0.0, 0.99], np.float32)


def summary(tensors: dict) -> np.ndarray:
    """Rows by name, in order: the norm of a tensor and eight of its numbers, evenly spaced."""
    rows = []
    for _, value in sorted(tensors.items()):
        flat = np.asarray(value, np.float64).reshape(-1)
        places = (2 * np.arange(8) + 1) * len(flat) // 16
        rows.append([np.linalg.norm(flat), *flat[places]])
    return np.array(rows)


def digest(image) -> str:
    """Of every byte of a uint8 array."""
    return hashlib.sha256(np.ascontiguousarray(image, np.uint8).tobytes()).hexdigest()
