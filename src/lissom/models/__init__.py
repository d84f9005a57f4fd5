"""Loading any decoder of transformers, the embedded default, and what a decoder looks like.

Nothing that loads files is imported here: what registers with transformers needs `lissom.models.attention` alone.
"""

from lissom.models.decoder import DecoderInfo, describe_decoder, fingerprint

__all__ = ["DecoderInfo", "describe_decoder", "fingerprint"]
