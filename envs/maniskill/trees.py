"""Nested dicts of observations and states."""

import math
from typing import Any

import numpy as np


def stack(parts: list[dict]) -> dict[str, np.ndarray]:
    """Joins a list of observations (tensors on the CPU or arrays) along the environments."""
    return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}


def map_tree(tree: Any, function: Any) -> Any:
    """Applies a function to every leaf of nested dicts and lists."""
    if isinstance(tree, dict):
        return {key: map_tree(value, function) for key, value in tree.items()}
    return (
        [map_tree(value, function) for value in tree] if isinstance(tree, list) else function(tree)
    )


def layout(tree: dict, prefix: str = "") -> list[list]:
    """[name, size] of each entry of a nested observation, in the order of flattening."""
    rows: list[list] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += layout(value, f"{prefix}{key}/")
        else:
            rows.append([f"{prefix}{key}", int(math.prod(value.shape[1:]))])
    return rows


def plain(value: Any) -> Any:
    """A JSON value of a number, array or list; None where it is not finite."""
    if value is None or isinstance(value, (str, bool)):
        return value
    value = np.asarray(value, np.float64)
    if value.ndim:
        return [plain(v) for v in value]
    return float(value) if np.isfinite(value) else None
