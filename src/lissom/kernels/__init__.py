"""One module per kernel: the native path (csrc), and the PyTorch reference that defines what it computes."""

from lissom.kernels.attention_statistics import attention_statistics
from lissom.kernels.ragged_attention import ragged_attention, ragged_attention_reference

__all__ = ["attention_statistics", "ragged_attention", "ragged_attention_reference"]
