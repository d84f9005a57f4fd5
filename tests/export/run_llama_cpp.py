"""What llama.cpp makes of a GGUF file: run by a Python that has llama-cpp-python, maybe not the one of the tests."""

from __future__ import annotations

import json
import sys

import numpy as np


def main(path: str, output: str, given: str) -> None:
    """Write to `output` (.npz): `tokens` of the text, `logits` `[ids, vocabulary]` of the ids, `greedy` new ids."""
    from llama_cpp import Llama

    asked = json.loads(given)
    model = Llama(path, n_ctx=asked.get("n_ctx", 256), n_threads=1, logits_all=True, verbose=False)
    tokens = model.tokenize(asked["text"].encode(), add_bos=True, special=True)
    ids = asked.get("ids") or tokens
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    greedy = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        if len(greedy) == asked.get("new", 0):
            break
        greedy.append(token)
    np.savez(output, tokens=tokens, logits=logits, greedy=greedy)


if __name__ == "__main__":
    main(*sys.argv[1:])
