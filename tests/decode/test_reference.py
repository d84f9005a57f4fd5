"""Native logits, at prompts and at single tokens, against a decoder in float64 that shares no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import Reference
from tiny import DECODERS, random_ids, tiny_model
from transformers import DynamicCache

from lissom import Quantize
from lissom.decode import NativeDecode
from lissom.kernels import native
from lissom.models.plan import NativePlan

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")
# Mean errors, relative to the mean logit, that are rounding: of fp32, of activations to 16 bits, to bf16, to int8. The
# models' weights are so large that rounding grows on its way through the layers.
TOLERANCE = {"native": 1e-5, "int8": 6e-4, "int4": 6e-4, "bf16": 0.06}
KV_TOLERANCE = {"fp32": 1e-5, "bf16": 0.04, "int8": 0.08}


@torch.no_grad()
def errors(model, ids, parts, mask=None) -> list[float]:
    """Mean error of the native logits of each part of `ids`, behind the parts before it."""
    reference, cache, done, found = Reference(model), DynamicCache(config=model.config), 0, []
    padded = torch.ones_like(ids) if mask is None else mask
    for part in parts:
        here = slice(done, done + part)
        wanted = reference.read(ids[:, here], padded[:, here])
        places = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, here]
        seen = None if mask is None else mask[:, : done + part]
        got = model(ids[:, here], past_key_values=cache, attention_mask=seen, position_ids=places).logits.double()
        real = padded[:, here].bool()
        found.append(float((got - wanted)[real].abs().mean() / wanted[real].abs().mean()))
        done += part
    assert done == ids.shape[1]
    return found


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("architecture", DECODERS)
def test_prompt_and_steps(architecture, weights):
    """The window of those that have one is 8 tokens: most of these."""
    model, ids = tiny_model(architecture), random_ids(32, rows=2)
    with NativeDecode(weights=weights, kv="fp32")(model):
        assert max(errors(model, ids, (25, 1, 1, 4, 1))) < TOLERANCE[weights]


@pytest.mark.parametrize("settings", [{"symmetric": True}, {"group_size": 64}, {"bits": 8, "head_bits": 16}], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_quantised_models(architecture, settings):
    model = Quantize(method="rtn", **settings).convert(tiny_model(architecture))
    with NativeDecode(kv="fp32")(model):
        assert max(errors(model, random_ids(30, rows=2), (25, 1, 4))) < TOLERANCE["int4"]


@pytest.mark.parametrize("architecture", DECODERS)
def test_left_padding(architecture):
    model, ids = tiny_model(architecture), random_ids(30, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :19] = 0, 0
    with NativeDecode(kv="fp32")(model):
        assert max(errors(model, ids, (24, 1, 1, 4), mask)) < TOLERANCE["native"]


ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 24},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24},
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("parts", [(30, 1, 1, 10), (40, 1, 30, *[1] * 8, 41), (90, 1, 1)], ids=str)
def test_scaled_rotations(kind, parts):
    """Within the trained context of 48 tokens, from within it to beyond, and beyond it at once."""
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=48)
    with NativeDecode(kv="fp32")(model):
        assert max(errors(model, random_ids(sum(parts)), parts)) < 6e-5  # where rotations scale the keys as well


def test_dynamic_rotations_shrink_again_with_a_new_and_shorter_sequence():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=48)
    with NativeDecode(kv="fp32")(model):
        for tokens in (90, 20, 70):
            assert max(errors(model, random_ids(tokens), (tokens - 1, 1))) < 3e-5


ODD = {
    "llama": {"hidden_size": 72, "head_dim": 18, "intermediate_size": 100, "vocab_size": 131},
    "qwen2": {"hidden_size": 40, "head_dim": 10, "intermediate_size": 37, "vocab_size": 129},
    "gemma3": {"hidden_size": 88, "head_dim": 6, "intermediate_size": 50, "vocab_size": 143},
    "phi3": {"hidden_size": 104, "head_dim": 26, "intermediate_size": 48, "vocab_size": 150},
}


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("architecture", ODD)
def test_sizes_that_are_no_multiples_of_vectors_or_groups(architecture, weights):
    model = tiny_model(architecture, **ODD[architecture])
    with NativeDecode(weights=weights, kv="fp32")(model):
        assert max(errors(model, random_ids(30, rows=2), (25, 1, 4))) < TOLERANCE[weights]


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("weights", ["native", "int4"])
def test_prompts_of_one_token_in_batches(rows, weights):
    model = tiny_model("qwen3")
    with NativeDecode(weights=weights, kv="fp32")(model):
        assert max(errors(model, random_ids(6, rows=rows), [1] * 6)) < TOLERANCE[weights]


@pytest.mark.parametrize("kv", KV_TOLERANCE)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_far_beyond_the_trained_context(architecture, kv):
    """Of 32 tokens; the storage is laid out anew several times on the way."""
    model, ids = tiny_model(architecture, max_position_embeddings=32), random_ids(420)
    with NativeDecode(kv=kv)(model):
        found = errors(model, ids, (20, *[1] * 60, 100, *[1] * 10, 200, *[1] * 30))
    assert sum(found) / len(found) < KV_TOLERANCE[kv]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemma_s_embedding_scale_is_rounded_to_the_model_s_dtype(dtype):
    """As transformers rounds it, which changes every logit where the root is no number of the dtype."""
    model = tiny_model("gemma3", hidden_size=96).to(dtype)
    scale = NativePlan(model).plan.embedding_scale
    assert scale == float(torch.tensor(96**0.5).to(dtype)) and (dtype == torch.float32) == (
        scale == np.float32(96**0.5)
    )
