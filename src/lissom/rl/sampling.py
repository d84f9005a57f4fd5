"""Completions from a policy, many at a time, and how often they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.rl.tasks.task import NumberTask, Prompt

Progress = Callable[[int, int], None]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Tokens of a prompt; of a chat with the model's template.

    Raises:
        UserError: there are none.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise UserError("A prompt is empty.")
    return list(ids)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    count: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 512,
    progress: Progress = lambda done, total: None,
) -> list[list[list[int]]]:
    """`count` completions of each prompt, as tokens: those up to the end-of-sequence token, itself included.

    Args:
        temperature: 0 takes the likeliest token.
        seed: what is drawn depends on it, and on `batch_size`.
        batch_size: completions that are written at a time.
        progress: called with (prompts done, prompts).

    Raises:
        UserError: a prompt is empty, or with its completion longer than the model's context.
    """
    if min(count, max_new_tokens, batch_size) < 1:
        raise UserError("Expected at least one completion, of at least one token, at a time.")
    read = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    require_room(model, read, max_new_tokens)
    at_once = max(1, batch_size // count)
    ends, padding = ends_of(model, tokenizer), pad_of(tokenizer)
    drawn: dict[str, Any] = {"do_sample": False, "num_return_sequences": 1}
    if temperature:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": count}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=padding, **drawn)
    training = model.training
    model.eval()
    found: list[list[list[int]]] = []
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else None):
        torch.manual_seed(seed)
        for first in range(0, len(read), at_once):
            part = read[first : first + at_once]
            ids, mask = padded_left(part, padding, model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            rows = [ended(row, ends) for row in out[:, ids.shape[1] :].tolist()]
            each = len(rows) // len(part)
            found += [rows[n * each : (n + 1) * each] * (count // each) for n in range(len(part))]
            progress(len(found), len(read))
    model.train(training)
    return found


def padded_left(rows: Sequence[Sequence[int]], padding: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask, `[rows, tokens]`, with padding before the shorter ones."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Places of tokens that are padded on the left, `[rows, tokens]`: padding has none."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def require_room(model: Any, prompts: Sequence[Sequence[int]], most: int) -> None:
    """Raise a `UserError` where a prompt and a completion of `most` tokens are longer than the model's context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + most > limit:
        raise UserError(
            f"A prompt of {longest} tokens and a completion of up to {most} are more than the {limit} that the model "
            "can read: shorten them (max_completion_length)."
        )


def ended(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A row of tokens up to the first that ends it."""
    for place, token in enumerate(row):
        if token in ends:
            return list(row[: place + 1])
    return list(row)


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion."""
    known = getattr(model.generation_config, "eos_token_id", None)
    listed = known if isinstance(known, list) else [known]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows with, which no mask shows."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: NumberTask,
    problems: Sequence[Any],
    count: int = 16,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 512,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """Which of `count` completions solve each problem, bool `[problems, count]`: its mean is mean@count, the mean of
    its `any` over the second axis pass@count.

    Args:
        all others: see `sample`.
    """
    written = sample(
        model, tokenizer, [task.prompt(problem) for problem in problems], count, max_new_tokens or task.longest,
        temperature, seed, batch_size, progress,
    )  # fmt: skip
    texts = [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in written]
    return np.array(
        [[task.correct(problem, text) == 1 for text in own] for problem, own in zip(problems, texts, strict=True)]
    )
