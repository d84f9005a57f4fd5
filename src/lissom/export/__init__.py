"""Models as files: of llama.cpp, and of transformers where a model in training is packed."""
