from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from lissom.diffusion.demo.pipeline import positions, text_positions
from lissom.diffusion.klein_kv.cost import cached_bytes, cost
from lissom.diffusion.references import layers, prepare, read

WIDTH, DOUBLE, SINGLE, TEXT, IMAGE, REFERENCE = 64, 1, 2, 4, 16, 32


@pytest.fixture(scope="module")
def transformer():
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=48, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=64, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    prepare(model)
    return model


def counted(transformer, work):
    """Operations of the blocks alone, as PyTorch counts them; attention as products."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = work()
    counts = counter.get_flop_counts()
    names = [f"Flux2Transformer2DModel.{name}" for name in ("transformer_blocks", "single_transformer_blocks")]
    return found, sum(
        sum(value.values())
        for module, value in counts.items()
        if any(module.startswith(name) and module.count(".") == 2 for name in names)
    )


def test_operations_are_those_that_are_counted(transformer):
    text = torch.randn(1, TEXT, 64)
    image, references = torch.randn(1, IMAGE, 48), torch.randn(1, REFERENCE, 48)
    image_ids = positions(4, 4)
    reference_ids = torch.cat([positions(4, 4, 10), positions(4, 4, 20)])
    inputs = {
        "encoder_hidden_states": text, "timestep": torch.tensor([0.5]), "txt_ids": text_positions(TEXT),
        "return_dict": False,
    }  # fmt: skip
    both = torch.cat([image, references], 1), torch.cat([image_ids, reference_ids])
    _, full = counted(transformer, lambda: transformer(hidden_states=both[0], img_ids=both[1], **inputs))
    cache, reading = counted(transformer, lambda: read(transformer, references, reference_ids))
    _, seeing = counted(
        transformer,
        lambda: transformer(hidden_states=image, img_ids=image_ids, kv_cache=cache, kv_cache_mode="cached", **inputs),
    )
    own = cost(WIDTH, DOUBLE + SINGLE, TEXT + IMAGE, REFERENCE, steps=1)
    assert full == own.full and seeing == own.warm and reading + seeing == own.cached
    many = cost(WIDTH, DOUBLE + SINGLE, TEXT + IMAGE, REFERENCE, steps=5, passes=2)
    assert many.full == 10 * full and many.warm == 10 * seeing and many.cached == reading + 10 * seeing
    held = sum(tensor.nbytes for layer in layers(cache) for tensor in (layer.k_ref, layer.v_ref))
    assert held == cached_bytes(WIDTH, DOUBLE + SINGLE, REFERENCE, 4)


def test_published_sizes():
    """FLUX.2 klein 9B: bytes of one reference of 1024 by 1024 pixels, and the bound on the speed-up of four steps."""
    assert cached_bytes(4096, 32, 4096, 2) / 2**30 == 2.0
    own = cost(4096, 32, 512 + 4096, 4096, steps=4)
    assert own.full / own.cached == pytest.approx(1.58, abs=0.02) and own.full / own.warm == pytest.approx(1.9, abs=0.1)
