"""TRL's GRPOTrainer with a ledger, and with a sentence where a reward function or a prompt is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from lissom.errors import UserError
from lissom.rl.ledger import LedgerCallback, TokenLedger
from lissom.rl.rewards import Watched
from lissom.rl.sampling import require_room


class RewardTrainer(GRPOTrainer):
    """TRL's GRPOTrainer; what it trains is the same to the last bit.

    Args:
        reward_range: between what rewards are; None: it is not known.
        token_budget: generated tokens after which the training ends; None: it ends by its steps.
        all others: of `GRPOTrainer`.

    Attributes:
        ledger: what was spent so far, also before an interruption.

    Raises:
        UserError: in training: a reward function raises something, or returns what is no list of finite numbers; a
            prompt and the longest completion are longer than the model's context; a completion is empty.
    """

    def __init__(
        self, *arguments: Any, reward_range: tuple[float, float] | None = None, token_budget: int | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if token_budget is not None and token_budget < 1:
            raise UserError(f"token_budget={token_budget}: expected at least 1.")
        if reward_range is not None and not reward_range[0] < reward_range[1]:
            raise UserError(f"reward_range={reward_range}: expected the lowest and the highest reward.")
        self.reward_range = reward_range
        self.book = LedgerCallback(budget=token_budget)
        options["callbacks"] = [self.book, *(options.get("callbacks") or [])]
        super().__init__(*arguments, **options)
        low, high = reward_range or (None, None)
        self.reward_funcs = [
            function if isinstance(function, nn.Module | Watched) else Watched(function, low, high)
            for function in self.reward_funcs
        ]
        if self.rollout_func is not None:
            self.rollout_func = _with_completions(self.rollout_func)

    @property
    def ledger(self) -> TokenLedger:
        """What was spent so far."""
        return self.book.ledger

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if isinstance(sampler, RepeatSampler):
            sampler.__class__ = _RepeatSampler
        return sampler

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        found = super()._tokenize_prompts(prompts)
        require_room(self.model, found[0], self.max_completion_length or 0)
        return found

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        prompt_ids, completion_ids = found[:2]
        if self.model.training:
            spent = torch.tensor(
                [sum(map(len, completion_ids)), sum(map(len, prompt_ids)), len(completion_ids)],
                device=self.accelerator.device,
            )
            generated, prompt, completions = self.accelerator.reduce(spent, "sum").tolist()
            self.ledger.spend(generated=generated, prompt=prompt, completions=completions)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was spent."""
        if "loss" in logs:
            logs |= {f"tokens/{name}": float(count) for name, count in asdict(self.ledger).items()}
        super().log(logs, start_time)

    def record(self, entry: dict[str, float]) -> None:
        """Log something of its own accord, and not in the place of what TRL has gathered for its next line."""
        super(GRPOTrainer, self).log(entry)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            self.ledger.spend(trained=int(self.accelerator.reduce(mask_of(inputs).sum(), "sum")))
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss


class _RepeatSampler(RepeatSampler):
    """TRL's, whose order a run that goes on in a later epoch finds again: TRL's own begins with that of the first."""

    def set_epoch(self, epoch: int) -> None:
        """Draw what earlier epochs have drawn."""
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def _with_completions(rollout: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`rollout`, whose empty completions TRL would stumble over."""

    def checked(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        found = rollout(prompts, trainer)
        if not all(map(len, found.get("completion_ids", ()))):
            raise UserError("A completion is empty: each needs a token, at least the one that ends it.")
        return found

    return checked


def mask_of(inputs: dict[str, Any]) -> Tensor:
    """Which tokens the policy wrote and is trained on, `[batch, tokens]`."""
    mask: Tensor = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
