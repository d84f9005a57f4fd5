"""llama.cpp by the low-level functions of llama-cpp-python, so that its Python layer costs next to nothing.

Settings: `gguf`, `flash` (flash attention on or off), `threads`. The cache is F16; prompts are read 512 tokens at a
time. `prepare` is llama.cpp's own quantiser.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp as lib
import numpy as np

_BATCH = 512


@lib.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def prepare(settings: dict[str, Any]) -> None:
    """Write the file `quantised`: the matrices of `gguf` in a `type` such as Q4_K_M, embedding and head in Q8_0.

    `importance`, where it is given, has the weight of each input's errors, by the tensors' names.
    """
    lib.llama_log_set(_quiet, ctypes.c_void_p())
    wanted = lib.llama_model_quantize_default_params()
    wanted.nthread = settings["threads"]
    wanted.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{settings['type']}")
    wanted.token_embedding_type = wanted.output_tensor_type = lib.GGML_TYPE_Q8_0
    if "importance" in settings:
        weights = {name: np.array(values, np.float32) for name, values in settings["importance"].items()}
        entries = (lib.llama_model_imatrix_data * (len(weights) + 1))()  # an empty one ends them
        for entry, (name, values) in zip(entries, weights.items(), strict=False):
            pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.name, entry.data, entry.size = name.encode(), pointer, len(values)
        wanted.imatrix = entries
    files = (settings[name].encode() for name in ("gguf", "quantised"))
    if lib.llama_model_quantize(*files, ctypes.byref(wanted)):
        raise ValueError(f"llama.cpp cannot quantise {settings['gguf']} to {settings['type']}")


class Runtime:
    def __init__(self, settings: dict[str, Any]) -> None:
        lib.llama_log_set(_quiet, ctypes.c_void_p())
        lib.llama_backend_init()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(settings["gguf"].encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {settings['gguf']}")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._threads, self._flash = settings["threads"], settings["flash"]
        self._context: Any = None
        self._capacity = 0
        self.facts = {"llama-cpp-python": lib.__version__, "built with": lib.llama_print_system_info().decode()}

    def _prepare(self, capacity: int) -> Any:
        """An empty context for `capacity` tokens."""
        if self._context is None or capacity != self._capacity:
            if self._context is not None:
                lib.llama_free(self._context)
            wanted = lib.llama_context_default_params()
            wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = capacity, _BATCH, _BATCH
            wanted.n_threads = wanted.n_threads_batch = self._threads
            wanted.flash_attn_type = int(self._flash)  # 0 off, 1 on; by itself it would choose
            wanted.type_k = wanted.type_v = lib.GGML_TYPE_F16
            self._context, self._capacity = lib.llama_init_from_model(self._model, wanted), capacity
            if not self._context:
                raise MemoryError(f"llama.cpp cannot make a context of {capacity} tokens")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        return self._context

    def generate(self, ids: list[int], capacity: int, emit: Callable[[int], None]) -> None:
        context = self._prepare(capacity)
        while True:
            for start in range(0, len(ids), _BATCH):
                part = ids[start : start + _BATCH]
                tokens = (lib.llama_token * len(part))(*part)  # the batch only points at it
                if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(part))):
                    raise RuntimeError("llama.cpp could not decode")
            logits = lib.llama_get_logits_ith(context, -1)
            ids = [int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())]
            emit(ids[0])
