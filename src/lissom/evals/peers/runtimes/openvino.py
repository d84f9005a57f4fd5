"""OpenVINO on optimum-intel's export: a stateful model whose cache lies in the runtime, run step by step.

Settings: `folder` and `bits` (8 or 4, of the weights) for the export, whose Python needs optimum-intel and nncf, too;
`export` (where it lies), `threads`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino.opset13 as ops

_GROUPS = (128, 64, 32)  # inputs that share a scale; optimum-intel's own is the first


def prepare(settings: dict[str, Any]) -> None:
    """Export and compress the weights, as `optimum-cli export openvino --weight-format int4` does."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    options: dict[str, Any] = {"bits": settings["bits"]}
    config = Path(settings["folder"]) / "config.json"
    if settings["bits"] == 4 and config.is_file():
        facts = json.loads(config.read_text())
        sizes = [facts.get(name) or 128 for name in ("hidden_size", "intermediate_size")]
        # A group that does not divide the inputs is refused.
        options["group_size"] = next((g for g in _GROUPS if not any(s % g for s in sizes)), -1)
    model = OVModelForCausalLM.from_pretrained(
        settings["folder"], export=True, compile=False, quantization_config=OVWeightQuantizationConfig(**options)
    )
    model.save_pretrained(settings["export"])


class Runtime:
    def __init__(self, settings: dict[str, Any]) -> None:
        core = openvino.Core()
        model = core.read_model(Path(settings["export"]) / "openvino_model.xml")
        _keep_last(model)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": settings["threads"]}
        self._request = core.compile_model(model, "CPU", options).create_infer_request()
        self._inputs = {name for port in model.inputs for name in port.get_names()}
        self.facts = {"openvino": openvino.__version__}

    def generate(self, ids: list[int], capacity: int, emit: Callable[[int], None]) -> None:
        self._request.reset_state()
        read = 0
        while True:
            given = {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, read + len(ids)), np.int64),
                "position_ids": np.arange(read, read + len(ids), dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            self._request.infer({name: value for name, value in given.items() if name in self._inputs}, True)
            read += len(ids)
            ids = [int(self._request.get_tensor("logits").data[0, -1].argmax())]
            emit(ids[0])


def _keep_last(model: Any) -> None:
    """Compute logits of the last token only, as OpenVINO's own pipelines do."""
    head = model.output("logits").get_node().input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        return
    last = ops.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
