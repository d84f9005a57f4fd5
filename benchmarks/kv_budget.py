"""A conversation within a number of bytes: eviction and attention matching at equal bytes, turn by turn."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Cache, PreTrainedModel

import lissom
from lissom.evals.fidelity import score, teach
from lissom.evals.stats import paired_bootstrap
from lissom.evals.texts import planted_documents
from lissom.kv import CompactCache, KVBudget
from lissom.kv.document import document_ids
from lissom.report.rows import Result, Row

OURS = "attention-matching"  # what the others are compared with
METHODS = (OURS, "streaming-llm", "h2o", "snapkv", "tova")
SHARES = (0.5, 0.25, 0.1)
TURN = 100  # tokens
SEED = 3


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> np.ndarray:
    """Read `ids` `[1, tokens]` turn by turn; the NLL of the tokens of each turn but its first, from the second on."""
    losses = []
    for start in range(0, ids.shape[1], TURN):
        turn = ids[:, start : start + TURN]
        logits = model(turn, past_key_values=cache).logits[0, :-1].float()
        if start:
            losses.append(F.cross_entropy(logits, turn[0, 1:], reduction="none"))
    return torch.cat(losses).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short document, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    model, tokenizer = lissom.load()
    texts = planted_documents(tokenizer, *((1, 300) if given.quick else (4, 1400)), SEED)
    found: dict[tuple[float, str], dict[str, list[float]]] = {}
    for document in track(texts, "documents", console=Console(stderr=True)):
        ids = document_ids(tokenizer, document.text)
        full = CompactCache(model)
        plain = read(model, ids, full)
        # Rows of a batch would share a budget, so the answers are scored but not generated.
        asked = [replace(question, answer=None) for question in document.questions]
        teachers = teach(model, tokenizer, ids, full, asked)
        answers = [float(-t.log_probs.max(-1).values.mean()) for t in teachers]
        for share in SHARES:
            for method in METHODS:
                cache = KVBudget(int(share * full.stored_bytes), method).cache(model)
                text = read(model, ids, cache)
                scores = score(model, tokenizer, ids, cache, teachers)
                own = found.setdefault((share, method), {"text": [], "answers": [], "kl": [], "full": [], "bytes": []})
                own["text"] += (text - plain).tolist()
                own["answers"] += [s.nll for s in scores]
                own["full"] += answers
                own["kl"] += [s.kl for s in scores]
                own["bytes"].append(cache.stored_bytes / full.stored_bytes)
    rows, table = [], Table(box=SIMPLE)
    for heading in (
        "budget",
        "method",
        "text: ΔNLL",
        "answers: NLL",
        "above attention matching [95 %]",
        "KL",
        "bytes at the end",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for (share, method), own in found.items():
        best = min(np.mean(found[share, other]["answers"]) for other in METHODS if other != OURS)
        gap = paired_bootstrap(np.array(own["answers"]), np.array(found[share, OURS]["answers"]))
        text, nll, kl, size = (float(np.mean(own[key])) for key in ("text", "answers", "kl", "bytes"))
        name = f"{share}/{method}"
        rows += [
            Row(f"{name}/text NLL above full", text, "nats", 0.0, n=len(own["text"])),
            Row(f"{name}/answers NLL", nll, "nats", float(best), float(best) / nll, n=len(own["answers"])),
            Row(f"{name}/answers NLL above ours", gap.estimate, "nats", 0.0, None, gap.low, gap.high, len(own["kl"])),
            Row(f"{name}/KL", kl, "nats", n=len(own["kl"])),
            Row(f"{name}/bytes", size, "share of the full cache's", share, n=len(own["bytes"])),
        ]
        interval = "" if method == OURS else f"{gap.estimate:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
        cells = (f"{share:.0%}", method, f"{text:+.3f}", f"{nll:.3f}", interval, f"{kl:.3f}", f"{size:.1%}")
        table.add_row(*cells)
    whole = float(np.mean(found[SHARES[0], OURS]["full"]))
    rows.append(Row("full/answers NLL", whole, "nats", n=len(found[SHARES[0], OURS]["full"])))
    table.caption = f"the full cache's own answers: NLL {whole:.3f}"
    if given.json:
        Result("kv-budget", rows).write(given.json)
    if given.json != "-":
        Console().print(table)


if __name__ == "__main__":
    main()
