"""One pass of a whole decoder in native code: mirrors of the structs in csrc/kernels.h, and the call."""

from __future__ import annotations

import ctypes

from lissom.kernels import native
from lissom.kernels.packed import Matrix
from lissom.kernels.ragged_attention import KeyValues

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2, "relu": 3}


class Layer(ctypes.Structure):
    """Mirror of `struct Layer`."""

    _fields_ = (
        *((name, Matrix) for name in ("query", "key", "value", "out", "gate", "up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "attention_norm",
                "mlp_norm",
                "query_norm",
                "key_norm",
                "after_attention_norm",
                "after_mlp_norm",
            )
        ),
        *((name, ctypes.c_int64) for name in ("rope", "window")),
    )


class Rope(ctypes.Structure):
    """Mirror of `struct Rope`."""

    _fields_ = (("frequencies", ctypes.c_void_p), ("rotated", ctypes.c_int64), ("scaling", ctypes.c_float))


class Plan(ctypes.Structure):
    """Mirror of `struct Plan`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "ropes")),
        *((name, Matrix) for name in ("embedding", "head")),
        ("final_norm", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("layer_count", "rope_count", "hidden", "intermediate"),
                *("query_heads", "kv_heads", "head_dim", "activation", "planes"),
            )
        ),
        *(
            (name, ctypes.c_float)
            for name in ("epsilon", "attention_scale", "attention_softcap", "final_softcap", "embedding_scale")
        ),
    )


class Step(ctypes.Structure):
    """Mirror of `struct Step`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "positions", "holes", "stores", "wanted", "logits", "sparse", "queries")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "count", "outputs", "first")),
    )


for _number, _structure in ((4, Layer), (5, Rope), (6, Plan), (7, Step)):
    native.mirror(_number, _structure)


def decode(plan: Plan, step: Step) -> None:
    """Read the tokens of `step` with the decoder `plan`: their keys and values are appended, logits are written.

    Raises:
        ValueError: a token is outside the vocabulary, or a store has no room: nothing was changed.
        MemoryError: there is not enough memory.
    """
    native.call("decode", plan, step)


__all__ = ["ACTIVATIONS", "KeyValues", "Layer", "Plan", "Rope", "Step", "decode"]
