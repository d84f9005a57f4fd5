from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lissom


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer: fetched and converted at the first use on a machine."""
    return lissom.load()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, smollm2):
    """A model folder that loads in no time: two random layers with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=len(smollm2[1]), max_position_embeddings=2048, initializer_range=0.2,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(tiny_folder):
    """The model of `tiny_folder` and its tokenizer: where what is computed counts, and not what is said."""
    return lissom.load(tiny_folder)


@pytest.fixture(scope="session")
def lissom_cli():
    """The command as a user calls it: arguments in, finished process out."""

    def call(*arguments: object, file_limit: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lissom", *map(str, arguments)]

        def limit() -> None:
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        env = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=limit)

    return call


@pytest.fixture
def calls(monkeypatch):
    """How many tokens each native pass read, in the test."""
    from lissom.decode.passes import NativePasses

    seen: list[int] = []
    read = NativePasses.read

    def counted(self, cache, ids, *args, **kwargs):
        logits = read(self, cache, ids, *args, **kwargs)
        seen.append(ids.shape[1])
        return logits

    monkeypatch.setattr(NativePasses, "read", counted)
    return seen
