"""FlashPrefill: prompts are read with attention to the blocks of keys that matter (arXiv 2603.06199, 2608.19758).

Keys are pooled to one mean for each block of 128. What a tile of 128 queries would give to each mean decides which
blocks it attends to: those with at least `alpha` of the largest share, the first and the latest ones, and everything
for the last tiles of a prompt. `selection` is these semantics in plain PyTorch; `sparse_prefill` computes them by the
native kernel on the CPU, by Triton on a GPU, or in PyTorch; `FlashPrefill` puts it into a running model.
"""

from lissom.attention.flash_prefill.config import FlashPrefill
from lissom.attention.flash_prefill.prefill import sparse_prefill
from lissom.attention.flash_prefill.report import Report
from lissom.kernels.blocks import Rules

__all__ = ["FlashPrefill", "Report", "Rules", "sparse_prefill"]
