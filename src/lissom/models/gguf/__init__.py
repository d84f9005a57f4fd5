"""GGUF files: the container, its blocks as packed matrices, its architectures, and loading a model from it."""

from lissom.models.gguf.file import GgufFile
from lissom.models.gguf.load import load_model, load_packed, load_tokenizer

__all__ = ["GgufFile", "load_model", "load_packed", "load_tokenizer"]
