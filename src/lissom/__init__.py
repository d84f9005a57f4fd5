"""lissom makes open language models small, fast and adaptable. Nothing heavy is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lissom.decode import NativeDecode, Sampling, generate_text, generate_tokens
    from lissom.kv import AttentionMatching, CompactCache, Eviction, KVBudget, compact
    from lissom.models import load

__version__ = "0.1.0"
__all__ = [
    "AttentionMatching",
    "CompactCache",
    "Eviction",
    "KVBudget",
    "NativeDecode",
    "Sampling",
    "compact",
    "generate_text",
    "generate_tokens",
    "load",
]

_HOMES = {
    "AttentionMatching": "lissom.kv",
    "CompactCache": "lissom.kv",
    "Eviction": "lissom.kv",
    "KVBudget": "lissom.kv",
    "NativeDecode": "lissom.decode",
    "Sampling": "lissom.decode",
    "compact": "lissom.kv",
    "generate_text": "lissom.decode",
    "generate_tokens": "lissom.decode",
    "load": "lissom.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lissom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
