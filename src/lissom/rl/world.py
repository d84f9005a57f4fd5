"""What a policy is trained on and measured with: prompts, what belongs to them, and a reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.rl.rewards import RANGES, RewardFunction, TaskReward, Watched
from lissom.rl.sampling import Progress, sample
from lissom.rl.tasks.task import NumberTask

_HELD_OUT = 0.1  # of the rows of a file, at least one
RewardKind = Literal["correct", "dense"]


@dataclass(frozen=True)
class World:
    """Rows to train on and rows that are held out, and who judges completions.

    Attributes:
        train, held_out: rows with a `prompt`, text or messages, and columns that the reward is called with.
        reward: see `Watched`.
        judge: what is reported of held-out rows: for a task whether they are solved, otherwise the reward.
        reward_range: between what rewards are; None: it is not known.
    """

    train: Sequence[dict[str, Any]]
    held_out: Sequence[dict[str, Any]]
    reward: RewardFunction
    judge: RewardFunction
    reward_range: tuple[float, float] | None = None


def task_world(task: NumberTask, prompts: int, held_out: int, kind: RewardKind = "correct", seed: int = 0) -> World:
    """Problems of a task.

    Args:
        prompts, held_out: how many.
        kind: reward that is trained on: `correct`, 1 or 0, or `dense`, from -1 to 1.

    Raises:
        UserError: there are none.
    """
    if min(prompts, held_out) < 1:
        raise UserError(f"{prompts} prompts and {held_out} that are held out: expected at least one of each.")
    problems = [*task.problems("train", prompts, seed), *task.problems("test", held_out, seed=0)]
    rows = [{"prompt": task.prompt(problem), "index": index} for index, problem in enumerate(problems)]
    return World(
        rows[:prompts], rows[prompts:], TaskReward(task, problems, kind), TaskReward(task, problems, "correct"),
        RANGES[kind],
    )  # fmt: skip


def file_world(file: Path, reward: RewardFunction, reward_range: tuple[float, float] | None = None) -> World:
    """Rows of a .jsonl file; every tenth is held out.

    Raises:
        UserError: it is none, or a row has no prompt.
    """
    rows = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {file}, and no task of that name.") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{file} is no text file in UTF-8.") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not _is_prompt(row.get("prompt")):
            raise UserError(f'{file}, line {number}: expected an object with a "prompt": text, or messages of a chat.')
        rows.append(row)
    if len({tuple(sorted(row)) for row in rows}) > 1:
        raise UserError(f"The rows of {file} have different columns: expected the same in all.")
    every = round(1 / _HELD_OUT)
    held_out = rows[every - 1 :: every] or rows[-1:]
    train = [row for number, row in enumerate(rows) if (number + 1) % every] if len(rows) >= every else rows[:-1]
    if not train:
        raise UserError(f"{file} has {len(rows)} rows: expected at least 2, one of which is held out.")
    return World(train, held_out, reward, Watched(reward, *(reward_range or (None, None))), reward_range)


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in prompt)
    )


def judged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    count: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 512,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """What the judge says of `count` completions of each held-out row, `[rows, count]`: its mean is mean@count, the
    mean of its largest over the second axis is pass@count where it is 0 or 1.

    Args:
        all others: see `sample`.
    """
    rows = world.held_out
    written = sample(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        count,
        max_new_tokens,
        temperature,
        seed,
        batch_size,
        progress,
    )
    texts = [text for own in written for text in tokenizer.batch_decode(own, skip_special_tokens=True)]
    chat = not isinstance(rows[0]["prompt"], str)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    repeated = [row for row in rows for _ in range(count)]
    columns = {name: [row[name] for row in repeated] for name in rows[0] if name != "prompt"}
    ids = [own for group in written for own in group]
    verdicts = world.judge(
        prompts=[row["prompt"] for row in repeated], completions=completions, completion_ids=ids, **columns
    )
    return np.array([np.nan if verdict is None else verdict for verdict in verdicts], float).reshape(len(rows), count)
