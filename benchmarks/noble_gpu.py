"""The arms of `lissom check noble` on a GPU, larger: steps and time to the baseline's loss.

A Llama-like model of 28 million parameters on 10 million tokens of three kinds of text, each seen once, in bf16. Where
the machine with the GPU has no network, `--prepare FILE` writes the tokens on another one, and `--tokens FILE` reads
them. Runs are made seed by seed, and none is begun behind `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lissom.devices.machine import describe
from lissom.evals.checks import noble as study
from lissom.evals.journal import Journal
from lissom.files import atomic_path
from lissom.train import TokenWindows, TrainConfig, new_tokenizer, token_windows, train

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


def measure(size: study.Size, tokens: np.ndarray, journal: Path, seconds: float) -> None:
    """Every run that is not in the journal yet, as long as there is time."""
    known, begin = Journal(journal), time.monotonic()
    windows, held_out = study.apart(TokenWindows(tokens, size.config.context), size.held_out, size.config.batch_size)
    if "timing" not in known:
        known.add("timing", study.timed(size, torch.accelerator.current_accelerator()))

    def run(identity: str, arm: str, config: TrainConfig) -> None:
        if identity in known or time.monotonic() - begin > seconds:
            return
        started = time.monotonic()
        model = study.build(arm, size, config.seed)
        with tempfile.TemporaryDirectory() as folder:
            history = train(config, model, None, windows, held_out, Path(folder))
        measured = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
        taken = time.monotonic() - started
        known.add(identity, {"arm": arm, "seed": config.seed, "held_out": measured, "seconds": taken})
        print(f"{identity}: {measured[-1][1]:.4f} in {taken:.0f} s", flush=True)

    for rate in size.rates:
        for arm in (study.PLAIN, study.COSNET):
            run(f"tuning/{arm}/{rate}", arm, study.config_of(size, 1000, rate, size.tuning_steps))
    best = {}
    for arm in (study.PLAIN, study.COSNET):
        best[arm] = min(size.rates, key=lambda rate, arm=arm: known[f"tuning/{arm}/{rate}"]["held_out"][-1][1])
    for seed in size.seeds:
        for arm in size.arms:
            rate = best[study.COSNET if arm in (study.COSNET, study.LINEAR) else study.PLAIN]
            run(f"{arm}/{seed}", arm, study.config_of(size, seed, rate))


def result(size: study.Size, journal: Path) -> dict[str, Any]:
    """What is in the journal, for the tables."""
    facts = describe()
    if torch.cuda.is_available():
        facts["machine"]["gpu"] = torch.cuda.get_device_name()
    return {"name": "noble-gpu", **facts, "config": asdict(size.config), "records": Journal(journal).records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few steps")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the tokens, and end")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="what --prepare has written")
    parser.add_argument("--journal", type=Path, default=Path("lissom-check/noble-gpu.jsonl"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument("--json", metavar="FILE", help="write the records")
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare)
        return
    if given.tokens is None:
        given.tokens = Path(tempfile.mkdtemp()) / "tokens.npz"
        prepare(given.tokens)
    size = QUICK if given.quick else SIZE
    measure(size, np.load(given.tokens)["tokens"], given.journal, given.seconds)
    if given.json:
        Path(given.json).write_text(json.dumps(result(size, given.journal)))


if __name__ == "__main__":
    main()
