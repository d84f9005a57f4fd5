"""Branches in files for other runtimes: all of them in ONNX, and none left out of GGUF."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tiny import ByteTokenizer, tiny_model

from lissom import NobleConfig
from lissom.errors import UserError
from lissom.export.gguf import export_gguf
from lissom.weights.noble import prune
from lissom.weights.noble.apply import layers_of


@pytest.mark.parametrize("kind,centred", [("cosnet", False), ("cosnet", True), ("gelu-net", False)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_onnx_runtime_gives_the_same_logits(architecture, kind, centred, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = NobleConfig(rank=4, activation=kind, centred=centred).convert(tiny_model(architecture, "eager"))
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.noble.up.normal_()
    file, ids = str(tmp_path / "model.onnx"), torch.randint(3, 120, (2, 11))
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        model, (), file, kwargs={"input_ids": ids, "use_cache": False}, dynamo=True, input_names=["input_ids"],
        output_names=["logits"], dynamic_shapes={"input_ids": dynamic, "use_cache": None}, verbose=False,
    )  # fmt: skip
    session, other = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), ids[:1, :7]
    with torch.no_grad():
        wanted = model(other).logits.numpy()
    found = session.run(["logits"], {"input_ids": other.numpy()})[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_gguf_is_refused_until_branches_are_taken_out(tmp_path):
    model = NobleConfig(rank=4).convert(tiny_model("llama"))
    with pytest.raises(UserError, match="no place for what noble adds"):
        export_gguf(model, ByteTokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    prune(model, list(layers_of(model)))
    with pytest.raises(Exception, match=r"(?i)tokenizer"):  # the next thing that it asks for
        export_gguf(model, ByteTokenizer(), tmp_path / "model.gguf")
