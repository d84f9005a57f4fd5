"""ONNX Runtime at 4 bits (`MatMulNBits`), through onnxruntime-genai: its model builder makes the file, its generator
keeps the cache.

Settings: `folder` for the builder, whose Python needs onnx, onnx-ir, torch and transformers, too; `export` (where the
model lies), `threads`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import onnxruntime_genai as genai


def prepare(settings: dict[str, Any]) -> None:
    """Build the model with int4 weights, and activations of 8 bits where they are multiplied with them."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", settings["folder"]]
        command += ["-o", settings["export"], "-p", "int4", "-e", "cpu", "-c", cache]
        command += ["--extra_options", "int4_accuracy_level=4"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the model builder failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


class Runtime:
    def __init__(self, settings: dict[str, Any]) -> None:
        config = genai.Config(settings["export"])
        threads = {"intra_op_num_threads": settings["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = genai.Model(config)
        self.facts = {"onnxruntime-genai": genai.__version__}

    def generate(self, ids: list[int], capacity: int, emit: Callable[[int], None]) -> None:
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=capacity, min_length=capacity, do_sample=False)
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            emit(int(generator.get_next_tokens()[0]))
