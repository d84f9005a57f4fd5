"""The KV cache: one ragged, biased storage, its file format, and the ways of making it small."""

from lissom.kv.attention_matching import AttentionMatching
from lissom.kv.budget import KVBudget
from lissom.kv.cache import CompactCache
from lissom.kv.compact import compact, recompact
from lissom.kv.eviction import Eviction

__all__ = ["AttentionMatching", "CompactCache", "Eviction", "KVBudget", "compact", "recompact"]
