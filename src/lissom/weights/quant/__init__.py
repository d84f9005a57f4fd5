"""Low-bit weights: linear layers in codes of 4 or 8 bits with a scale, and perhaps a minimum, per group of inputs.

`Quantize(bits=4).convert(model)` replaces every linear layer by a packed one that the native kernels multiply with, in
place and matrix by matrix. How the codes are found is its `method`: round-to-nearest (`rtn`), a search over scales and
minima that weighs errors by how large each input is on a calibration text (`search`), or GPTQ (`gptq`, arXiv
2210.17323), which lets the columns that are still to be rounded make up for the error of those that are. With a budget
(`target_bits`, `max_loss`) the matrices that matter most per byte get 8 bits. Embedding and head have 8 bits by default
and stay one tensor where they were one.
"""

from lissom.weights.quant.config import Quantize

__all__ = ["Quantize"]
