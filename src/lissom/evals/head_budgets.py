"""The documents on which head budgets are measured, with the full cache's answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.fidelity import teach
from lissom.evals.texts import planted_documents
from lissom.kv.compact import read
from lissom.kv.document import document_ids
from lissom.kv.influence import Lesson, measure_shares

_SEED = 2  # neither the documents of the check nor those that the defaults were chosen on


def measure_head_budgets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: int = 1,
    tokens: int = 700,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Measure each KV head's influence on `documents` documents of `tokens` tokens and keep the shares in the cache.

    Returns:
        `[layers, heads]`, sum 1; see `lissom.kv.influence.measure_shares`.
    """
    lessons = []
    for document in planted_documents(tokenizer, documents, tokens, _SEED):
        ids = document_ids(tokenizer, document.text)
        full = read(model, ids)
        answers = teach(model, tokenizer, ids, full, document.questions, 24)
        lessons.append(Lesson(ids, [answer.ids for answer in answers], [answer.start for answer in answers]))
    return measure_shares(model, tokenizer, lessons, progress=progress)
