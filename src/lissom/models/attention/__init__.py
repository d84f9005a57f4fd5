"""The plug-in point by which a cache layer computes its own attention inside any model of transformers.

A cache layer whose storage is not one dense tensor returns an `AttentionHandle` from its `update`, and the attention
function that `install` registers through transformers' `AttentionInterface` hands the query to it. Every ordinary
cache goes, untouched, to the attention function that the model had before. For an attention function that does not
know handles, one becomes the dense tensor that it stands for, where there is such a tensor; where entries were
compacted the first operation fails with a clear sentence, so a bias is never silently dropped.
"""

from lissom.models.attention.exchange import (
    install,
    installed,
    prompt_attention,
    prompt_method,
    register_prompt_attention,
    uninstall,
)
from lissom.models.attention.handles import Attends, AttentionHandle
from lissom.models.attention.prompts import MASK, WINDOWS, NativeReading, NotNatively, PromptAttention, leave_dense

__all__ = [
    "MASK",
    "WINDOWS",
    "Attends",
    "AttentionHandle",
    "NativeReading",
    "NotNatively",
    "PromptAttention",
    "install",
    "installed",
    "leave_dense",
    "prompt_attention",
    "prompt_method",
    "register_prompt_attention",
    "uninstall",
]
