"""GGUF files: the container, its blocks as packed matrices, its architectures, and loading a model from it."""

from lissom.models.gguf.architecture import NAMES
from lissom.models.gguf.file import GgufFile
from lissom.models.gguf.load import load_dense, load_model, load_packed, load_tokenizer

__all__ = ["NAMES", "GgufFile", "load_dense", "load_model", "load_packed", "load_tokenizer"]
