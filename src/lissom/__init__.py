"""lissom makes open language and diffusion models small, fast and adaptable.

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lissom import hook

if TYPE_CHECKING:
    from lissom.attention.flash_prefill import FlashPrefill, sparse_prefill
    from lissom.decode import NativeDecode, Sampling, generate_text, generate_tokens
    from lissom.diffusion.h_transform import HTransform
    from lissom.diffusion.klein_kv import KleinKV, WarmReferences
    from lissom.kv import AttentionMatching, CompactCache, Eviction, KVBudget, compact
    from lissom.models.load import load
    from lissom.weights.noble import NobleConfig
    from lissom.weights.quant import Quantize
    from lissom.weights.sparse_bitnet import SparseBitNetConfig

__version__ = "0.1.0"
__all__ = [
    "AttentionMatching",
    "CompactCache",
    "Eviction",
    "FlashPrefill",
    "HTransform",
    "KVBudget",
    "KleinKV",
    "NativeDecode",
    "NobleConfig",
    "Quantize",
    "Sampling",
    "SparseBitNetConfig",
    "WarmReferences",
    "compact",
    "generate_text",
    "generate_tokens",
    "load",
    "sparse_prefill",
]

_HOMES = {
    "AttentionMatching": "lissom.kv",
    "CompactCache": "lissom.kv",
    "Eviction": "lissom.kv",
    "FlashPrefill": "lissom.attention.flash_prefill",
    "HTransform": "lissom.diffusion.h_transform",
    "KVBudget": "lissom.kv",
    "KleinKV": "lissom.diffusion.klein_kv",
    "NativeDecode": "lissom.decode",
    "NobleConfig": "lissom.weights.noble",
    "Quantize": "lissom.weights.quant",
    "Sampling": "lissom.decode",
    "SparseBitNetConfig": "lissom.weights.sparse_bitnet",
    "WarmReferences": "lissom.diffusion.klein_kv",
    "compact": "lissom.kv",
    "generate_text": "lissom.decode",
    "generate_tokens": "lissom.decode",
    "load": "lissom.models.load",
    "sparse_prefill": "lissom.attention.flash_prefill",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lissom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


hook.install()  # last: what it imports may import from here
