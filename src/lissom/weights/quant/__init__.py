"""Low-bit weights: modules with packed weights, and the ways to make them."""

from lissom.weights.quant.layer import PackedEmbedding, PackedLinear

__all__ = ["PackedEmbedding", "PackedLinear"]
