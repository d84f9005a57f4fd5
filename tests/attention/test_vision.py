"""FlashPrefill in the decoder of a vision-language model: image tokens in the prompt, positions in three dimensions."""

from __future__ import annotations

import pytest
import torch
from tiny import close
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lissom import FlashPrefill

IMAGE, START, END = 100, 101, 102


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 1024, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START,
        vision_end_token_id=END, video_token_id=103,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def inputs():
    """An image of 16 x 24 patches, which is 96 tokens, amid 400 of text."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(1, 99, (1, 400), generator=draw)
    image = torch.tensor([[START, *[IMAGE] * 96, END]])
    ids = torch.cat([words[:, :150], image, words[:, 150:]], 1)
    pixels = torch.randn(16 * 24, 3 * 2 * 4 * 4, generator=draw)
    return {
        "input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 16, 24]]),
        "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int(),
    }  # fmt: skip


@torch.no_grad()
def test_alpha_zero_is_the_plain_model(model, inputs):
    wanted = model(**inputs).logits
    with FlashPrefill(alpha=0.0, min_tokens=0, precision="exact")(model) as report:
        close(model(**inputs).logits, wanted)
    assert report.density == 1.0 and report.layers.keys() == {0, 1, 2}  # of the decoder, not of the picture's encoder
    assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_prompts_are_sparse(model, inputs):
    wanted = model(**inputs).logits
    method = FlashPrefill(alpha=2.0, min_tokens=0, precision="exact", sink=1, window=1, last=0)
    with method(model) as report:
        got = model(**inputs).logits
    assert report.density == pytest.approx(7 / 10)
    close(got[:, :256], wanted[:, :256])
    assert float((got[:, 384:] - wanted[:, 384:]).abs().max()) > 0.01


def test_generate(model, inputs):
    settings = {"max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(**inputs, **settings)
    with FlashPrefill(alpha=0.0, min_tokens=0, precision="exact")(model) as report:
        assert torch.equal(model.generate(**inputs, **settings), wanted)
    assert report.layers
