"""KV-cache compaction by attention matching (ICML 2026, arXiv 2602.16284).

A long document's cache is replaced by a small one: per KV head a subset of its keys, each with a bias β that says for
how many original keys it stands, and new values. Keys, biases and values are chosen in closed form so that, for a set
of reference queries, both the attention output and the attention mass stay what they were; any later tokens then mix
with the compacted block correctly. Minutes of training (cartridges) become a second of least squares.
"""

from lissom.kv.attention_matching.config import AttentionMatching

__all__ = ["AttentionMatching"]
