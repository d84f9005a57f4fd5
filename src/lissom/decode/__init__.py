"""`native-decode`: a model's passes in native code, and a generation loop that does not get in their way.

`NativeDecode` is used around any transformers code that runs a model:

    with NativeDecode(kv="int8")(model):
        model.generate(**inputs)

Inside, a forward pass is one call of a C++ kernel that goes through all layers, with the weights as they lie in memory
(packed or dense) and the cache in lissom's storage. What it does not support runs as before. `generate_text` and
`generate_tokens` are a loop without the overhead of `generate`.
"""

from lissom.decode.loop import Answer, generate_text, generate_tokens
from lissom.decode.native import NativeDecode, weight_bytes
from lissom.decode.sampling import Sampling

__all__ = ["Answer", "NativeDecode", "Sampling", "generate_text", "generate_tokens", "weight_bytes"]
