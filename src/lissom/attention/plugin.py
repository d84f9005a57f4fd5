"""`attn_implementation="lissom_sparse_prefill"`: known as soon as transformers is imported.

The module is imported while transformers itself is being imported, so it takes FlashPrefill only where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lissom.models.attention import register_prompt_attention

if TYPE_CHECKING:
    from lissom.models.attention import PromptAttention

KEY = "sparse_prefill"  # transformers takes every name with "flash" in it for one of FlashAttention


def _default() -> PromptAttention:
    from lissom.attention.flash_prefill import FlashPrefill
    from lissom.attention.flash_prefill.apply import Running

    return Running(FlashPrefill())


register_prompt_attention(KEY, _default)
