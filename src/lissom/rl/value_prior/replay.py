"""Any baseline and prior, scored on rewards that were logged: nothing is generated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lissom.errors import UserError
from lissom.rl.value_prior.baselines import Baseline, Rollouts
from lissom.rl.value_prior.priors import Context, Outcome, Prior, expected

_SIGNAL = 1e-9  # of an advantage that teaches something


@dataclass(frozen=True)
class Logged:
    """The rewards of a prompt in a step.

    Attributes:
        step: of the training.
        prompt: as text.
        rewards: of its rollouts.
    """

    step: int
    prompt: str
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Replayed:
    """How good a baseline would have been.

    Attributes:
        error: mean squared distance to a prompt's true mean reward: to the mean of the rollouts that the baseline was
            not shown, less what the noise of that is.
        silent: share of prompts that would have taught nothing.
        prompts: that were scored.
        known: share of them for which the prior had something to say; 1 without a prior.
    """

    error: float
    silent: float
    prompts: int
    known: float


def read_log(path: Path, reward: str | None = None) -> list[Logged]:
    """What a run has logged: a .jsonl file with `step`, `prompt` and `rewards` in each line, or the folder
    `completions` that TRL writes with `log_completions=True`.

    Args:
        reward: name of the reward function, where TRL has logged several.

    Raises:
        UserError: it is neither, or there is nothing in it.
    """
    rows = list(_of_tables(path, reward) if path.is_dir() else _of_lines(path))
    if not rows:
        raise UserError(f"{path} has no rewards: log completions (log_completions=True in TRL's arguments).")
    return sorted(rows, key=lambda row: row.step)


def _of_lines(path: Path) -> Iterator[Logged]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a log of rewards.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield Logged(int(row["step"]), str(row["prompt"]), tuple(float(reward) for reward in row["rewards"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: expected step, prompt and a list of rewards.") from error


def _of_tables(path: Path, reward: str | None) -> Iterator[Logged]:
    import pandas

    known = {"step", "prompt", "completion", "advantage"}
    for file in sorted(path.glob("*.parquet")):
        table = pandas.read_parquet(file)
        found = [name for name in table.columns if name not in known and pandas.api.types.is_numeric_dtype(table[name])]
        if reward is None and len(found) != 1:
            raise UserError(f"{file} has rewards of {', '.join(found) or 'no function'}: name one.")
        column = reward or found[0]
        if column not in table.columns:
            raise UserError(f"{file} has no rewards called {column}: expected {', '.join(found)}.")
        prompts = table["prompt"].map(lambda prompt: prompt if isinstance(prompt, str) else json.dumps(list(prompt)))
        for (step, prompt), rows in table.assign(prompt=prompts).groupby(["step", "prompt"], sort=False):
            yield Logged(int(step), str(prompt), tuple(map(float, rows[column].dropna())))


def replay(
    log: Sequence[Logged],
    baseline: Baseline,
    prior: Prior | None = None,
    size: int = 4,
    low: float = 0.0,
    high: float = 1.0,
    seed: int = 0,
) -> Replayed:
    """Show a baseline `size` rewards of each prompt, and compare it with the others.

    Args:
        log: of `read_log`, in the order of its steps.
        prior: what it learns is what was shown in earlier steps; None: the middle of the range. Priors that need the
            policy's features cannot be replayed from rewards alone.
        size: rollouts that are shown; prompts with fewer than two more are left out of the error.
        low, high: between what rewards are.
        seed: of which are shown.

    Raises:
        UserError: no prompt has enough rewards, or the prior needs features.
    """
    if prior is not None and prior.needs_features:
        raise UserError(
            f"{type(prior).__name__} needs the policy's features of prompts, which a log of rewards has not."
        )
    random = np.random.default_rng(seed)
    context = Context(prior.window if prior else 1)
    errors: list[float] = []
    silent: list[bool] = []
    known = total = 0
    for step in dict.fromkeys(row.step for row in log):
        rows = [row for row in log if row.step == step and len(row.rewards) >= size + 2]
        if not rows:
            continue
        orders = [random.permutation(len(row.rewards)) for row in rows]
        seen = np.array([np.take(row.rewards, order[:size]) for row, order in zip(rows, orders, strict=True)])
        guess = None if prior is None else expected(prior, [row.prompt for row in rows], None, context, low, high)
        total += len(rows)
        known += len(rows) if prior is None or guess is not None else 0
        if guess is None:
            guess = torch.full((len(rows),), (low + high) / 2, dtype=torch.float64)
        owner = torch.arange(len(rows)).repeat_interleave(size)
        rollouts = Rollouts(torch.from_numpy(seen.ravel()), owner, guess, low, high)
        found = baseline(rollouts).numpy().reshape(len(rows), size)
        for row, order, own, shown in zip(rows, orders, found, seen, strict=True):
            rest = np.take(row.rewards, order[size:])
            errors.append(float(((own - rest.mean()) ** 2).mean() - rest.var(ddof=1) / len(rest)))
            silent.append(bool((np.abs(shown - own) < _SIGNAL).all()))
        context.add([Outcome(row.prompt, None, float(s.mean()), size, step) for row, s in zip(rows, seen, strict=True)])
    if not errors:
        raise UserError(
            f"No prompt has {size + 2} rewards: {size} are shown to the baseline, and others tell the truth."
        )
    return Replayed(float(np.mean(errors)), float(np.mean(silent)), total, known / total)
