"""NOBLE's layer in NumPy and float64, from its formulas alone."""

from __future__ import annotations

import math

import numpy as np

_gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
_FUNCTIONS = {"gelu-net": _gelu, "silu-net": lambda x: x / (1 + np.exp(-x)), "tanh-net": np.tanh}
_WAVES = {"cosine": 1, "cosnet": 2, "three-cosine": 3}


def activation(kind: str, h: np.ndarray, t: dict[str, np.ndarray]) -> np.ndarray:
    if kind in _WAVES:
        for stage in range(_WAVES[kind]):
            if stage:
                h = h @ t[f"mix_{stage - 1}"].T + t.get(f"mix_bias_{stage - 1}", 0)
            h = np.cos(t[f"omega_{stage}"] * h + t[f"phi_{stage}"])
        return h
    if kind == "identity":
        return h
    return _FUNCTIONS[kind](_FUNCTIONS[kind](h) @ t["mix_0"].T + t.get("mix_bias_0", 0))


def branched(kind: str, centred: bool, x, weight, bias, t: dict[str, np.ndarray]) -> np.ndarray:
    inside = activation(kind, x @ t["down"].T + t.get("down_bias", 0), t)
    if centred:
        inside = inside - activation(kind, np.zeros((1, len(t["down"]))) + t.get("down_bias", 0), t)
    return x @ weight.T + (0 if bias is None else bias) + inside @ t["up"].T
