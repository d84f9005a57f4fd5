"""Sparse-BitNet (arXiv 2603.05168): ternary weights with dynamic N:M sparsity, trained from scratch or continued.

In every step, each matrix is used as `scale * mask * ternary`: the mask keeps the N largest of every M master weights,
the scale is the mean magnitude of all of them, and the ternary values are the masters over the scale, rounded to -1, 0
and 1. Activations have 8 bits and a scale for each token. Gradients go straight through the rounding and the mask, so
that weights that are left out go on learning, and come back when they have grown.

`SparseBitNetConfig(n=2, m=4).convert(model)` puts trainable layers into a model; `pack(model)` stores what they have
become in 1.33 bits per weight (2:4 and what is sparser) or 1.78, which the native kernels multiply with.
"""

from lissom.weights.sparse_bitnet.apply import Census, census, pack
from lissom.weights.sparse_bitnet.config import SparseBitNetConfig

__all__ = ["Census", "SparseBitNetConfig", "census", "pack"]
