"""Loading any decoder of transformers, the embedded default, and what a decoder looks like."""

from lissom.models.decoder import DecoderInfo, describe_decoder, fingerprint
from lissom.models.load import load

__all__ = ["DecoderInfo", "describe_decoder", "fingerprint", "load"]
