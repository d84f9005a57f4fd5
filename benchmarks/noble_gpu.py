"""The arms of `lissom check noble` on a GPU, larger: steps and time to the baseline's loss.

A Llama-like model of 28 million parameters on 10 million tokens of three kinds of text, each seen once, in bf16. Where
the machine with the GPU has no network, `--prepare FILE` writes the tokens on another one, and `--tokens FILE` reads
them. A run that was stopped goes on behind the last arm and seed in its journal.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from lissom.evals.checks import noble as study
from lissom.files import atomic_path
from lissom.report.checks.noble import result, tables
from lissom.train import TokenWindows, TrainConfig, new_tokenizer, token_windows

CORPORA = ("sotu", "kernel-docs", "python-docs")
ARMS = (study.PLAIN, study.COSNET, study.BIASED, study.LINEAR, study.WIDER)
RATES = (5e-4, 1e-3, 2e-3)
SIZE = study.Size(
    ARMS, (0, 1, 2),
    TrainConfig(steps=600, context=512, batch_size=32, warmup_steps=30, schedule="wsd", decay_share=0.2,
                logging_steps=25, eval_steps=25, save_steps=600, precision="bf16"),
    RATES, 150, 32, {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 8, "intermediate": 1408}, 4096, 100,
)  # fmt: skip
QUICK = replace(
    SIZE, seeds=(0, 1), rank=2, model={"hidden": 48, "layers": 1, "heads": 3}, tuning_steps=2,
    config=replace(SIZE.config, steps=4, context=32, batch_size=2, warmup_steps=1, eval_steps=2, logging_steps=2),
)  # fmt: skip


def prepare(file: Path) -> None:
    """Write the tokens of the texts, at the size of the study's windows."""
    from lissom.models import assets

    texts = (text for corpus in CORPORA for _, text in assets.corpus(corpus))
    tokenizer = new_tokenizer(texts, SIZE.vocabulary)
    tokens = [token_windows(assets.path(corpus), tokenizer, SIZE.config.context).tokens for corpus in CORPORA]
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, tokens=np.concatenate(tokens))


def measure(size: study.Size, tokens: np.ndarray, journal: Path) -> study.Run:
    """Every run that is not in the journal yet."""
    windows, held_out = study.apart(TokenWindows(tokens, size.config.context), size.held_out, size.config.batch_size)
    return study.measure(study.build(study.PLAIN, size, 0), size, windows, held_out, journal, _tell)


def _tell(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few steps")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the tokens, and end")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="what --prepare has written")
    parser.add_argument("--journal", type=Path, default=Path("lissom-check/noble-gpu.jsonl"))
    parser.add_argument("--json", metavar="FILE", help="write the result")
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare)
        return
    if given.tokens is None:
        given.tokens = Path(tempfile.mkdtemp()) / "tokens.npz"
        prepare(given.tokens)
    size = QUICK if given.quick else SIZE
    run = measure(size, np.load(given.tokens)["tokens"], given.journal)
    for table in tables(run):
        Console().print(table)
    if given.json:
        replace(result(run), name="noble-gpu").write(given.json)


if __name__ == "__main__":
    main()
