"""TRL's GRPOTrainer with V_0.5's baseline and budget: groups of rollouts that need not be of one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lissom.errors import UserError
from lissom.files import atomic_path
from lissom.rl.rewards import text_of
from lissom.rl.trainer import RewardTrainer
from lissom.rl.value_prior.baselines import Fusion, Rollouts
from lissom.rl.value_prior.config import ValuePriorConfig
from lissom.rl.value_prior.features import features_of
from lissom.rl.value_prior.priors import Context, Outcome, expected

_CONTEXT = "prior.json"  # of a checkpoint
_LEFT = ("prompt_ids", "prompt_mask")  # padded on the left
_SIGNAL = 1e-9  # of an advantage that teaches something


class ValuePriorTrainer(RewardTrainer):
    """TRL's GRPOTrainer, in which rewards are compared with `value_prior` (V_0.5, arXiv 2603.10848).

    A prompt gets the trainer's `num_generations` rollouts, and with a budget, in one more wave, as many as it is worth.
    Both waves are trained on as one batch, filled up with rows without tokens. Each prompt has the same weight in the
    loss, however many rollouts it has. What the prior knows is kept in checkpoints.

    Logged: `prior/accepted`, the share of prompts whose prior was believed; `prior/error` and `prior/bias`;
    `prior/rollouts`, rollouts of a prompt; `prior/silent`, the share of prompts that teach nothing.

    Args:
        value_prior: baseline, prior and budget; default `ValuePriorConfig()`.
        all others: of `RewardTrainer` and `GRPOTrainer`; `reward_range` must be stated, `scale_rewards` is not used.

    Raises:
        UserError: the range of rewards is not stated, or `num_generations` is not the budget's first wave.
    """

    def __init__(self, *arguments: Any, value_prior: ValuePriorConfig | None = None, **options: Any) -> None:
        self.value_prior = value_prior or ValuePriorConfig()
        super().__init__(*arguments, **options)
        if self.reward_range is None:
            raise UserError(
                "How noisy a mean reward is depends on the range of rewards: state it, as reward_range=(low, high)."
            )
        budget = self.value_prior.budget
        if budget is not None and budget.first != self.num_generations:
            raise UserError(
                f"num_generations={self.num_generations}, and the budget begins with {budget.first}: expected the same."
            )
        self.context = Context(self.value_prior.prior.window)
        self._scored: list[Tensor] = []
        self._size = int(self.num_generations or 0)

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Tensor:
        found: Tensor = super()._calculate_rewards(*arguments, **options)
        if bool(found.isnan().all(1).any()):
            raise UserError("A completion has no reward: to be compared with a prior every one needs a number.")
        self._scored.append((found * self.reward_weights.to(found.device)).nansum(1).double().cpu())
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)  # type: ignore[no-any-return]
        size, metrics = self._size, self._metrics["train"]
        rows: list[dict[str, Any]] = gather_object(inputs)
        prompts = [row["prompt"] for row in rows[::size]]
        prior, known = self._expect(prompts)
        begun = {name: len(values) for name, values in metrics.items()}
        self._scored = []
        waves = [super()._generate_and_score_completions(inputs)]
        owner = torch.arange(len(prompts)).repeat_interleave(size)
        first = self._rollouts(self._scored[0], owner, prior)
        more = self._more(first)
        if len(more):
            share = len(more) // self.accelerator.num_processes
            here = more[self.accelerator.process_index * share :][:share]
            self.num_generations = 1  # TRL compares nothing that matters to us
            try:
                waves.append(super()._generate_and_score_completions([rows[size * int(own)] for own in here]))
            finally:
                self.num_generations = size
        rollouts = self._rollouts(torch.cat(self._scored), torch.cat([owner, more]), prior)
        self._log_rewards(rollouts, begun)
        self._log_prior(rollouts, known)
        self._remember(prompts, rollouts)
        return self._joined(waves, self._advantages(rollouts), rollouts)

    def _expect(self, prompts: Sequence[Any]) -> tuple[Tensor, bool]:
        """What each prompt is expected to score; and whether the prior knew anything: otherwise it is the middle of the
        range, which the fusion believes only where the rollouts do not speak against it."""
        assert self.reward_range is not None
        low, high = self.reward_range
        settings = self.value_prior.prior
        self._features = None
        if settings.needs_features:
            model = self.accelerator.unwrap_model(self.model)
            self._features = features_of(model, self.processing_class, prompts)
        found = expected(settings, [_name(prompt) for prompt in prompts], self._features, self.context, low, high)
        if found is None:
            return torch.full((len(prompts),), (low + high) / 2, dtype=torch.float64), False
        return found, True

    def _rollouts(self, rewards: Tensor, owner: Tensor, prior: Tensor) -> Rollouts:
        assert self.reward_range is not None
        return Rollouts(rewards, owner, prior, *self.reward_range)

    def _more(self, first: Rollouts) -> Tensor:
        """The prompts that get one more rollout, each as often as it gets one; a multiple of the processes."""
        budget, baseline = self.value_prior.budget, self.value_prior.baseline
        if budget is None or not isinstance(baseline, Fusion):
            return torch.empty(0, dtype=torch.long)
        plain = Fusion(baseline.variance, floor=baseline.floor)
        distance = plain.fused(first).distance / first.worst_variance  # rewards from -1 to 1 have a variance of 1
        extra = budget.second_wave(distance, first.sizes)
        more = torch.arange(len(extra)).repeat_interleave(extra)
        left = -len(more) % self.accelerator.num_processes
        return torch.cat([more, more[:left]])

    def _advantages(self, rollouts: Rollouts) -> Tensor:
        """Of all rollouts, each prompt with the same weight; in order of `rollouts`."""
        advantages = rollouts.rewards - self.value_prior.baseline(rollouts)
        found = self._metrics["train"]
        silent = rollouts.sums((advantages.abs() > _SIGNAL).double()) == 0
        found["prior/silent"].append(float(silent.double().mean()))
        if self.value_prior.scale_rewards == "batch":
            advantages = advantages / (advantages.std() + 1e-4)
        if self.value_prior.drop_silent and bool((~silent).any()):
            advantages = advantages * (len(silent) / int((~silent).sum()))
        return advantages / rollouts.sizes[rollouts.prompt]

    def _joined(self, waves: list[dict[str, Any]], advantages: Tensor, rollouts: Rollouts) -> dict[str, Any]:
        """The waves of this process as one batch, with rows without tokens until it divides into its parts."""
        device, process = self.accelerator.device, self.accelerator.process_index
        own, begin = [], 0
        for wave in waves:
            count = len(wave["completion_ids"])
            first = begin + process * count
            own.append(advantages[first : first + count])
            begin += count * self.accelerator.num_processes
        joined: dict[str, Any] = {}
        for name in waves[0]:
            parts = [wave[name] for wave in waves]
            if name == "num_items_in_batch":
                joined[name] = sum(parts)
            elif isinstance(parts[0], Tensor):
                joined[name] = _stacked(parts, name in _LEFT, self.pad_token(name))
            else:
                raise UserError(f"Groups of several sizes cannot be made of {name}: pictures are not supported.")
        rows = len(joined["completion_ids"])
        empty = -rows % self.args.steps_per_generation
        mine = torch.cat(own)
        # TRL takes means over rows, empty ones included, or over tokens: every prompt is to have the same share.
        over = rows + empty if self.loss_type in ("grpo", "dr_grpo", "sapo") else rows
        total = over * self.accelerator.num_processes
        mine = mine * (total / len(rollouts.prior))
        joined["advantages"] = mine.to(device, torch.float32)
        if empty:
            joined = {
                name: value if name == "num_items_in_batch" else torch.cat([value, _without_tokens(name, value, empty)])
                for name, value in joined.items()
            }
        return joined

    def pad_token(self, name: str) -> int:
        """What a tensor of that name is filled up with."""
        return int(self.processing_class.pad_token_id) if name.endswith("_ids") else 0

    def _remember(self, prompts: Sequence[Any], rollouts: Rollouts) -> None:
        means, features = rollouts.means, self._features
        self.context.add(
            [
                Outcome(
                    _name(prompt), None if features is None else features[n], float(means[n]), int(rollouts.sizes[n]),
                    self.state.global_step,
                )
                for n, prompt in enumerate(prompts)
            ]
        )  # fmt: skip

    def _log_prior(self, rollouts: Rollouts, known: bool) -> None:
        found = self._metrics["train"]
        found["prior/rollouts"].append(float(rollouts.sizes.double().mean()))
        if not known:
            return
        off = rollouts.prior - rollouts.means
        inside = off.square() <= rollouts.worst_variance / rollouts.sizes
        found["prior/accepted"].append(float(inside.double().mean()))
        found["prior/error"].append(float(off.square().mean()))
        found["prior/bias"].append(float(off.mean()))

    def _log_rewards(self, rollouts: Rollouts, begun: dict[str, int]) -> None:
        """TRL has logged each wave for itself: prompts with many rollouts would count as often."""
        found = self._metrics["train"]
        for name, value in (("reward", float(rollouts.means.mean())), ("reward_std", float(rollouts.means.std()))):
            found[name][begun.get(name, 0) :] = [value]
        equal = rollouts.sums((rollouts.rewards - rollouts.means[rollouts.prompt]).abs()) < _SIGNAL
        found["frac_reward_zero_std"][begun.get("frac_reward_zero_std", 0) :] = [float(equal.double().mean())]

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        if self.is_world_process_zero():  # before all that a whole checkpoint is known by
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder / _CONTEXT) as temporary:
                temporary.write_text(self.context.to_json())
        super()._save_checkpoint(*arguments, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.context.load((Path(resume_from_checkpoint) / _CONTEXT).read_text())


def _name(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(text_of([turn]) for turn in prompt)


def _stacked(parts: Sequence[Tensor], left: bool, padding: int) -> Tensor:
    """Rows of all parts, each filled up to the widest."""
    if parts[0].ndim < 2:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    filled = []
    for part in parts:
        missing = width - part.shape[1]
        filled.append(torch.nn.functional.pad(part, (missing, 0) if left else (0, missing), value=padding))
    return torch.cat(filled)


def _without_tokens(name: str, like: Tensor, count: int) -> Tensor:
    """Rows that no loss sees, of numbers that no operation stumbles over."""
    rows = like[:1].expand(count, *like.shape[1:]).clone()
    if name in ("completion_mask", "advantages", "tool_mask"):
        rows.zero_()
    return rows
